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
    document = parse(prompt="a", completion="b")
    assert (document.prompt, document.text) == ("a", "b")
    assert parse(text=" kept as it is\n").text == " kept as it is\n"


def test_further_keys_of_a_message_are_left_alone():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    reply = {"role": "assistant", "content": None, "tool_calls": call}
    assert parse(messages=[{"role": "user", "content": "a"}, reply]).messages[1] == reply


@pytest.mark.parametrize("line,reason", [
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
    raw, rng = compressed(3000), random.Random(0)
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


def test_missing_empty_and_foreign_paths_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, write(tmp_path / "rows.csv", b"a,b")):
        with pytest.raises(DataError) as error:
            list(formats.read([path]))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_line_beyond_the_limit_is_skipped_whole(tmp_path):
    file = write(tmp_path / "rows.jsonl", b'{"text": "' + b"a" * 100 + b'"}', b'{"text": "b"}')
    bad, good = formats.read([file], max_row_bytes=32)
    assert "data.max_row_bytes=32" in bad.reason
    assert (bad.line, good.text, good.where) == (1, "b", f"{file}:2")


def test_content_tells_documents_apart_wherever_they_stand():
    first, second = (formats.parse(b'{"text": "a"}', f"file:{line}") for line in (1, 2))
    assert first.content() == second.content() != parse(prompt="a", completion="a").content()
