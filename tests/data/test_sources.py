import gzip
import json
import random

import pytest

from lljax.data import formats, sources
from lljax.data.formats import BadRow
from lljax.errors import DataError


def write(path, *lines: bytes):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


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
        file.write_bytes(raw[:at] + rng.randbytes(8) + raw[at + 8 :])
        with pytest.raises(DataError, match="rows.jsonl.gz: .*fetch or write it again"):
            list(formats.read([file]))


def test_a_gz_that_is_cut_off_is_refused(tmp_path):
    raw = compressed(3000)
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="rows.jsonl.gz: the file is cut off"):
        list(formats.read([file]))


def test_a_folder_named_as_a_file_of_rows_is_not_read_as_one(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    write(tmp_path / "x.jsonl" / "a.jsonl", b'{"text": "ok"}')
    assert [document.text for document in formats.read([tmp_path])] == ["ok"]


@pytest.mark.parametrize(
    "name,advice",
    [
        ("none.jsonl", "no such file; `lljax data folder`"),
        (".", "holds no .jsonl"),
        ("rows.csv", "load_dataset"),
        ("rows.txt", "`lljax data folder` makes one"),
        ("\x1b[31m\nINFO.jsonl", "x1b.31m.nINFO.jsonl: there is no"),
        ("x" * 5000, "too long"),
    ],
)
def test_paths_that_hold_no_rows_are_refused_with_field_and_advice(tmp_path, name, advice):
    for other in ("rows.csv", "rows.txt"):
        write(tmp_path / other, b"a,b")
    with pytest.raises(DataError, match=advice) as error:
        sources.files([tmp_path / name], field="data.valid")
    said = str(error.value)
    assert said.startswith(f"data.valid: {tmp_path}") and said.isprintable() and len(said) < 300


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
    expected = sources.sha256(file)
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


# ---------------------------------------------------------------- arrays
ROWS = [
    {"text": 'a\u2028] "}, {'},
    {"text": "é" * 30},
    {"query": "q", "response": "[]"},
    {"text": 3},
    {"text": "end"},
]


@pytest.mark.parametrize(
    "indent,chunk,name",
    [(None, 1 << 20, "rows.json"), (1, 7, "rows.json"), (None, 3, "rows.json.gz")],
)
def test_an_array_of_rows_reads_as_the_rows_one_a_line(tmp_path, monkeypatch, indent, chunk, name):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    lines = write(tmp_path / "rows.jsonl", *(json.dumps(row).encode() for row in ROWS))
    content = (
        b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n"
    )
    array = tmp_path / name
    array.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

    def found(file):
        return [
            (row.line, row.reason)
            if isinstance(row, BadRow)
            else (row.where.rpartition(":")[2], row.content())
            for row in formats.read([file])
        ]

    assert found(array) == found(lines) and len(found(array)) == len(ROWS)
    (tmp_path / "lines.json").write_bytes(lines.read_bytes())
    assert found(tmp_path / "lines.json") == found(lines)


@pytest.mark.parametrize(
    "content,reason",
    [
        (b'[{"text": "a"}, {"text": "b"', "row 2 is not JSON .*cut off"),
        (b'[{"text": "a"}, ', "row 2 is not JSON"),
        (b'[{"text": "a"} {"text": "b"}]', "does not go on after row 1"),
        (b'[{"text": "a"}', "does not go on after row 1"),
        (b'[{"text": "a"}] [1]', "something follows the array of 1 row"),
        (b'[{"text": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "row 1 is nested too deeply"),
        (b'[{"text": "a"}, {"text": "' + b"b" * 3000, "row 2 is longer than"),
    ],
)
def test_an_array_that_is_damaged_is_refused_whole(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(sources, "CHUNK", 100)
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=f"rows.json: .*{reason}"):
        list(formats.read([tmp_path / "rows.json"], max_row_bytes=1000))


def test_a_row_beyond_the_limit_is_a_bad_row_of_an_array_too(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a" * 100}, {"text": "b"}]))
    bad, good = formats.read([tmp_path / "rows.json"], max_row_bytes=50)
    assert bad.line == 1 and "data.max_row_bytes=50" in bad.reason and good.text == "b"
