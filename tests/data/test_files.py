import threading

import pytest

from lljax.data.files import atomic_write
from lljax.errors import first_line, printable


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, failed = tmp_path / "report.html", []

    def write(letter):
        try:
            for _ in range(50):
                atomic_write(path, letter * 1000)
                assert path.read_text() in {each * 1000 for each in "abcd"}
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


def test_terminal_codes_and_line_breaks_are_shown_escaped():
    assert printable("a\x1b[31m\nb\ud800é") == "a\\x1b[31m\\nb\\ud800é"
    assert first_line(ValueError("\n  two\x07 words\nmore")) == "two\\x07 words"
    assert first_line(ValueError()) == "ValueError"
