"""The table of commands: a row is all that a command takes."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lljax.cli import main as cli
from lljax.cli.main import COMMANDS, Command, main, run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(argv, capsys):
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, command.help] for line in lines)


@pytest.mark.parametrize(
    "name,hint",
    [
        ("tran", "did you mean 'train'?"),
        ("reprot", "did you mean 'report'?"),
        ("xyz", "there are train,"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(name, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([name])
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: ") and hint in error and error.count("\n") == 1


def test_a_row_is_all_that_a_command_takes(monkeypatch, capsys):
    toy, called = types.ModuleType("toy_command"), []
    toy.main = called.append
    monkeypatch.setitem(sys.modules, "toy_command", toy)
    monkeypatch.setitem(
        COMMANDS,
        "toy",
        Command(module="toy_command", help="a toy", setup=lambda: called.append("before")),
    )
    main(["toy", "--flag"])
    run("toy", "--other")
    assert called == [["--flag"], "before", ["--other"]]
    assert "toy" in cli.usage()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_the_examples_of_the_command(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    assert f"\nlljax {name} " in capsys.readouterr().out
    assert f"\nlljax {name} " in (importlib.import_module(COMMANDS[name].module).__doc__ or "")


def test_help_starts_no_jax():
    code = """if True:
        import sys
        from lljax.cli.main import COMMANDS, main
        for name in COMMANDS:
            try:
                main([name, "--help"])
            except SystemExit:
                pass
        assert "jax" not in sys.modules and "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_a_script_is_a_command_of_the_table(script):
    if script == "make_tiny_base":
        pytest.skip("a tool of the repository, not a command")
    source = (ROOT / "scripts" / f"{script}.py").read_text()
    (name,) = [name for name in COMMANDS if f'run("{name}", *sys.argv[1:])' in source]
    assert f"`lljax {name}`" in source
