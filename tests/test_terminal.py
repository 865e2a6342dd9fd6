"""Tables in files and pipes."""

from rich.table import Table

from lljax.terminal import console


def test_a_table_in_a_pipe_is_not_cut(capsys):
    table = Table(*(f"column {i} of a wide table" for i in range(12)))
    table.add_row(*("x" * 20 for _ in range(12)))
    console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert all(f"column {i} of a wide table" in lines[1] for i in range(12)) and len(lines) == 5
