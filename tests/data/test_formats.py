import gzip
import json
import random

import pytest

from lljax.data import formats
from lljax.data.formats import BadRow, Document
from lljax.errors import DataError


def write(path, *lines: bytes):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def parse(**row) -> Document:
    return formats.parse(json.dumps(row).encode(), "file:1")


def turns(document: Document) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in document.messages]


def test_every_row_form_becomes_the_conversation_or_text_it_says():
    assert turns(parse(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])) == [
        ("user", "a"), ("assistant", "b")]
    assert turns(parse(system="s", history=[["a", "b"]], query="c", response="d")) == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert turns(parse(instruction="do", input="this", output="done", system="s")) == [
        ("system", "s"), ("user", "do\nthis"), ("assistant", "done")]
    assert turns(parse(instruction="do", input="", output="done")) == [("user", "do"), ("assistant", "done")]
    prompt, completion = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    document = parse(prompt=prompt, completion=completion)
    assert turns(document) == [("user", "a"), ("assistant", "b")] and document.given == 1
    assert turns(parse(instruction="do", output="done", history=[["a", "b"]])) == [
        ("user", "a"), ("assistant", "b"), ("user", "do"), ("assistant", "done")]
    document = parse(prompt="a", completion="b")
    assert (document.prompt, document.text) == ("a", "b")
    assert parse(text=" kept as it is\n").text == " kept as it is\n"


def test_further_keys_of_a_message_are_left_alone():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    reply = {"role": "assistant", "content": None, "tool_calls": call}
    assert parse(messages=[{"role": "user", "content": "a"}, reply]).messages[1] == reply


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"q": 1}}}


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
    {"conversations": TALK}, {"conversation": [{"human": "a", "assistant": "b"}]},
    {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, TALK[1]]}])
def test_conversations_are_read_in_the_spellings_of_the_field(row):
    assert parse(**row).messages == tuple(TALK)


