"""Rows that are no use among many that are: each is reported with its place, none of the others is
touched or moved.
"""

import json
import math

import numpy as np
import pytest

from lljax.config import default_config
from lljax.data.tokens import prepare
from lljax.errors import DataError
from lljax.interop.open import open_base, tokenizer_fingerprint

pytestmark = pytest.mark.faults
GOOD, EACH = 10_000, 10
# A template as the models' own are: it takes the roles that it knows.
TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
DEFECTS = {
    "not UTF-8": b'{"text": "caf\xe9 is Latin 1"}',
    "not JSON": b'{"text": "cut off in the mid',
    "not an object": b'["text", "a list"]',
    "no known fields": b'{"content": "another name"}',
    "an empty text": b'{"text": "  \\n "}',
    "a number for a text": b'{"text": NaN}',
    "a NUL character": b'{"text": "a\\u0000b"}',
    "too long": b'{"text": "' + b"long " * 60_000 + b'"}',
    "a role that the template refuses": b'{"messages": [{"role": "robot", "content": "a"}, '
    b'{"role": "assistant", "content": "b"}]}',
    "no reply": b'{"messages": [{"role": "user", "content": "a"}]}',
    "a message without content": b'{"messages": [{"role": "user", "content": null}, '
    b'{"role": "assistant", "content": "b"}]}',
    "half of a surrogate pair": b'{"text": "a\\ud83d"}',
    "nested too deeply": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested 900 deep": b'{"messages": [{"role": "assistant", "content": "a", "more": '
    + b"[" * 900
    + b"]" * 900
    + b"}]}",
    "a pair of preferences": b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
    "a loss between off and on": b'{"messages": [{"role": "assistant", "content": "a", '
    b'"weight": 0.5}]}',
}


@pytest.fixture
def rows(tmp_path):
    """A file of GOOD rows, of texts and conversations, with EACH of every defect among them: (file,
    {line: defect}, the texts of the good rows in their order).
    """
    rng = np.random.default_rng(0)
    bad = np.repeat(list(DEFECTS), EACH)
    rng.shuffle(bad)
    lines = rng.choice(np.arange(1, GOOD + len(bad) + 1), len(bad), replace=False)
    where, good = dict(zip(lines.tolist(), bad.tolist(), strict=True)), []
    with open(tmp_path / "rows.jsonl", "wb") as file:
        for line in range(1, GOOD + len(bad) + 1):
            if line in where:
                file.write(DEFECTS[where[line]] + b"\n")
                continue
            good.append(
                f"row {len(good)} " + " ".join(rng.choice(["first", "second", "return"], 5))
            )
            row = (
                {"text": good[-1]}
                if line % 3
                else {
                    "messages": [
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": good[-1]},
                    ]
                }
            )
            file.write(json.dumps(row).encode() + (b"\r\n" if line % 7 == 0 else b"\n"))
    return tmp_path / "rows.jsonl", where, good


def prepared(file, tokenizer, cache, **changes):
    data = default_config().data
    data.train, data.valid_fraction, data.max_row_bytes = (str(file),), 0.0, 250_000
    data.update(changes)
    tokenizer.chat_template = TEMPLATE
    return prepare(
        data,
        tokenizer,
        len(tokenizer),
        cache,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )


@pytest.fixture
def own_tokenizer(tiny):
    return open_base(tiny).tokenizer()


def test_each_defect_is_reported_by_file_and_line_and_the_others_keep_their_order(
    rows, own_tokenizer, tmp_path, tally
):
    file, where, good = rows
    row, order = (
        tally("rows of 16 defects among 10,000 good ones", len(where)),
        tally("good rows among them", GOOD),
    )
    documents = prepared(file, own_tokenizer, tmp_path / "run" / "data", max_bad_fraction=0.02)
    reported = [
        json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    ]
    assert len(reported) == documents.bad == len(where) and len(documents.train) == GOOD
    found = {(r["file"], r["line"]): r["reason"] for r in reported}
    for line, defect in where.items():
        reason = found.get((str(file), line), "")
        row.case(reason and "\n" not in reason, (line, defect, reason))
    for i, text in enumerate(good):
        order.case(text in own_tokenizer.decode(documents.train.tokens(i)), i)
    row.done()
    order.done()


def test_more_of_them_than_are_allowed_stop_with_three(rows, own_tokenizer, tmp_path, tally):
    file, where, _ = rows
    row = tally("more bad rows than data.max_bad_fraction: stopped with 3", 2)
    share = len(where) / (GOOD + len(where))
    for allowed in (0.0, math.nextafter(share, 0.0)):
        with pytest.raises(
            DataError, match=f"{len(where)} of {GOOD + len(where)} rows.*data.max_bad_fraction"
        ) as stopped:
            prepared(
                file, own_tokenizer, tmp_path / str(allowed) / "data", max_bad_fraction=allowed
            )
        listed = (tmp_path / str(allowed) / "bad_rows.jsonl").read_text().count("\n")
        row.case(stopped.value.exit_code == 3 and listed == len(where))
    row.done()
