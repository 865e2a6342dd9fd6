"""What a run says and records holds no text of the documents, whatever is wrong with them."""

import json
import logging

import pytest

from lljax.data import formats, tokens
from lljax.data.formats import BadRow, Document
from lljax.data.template import encode
from lljax.errors import DataError
from lljax.interop.open import open_base, tokenizer_fingerprint

SECRET = "Zanzibar-7741"
TALK = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}]
BAD = [
    f'{{"text": "{SECRET}',
    f'{{"text": {SECRET}}}',
    f'"{SECRET}"',
    f'["{SECRET}"]',
    f'{{"text": "{SECRET}\\q"}}',
    f'{{"text": "{SECRET}\\u0000"}}',
    f'{{"text": "{SECRET}\\ud800"}}',
    f'{{"text": "{SECRET}"}}{SECRET}',
    json.dumps({f"Is {SECRET} an island?": f"{SECRET} is one"}),
    json.dumps({"text": [SECRET]}),
    json.dumps({"messages": [{"role": f"the keeper of {SECRET}", "content": None}]}),
    json.dumps({"messages": [{"role": "user", "content": [SECRET]}]}),
    json.dumps({"messages": [SECRET]}),
    json.dumps({"query": SECRET, "response": SECRET, "history": [[SECRET]]}),
    json.dumps({"instruction": SECRET, "output": {SECRET: SECRET}}),
    json.dumps({"prompt": SECRET, "completion": [SECRET]}),
]


@pytest.mark.parametrize("line", BAD)
def test_why_a_row_cannot_be_read_is_said_without_its_text(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    (row,) = formats.read([file])
    assert isinstance(row, BadRow) and SECRET not in row.reason and row.reason


@pytest.mark.parametrize(
    "template,reason",
    [
        ("{{ raise_exception('never ' + messages[0].content) }}", "TemplateError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0][messages[0].content].name }}", "UndefinedError"),
        ("{{ messages[0].content | int + messages[0].content }}", "TypeError"),
        ("{{ messages[0].content[5:] }}", r"does not show message 0 \(user\) as it is"),
    ],
)
def test_why_a_template_refuses_is_said_in_its_own_words_or_not_at_all(tokenizer, template, reason):
    own, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(ValueError, match=reason) as raised:
            encode(Document("file:1", messages=tuple(TALK)), tokenizer, "assistant")
    finally:
        tokenizer.chat_template = own
    assert SECRET not in str(raised.value)


def documents(folder):
    """Good rows, and then all that are bad."""
    file = folder / "rows.jsonl"
    good = [json.dumps({"text": f"{SECRET} " * n}) for n in range(3, 30)] + [
        json.dumps({"messages": TALK})
    ] * 8
    file.write_text("\n".join(good + BAD) + "\n")
    return file


def test_too_many_bad_rows_are_refused_and_listed_without_their_text(run_config, tmp_path):
    run_config.data.train = (str(documents(tmp_path)),)
    tokenizer = open_base(run_config.model.path).tokenizer()
    with pytest.raises(DataError) as raised:
        tokens.prepare(
            run_config.data,
            tokenizer,
            320,
            tmp_path / "data",
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )
    listed = (tmp_path / "bad_rows.jsonl").read_text()
    assert len(listed.splitlines()) == len(BAD) and SECRET not in listed + str(raised.value)


@pytest.mark.slow
def test_a_run_leaves_the_text_nowhere_but_in_its_tokens(
    run_config, train_on_one_device, tmp_path, caplog, capfd
):
    run_config.data.train, run_config.data.max_bad_fraction = (str(documents(tmp_path)),), 0.9
    run_config.training.eval_every, run_config.context.schedule = 1, ((2, 32, "full"),)
    with caplog.at_level(logging.DEBUG):
        train_on_one_device(run_config, tmp_path / "run")
    said = capfd.readouterr()
    assert SECRET not in caplog.text + said.out + said.err and "could not be used" in caplog.text
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "bad_rows.jsonl", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