@pytest.mark.parametrize("row,given", [
    ({"messages": TALK}, 0), ({"messages": [{"role": "system", "content": "s"}, *TALK]}, 0),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 0),
    ({"prompt": TALK[:1], "completion": TALK[1:]}, 2), ({"prompt": "a", "completion": "b"}, 2),
    ({"query": "a", "response": "b"}, 0)])
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside_a_conversation_becomes_its_first_message(row, given, key):
    document = parse(**row, **{key: "s"})
    assert turns(document) == [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert document.given == given and not document.unread


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("row", [{"messages": TALK}, {"query": "a", "response": "b"}, {"prompt": "a", "completion": "b"}])
def test_tools_reach_the_document_as_objects_or_as_their_json(row, tools):
    document = parse(**row, tools=tools)
    assert document.tools == tuple(TOOLS) and document.messages == tuple(TALK) and not document.unread
    assert document.content() != parse(**row).content()
    assert parse(**row, tools=[]) == parse(**row)


@pytest.mark.parametrize("calls", [
    [{"role": "tool_call", "content": json.dumps(CALL["function"])}] * 2,
    [{"from": "function_call", "value": json.dumps([{"name": "look", "arguments": '{"q": 1}'}] * 2)}]])
def test_calls_in_messages_of_their_own_are_part_of_the_reply_before_them(calls):
    result, end = {"from": "observation", "value": "c"}, {"from": "gpt", "value": "d"}
    found = parse(messages=[*TALK, *calls, result, end]).messages
    assert found == (TALK[0], TALK[1] | {"tool_calls": [CALL, CALL]}, {"role": "tool", "content": "c"},
                     {"role": "assistant", "content": "d"})
    alone = parse(messages=[TALK[0], *calls, result, end]).messages
    assert alone[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_mask", "loss_scale"])
def test_a_message_whose_loss_is_off_is_told_by_its_place(key):
    rows = [TALK[0], TALK[1] | {key: False}, TALK[0], TALK[1] | {key: 1}]
    assert parse(messages=rows).untrained == {1}
    assert parse(messages=rows, system="s").untrained == {2}
    assert parse(prompt=rows[:3], completion=rows[3:]).untrained == {1}
    assert parse(messages=[TALK[0] | {key: 0}, TALK[1] | {key: None}]).untrained == {0}
    assert parse(messages=[TALK[0] | {key: True}, TALK[1]]).unread == (f"messages.{key} (of no reply)",)


def test_keys_that_no_reader_knows_are_named_and_those_that_say_nothing_are_not():
    document = parse(messages=[TALK[0] | {"when": 1, "name": "x"}, TALK[1] | {"refusal": None}], id=7, images=[], source="",
                     **{"Is it a text?": 1})
    assert document.unread == ("messages.when", "(no name)", "id")
    assert parse(text="a", system="s", query="q").unread == ("query", "system")
    assert parse(text="a", id=7).content() == parse(text="a").content()


REPLY = b'{"role": "assistant", "content": "b"}'


@pytest.mark.parametrize("line,reason", [
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
    (b'{"prompt": [' + REPLY + b'], "completion": [{"role": "user", "content": "a"}]}', "no assistant message"),
    (b'{"messages": [{"role": "assistant", "content": "b", "weight": 0}]}', "loss of every assistant message is off"),
    (b'{"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]}', "message 0 .*'weight' is neither 0 nor 1"),
    (b'{"messages": [{"role": "assistant", "content": "b", "train": "no"}]}', "'train' is neither"),
    (b'{"messages": [{"role": "assistant", "content": "b", "weight": NaN}]}', "'weight' is neither"),
    (b'{"messages": [{"role": "system", "content": "s"}, ' + REPLY + b'], "system": "t"}', "two system prompts"),
    (b'{"query": "a", "response": "b", "system": "s", "system_prompt": "t"}', "two system prompts"),
    (b'{"messages": [' + REPLY + b'], "system": 3}', "'system' is a int"),
    (b'{"messages": [' + REPLY + b'], "tools": "look"}', "'tools' is not JSON"),
    (b'{"messages": [' + REPLY + b'], "tools": ["look"]}', "'tools' is no list of tools"),
    (b'{"messages": [' + REPLY + b'], "tools": {"name": "look"}}', "'tools' is no list of tools"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', "message 0: .*image_url. is no"),
    (b'{"messages": [{"from": "moderator", "value": "a"}]}', "message 0 .moderator. is from none of human"),
    (b'{"messages": [{"from": "function_call", "value": "look(1)"}]}', "message 0 .function_call. is not JSON"),
    (b'{"messages": [{"from": "function_call", "value": "[1]"}]}', "message 0 .function_call. is no call"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "'chosen': .*preference objective"),
    (b'{"messages": [' + REPLY + b'], "rejected_response": "c"}', "'rejected_response': .*preference objective"),
    (b'{"prompt": "a", "completion": "b", "label": false}', "'label': .*preference objective"),
    (b'{"messages": [' + REPLY + b'], "images": ["a.png"]}', "'images': models of text alone"),
    (b'{"text": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", "nested too deeply"),
    (b'{"messages": [' + REPLY + b'], "tools": "' + b"[" * 900 + b"]" * 900 + b'"}', "nested too deeply"),
    (b"\xff{}", "not UTF-8"), (b"{", "not JSON"), (b"[" * 100_000, "nested too deeply"), (b"[1]", "not a JSON object"),
    (b"null", "not a JSON object"), (b'{"words": "a"}', "unknown fields"), (b'{"text": null}', "unknown fields"),
    (b'{"text": ""}', "'text' is empty"), (b'{"text": "  \\n"}', "'text' is empty"),
    (b'{"text": ["a"]}', "'text' is a list"),
    (b'{"text": "a\\u0000b"}', "NUL"), (b'{"messages": []}', "'messages'"), (b'{"messages": {}}', "'messages'"),
    (b'{"messages": ["a"]}', "message 0 has no role"), (b'{"messages": [{"role": "user"}]}', "message 0 .* no text"),
    (b'{"messages": [{"role": "assistant", "content": 5, "tool_calls": [1]}]}', "message 0 .* no text"),
    (b'{"messages": [{"role": "assistant", "content": "a\\u0000"}]}', "NUL"),
    (b'{"text": "a\\ud800b"}', "surrogate"),
    (b'{"messages": [{"role": "assistant", "content": "a\\ud800"}]}', "surrogate"),
    (b'{"query": "a", "response": ""}', "'response' is empty"),
    (b'{"query": "a", "response": "b", "history": "c"}', "history"),
    (b'{"query": "a", "response": "b", "history": [["c"]]}', "history"),
    (b'{"instruction": "a", "output": 3}', "'output' is a int"),
    (b'{"prompt": "a", "completion": [1]}', "'completion' is a list")])
def test_a_broken_line_is_named_with_its_place_and_reason(tmp_path, line, reason):
    file = write(tmp_path / "rows.jsonl", b'{"text": "good"}', b"", line, b'{"text": "good too"}')
    good, bad, last = formats.read([file])
    assert isinstance(good, Document) and last.where == f"{file}:4"
    assert isinstance(bad, BadRow) and (bad.file, bad.line) == (str(file), 3)
    with pytest.raises(ValueError, match=reason):
        formats.parse(line, "file:1")


def test_byte_order_mark_crlf_and_a_missing_last_newline_are_no_matter(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n{"text": "c"}')
    assert [document.text for document in formats.read([file])] == ["a\u2028b", "c"]


def test_folders_are_read_deep_and_in_sorted_order_with_gz(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "c.jsonl", b'{"text": "3"}')
    write(tmp_path / "a.jsonl", b'{"text": "1"}')
    (tmp_path / "b" / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "2"}\n'))
    write(tmp_path / "notes.txt", b"no row")
    assert [document.text for document in formats.read([tmp_path])] == ["1", "2", "3"]


def test_a_file_that_only_claims_to_be_gzip_is_refused(tmp_path):
    with pytest.raises(DataError, match="rows.jsonl.gz: the file is damaged"):
        list(formats.read([write(tmp_path / "rows.jsonl.gz", b'{"text": "a"}')]))


def compressed(rows: int) -> bytes:
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=30))}) for _ in range(rows))
    return gzip.compress("\n".join(lines).encode(), mtime=0)


