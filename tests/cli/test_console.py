import io

from rich.table import Table

from lljax.cli.console import console

LONG = "a cell wider than eighty columns, which rich takes for the width of a pipe, " * 2


def test_a_table_in_a_pipe_is_whole_and_columns_bound_it(capsys, monkeypatch):
    table = Table("name", "value")
    table.add_row(LONG.strip(), "1,234")
    monkeypatch.delenv("COLUMNS", raising=False)
    console().print(table)
    shown = capsys.readouterr().out
    assert LONG.strip() in shown and "1,234" in shown and max(map(len, shown.splitlines())) < 300
    monkeypatch.setenv("COLUMNS", "60")
    console(stderr=True).print(table)
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 60


def test_a_pipe_that_takes_ascii_alone_is_written_to(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", out)
    console().print("– é", highlight=False)
    out.flush()
    assert b"\\u2013 \\xe9" in out.buffer.getvalue()
