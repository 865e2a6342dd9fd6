"""Files are written whole, and a damaged side product counts as none."""

import threading

import pytest

from lljax.data.files import atomic_write, read_object


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, failed = tmp_path / "report.html", []

    def write(letter):
        try:
            for _ in range(50):
                atomic_write(path, letter * 1000)
                assert path.read_text() in {c * 1000 for c in "abcd"}
        except Exception as error:  # a thread's exception is lost otherwise
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [child.name for child in tmp_path.iterdir()] == ["report.html"]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"a": "' + b"x" * 99 + b'"}'])
def test_a_damaged_side_product_is_logged_and_counts_as_none(tmp_path, caplog, content):
    path = tmp_path / "x.json"
    assert read_object(path) == {} and read_object(tmp_path) == {} and not caplog.text
    path.write_bytes(content)
    assert read_object(path, max_bytes=50) == {} and f"{path} is skipped: " in caplog.text
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
