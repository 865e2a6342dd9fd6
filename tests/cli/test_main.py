"""The table of commands: a row is all that a command takes."""

import importlib
import os
import subprocess
import sys
import types
from importlib.metadata import version
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


@pytest.mark.parametrize(
    "argv,message",
    [
        (["export"], "lljax export: one of the arguments --workdir --model is required; see"),
        (["export", "--workdir=x", "--formt=y"], "unrecognized arguments: --formt=y; see"),
        (["export", "--workdir=x", "--step=x"], "--step: 'x' is not a whole number; see"),
        (["evaluate"], "one of the arguments --workdir --model is required"),
        (["generate", "--model=x", "--top_p=y"], "--top_p: 'y' is not a number"),
        (["generate", "--model=x", "--cache=y"], "--cache: invalid choice: 'y'"),
        (
            ["data", "stats", "x", "--model=y", "--length=foo"],
            "lljax data stats: --length: 'foo' is",
        ),
        (["data", "stats", "x", "--model=y", "--length=\n"], "is not a whole number above 0"),
        (["data"], "required: command; see lljax data --help"),
        (["config", "x"], "lljax config: unrecognized arguments: x"),
        (["report"], "lljax report: the following arguments are required: --workdir"),
    ],
)
def test_a_wrong_flag_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: lljax ") and message in error and error.count("\n") == 1
    assert error.endswith("--help\n")


def test_the_module_runs_the_command_and_the_version_is_printed():
    for argv, shown in (["--version"], f"lljax {version('lljax')}\n"), ([], cli.usage() + "\n"):
        ran = subprocess.run(
            [sys.executable, "-m", "lljax", *argv], cwd=ROOT, capture_output=True, text=True
        )
        assert (ran.returncode, ran.stdout) == (0, shown)


@pytest.mark.parametrize("argv,code", [(["--help"], 0), ([], 2), (["begin"], 2), (["x", "y"], 2)])
def test_make_tiny_base_explains_its_arguments(argv, code):
    ran = subprocess.run(
        [sys.executable, "scripts/make_tiny_base.py", *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code and "Traceback" not in ran.stderr
    assert "usage: make_tiny_base.py" in ran.stdout + ran.stderr


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_a_script_is_a_command_of_the_table(script):
    if script == "make_tiny_base":
        pytest.skip("a tool of the repository, not a command")
    source = (ROOT / "scripts" / f"{script}.py").read_text()
    (name,) = [name for name in COMMANDS if f'run("{name}", *sys.argv[1:])' in source]
    assert f"`lljax {name}`" in source