def test_a_damaged_gz_is_refused_whole(tmp_path):
    """Rows before the damage shows may have changed, and be as good as any."""
    raw, rng = compressed(1000), random.Random(0)
    for _ in range(30):
        at = rng.randrange(15, len(raw) - 20)
        file = tmp_path / "rows.jsonl.gz"
        file.write_bytes(raw[:at] + rng.randbytes(8) + raw[at + 8:])
        with pytest.raises(DataError, match="rows.jsonl.gz: .*fetch or write it again"):
            list(formats.read([file]))


def test_a_gz_that_is_cut_off_is_refused(tmp_path):
    raw = compressed(3000)
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(raw[:len(raw) // 2])
    with pytest.raises(DataError, match="rows.jsonl.gz: the file is cut off"):
        list(formats.read([file]))


def test_a_folder_named_as_a_file_of_rows_is_not_read_as_one(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    write(tmp_path / "x.jsonl" / "a.jsonl", b'{"text": "ok"}')
    assert [document.text for document in formats.read([tmp_path])] == ["ok"]


@pytest.mark.parametrize("row", [{"secret " * 100: 1}, {"messages": [{"role": "secret\n" * 50, "content": 3}]}])
def test_a_reason_is_one_short_line(row):
    with pytest.raises(ValueError) as error:
        parse(**row)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("name,advice", [
    ("none.jsonl", "no such file; scripts/prepare_data.py makes one"), (".", "holds no .jsonl"), ("rows.csv", "load_dataset"),
    ("rows.txt", "scripts/prepare_data.py folder makes one"), ("\x1b[31m\nINFO.jsonl", "x1b.31m.nINFO.jsonl: there is no"),
    ("x" * 5000, "too long")])
def test_paths_that_hold_no_rows_are_refused_with_field_and_advice(tmp_path, name, advice):
    for other in ("rows.csv", "rows.txt"):
        write(tmp_path / other, b"a,b")
    with pytest.raises(DataError, match=advice) as error:
        formats.files([tmp_path / name], field="data.valid")
    said = str(error.value)
    assert said.startswith(f"data.valid: {tmp_path}") and said.isprintable() and len(said) < 300


# ---------------------------------------------------------------- arrays
ROWS = [{"text": "a\u2028] \"}, {"}, {"text": "é" * 30}, {"query": "q", "response": "[]"}, {"text": 3}, {"text": "end"}]


@pytest.mark.parametrize("indent,chunk,name", [(None, 1 << 20, "rows.json"), (1, 7, "rows.json"), (None, 3, "rows.json.gz")])
def test_an_array_of_rows_reads_as_the_rows_one_a_line(tmp_path, monkeypatch, indent, chunk, name):
    monkeypatch.setattr(formats, "CHUNK", chunk)
    lines = write(tmp_path / "rows.jsonl", *(json.dumps(row).encode() for row in ROWS))
    content = b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n"
    array = tmp_path / name
    array.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

    def found(file):
        return [(row.line, row.reason) if isinstance(row, BadRow) else (row.where.rpartition(":")[2], row.content())
                for row in formats.read([file])]
    assert found(array) == found(lines) and len(found(array)) == len(ROWS)
    (tmp_path / "lines.json").write_bytes(lines.read_bytes())
    assert found(tmp_path / "lines.json") == found(lines)


@pytest.mark.parametrize("content,reason", [
    (b'[{"text": "a"}, {"text": "b"', "row 2 is not JSON .*cut off"), (b'[{"text": "a"}, ', "row 2 is not JSON"),
    (b'[{"text": "a"} {"text": "b"}]', "does not go on after row 1"), (b'[{"text": "a"}', "does not go on after row 1"),
    (b'[{"text": "a"}] [1]', "something follows the array of 1 rows"), (b'[{"text": "\xff"}]', "not UTF-8"),
    (b"[" * 100_000, "row 1 is nested too deeply"), (b'[{"text": "a"}, {"text": "' + b"b" * 3000, "row 2 is longer than")])
def test_an_array_that_is_damaged_is_refused_whole(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(formats, "CHUNK", 100)
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=f"rows.json: .*{reason}"):
        list(formats.read([tmp_path / "rows.json"], max_row_bytes=1000))


def test_a_row_beyond_the_limit_is_a_bad_row_of_an_array_too(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a" * 100}, {"text": "b"}]))
    bad, good = formats.read([tmp_path / "rows.json"], max_row_bytes=50)
    assert bad.line == 1 and "data.max_row_bytes=50" in bad.reason and good.text == "b"


def test_a_small_gz_of_one_endless_row_is_one_bad_row(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "' + b"ab " * 10_000_000 + b'"}\n{"text": "b"}\n'))
    bad, good = formats.read([file])
    assert (bad.line, good.text) == (1, "b")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_a_file_that_is_not_the_one_that_was_expected_is_refused(tmp_path, name):
    content = b'[{"text": "a"}]' if name == "rows.json" else b'{"text": "a"}\n'
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    expected = formats.sha256(file)
    assert len(list(formats.read_file(file, expected=expected))) == 1
    with open(file, "ab") as more:
        more.write(b"\0" if name.endswith("gz") else b" ")
    with pytest.raises(DataError, match=f"{name}: the file changed while it was read"):
        list(formats.read_file(file, expected=expected))


def test_a_line_beyond_the_limit_is_skipped_whole(tmp_path):
    file = write(tmp_path / "rows.jsonl", b'{"text": "' + b"a" * 100 + b'"}', b'{"text": "b"}')
    bad, good = formats.read([file], max_row_bytes=32)
    assert "data.max_row_bytes=32" in bad.reason
    assert (bad.line, good.text, good.where) == (1, "b", f"{file}:2")


def test_content_tells_documents_apart_wherever_they_stand():
    first, second = (formats.parse(b'{"text": "a"}', f"file:{line}") for line in (1, 2))
    assert first.content() == second.content() != parse(prompt="a", completion="a").content()
