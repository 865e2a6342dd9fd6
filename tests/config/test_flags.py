"""What a command line says, and the one line about what is wrong with it."""

import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from lljax.config import FIELDS
from lljax.config.flags import config_flag, load_config, read_flags
from lljax.errors import ConfigError

ROOT = Path(__file__).parents[2]
QUICKSTART = "--config=configs/quickstart.py"
BEGIN = "from lljax.config import default_config\ndef get_config():\n    c = default_config()\n"


def train(*arguments, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_help_lists_flags_fields_and_examples():
    code, text = train("--help")
    assert code == 0 and train("-h") == (0, text)
    assert text.count("\nlljax train --config=") == 3
    assert all(f"  --{flag} " in text for flag in ("config", "workdir", "profile_steps"))
    for field in FIELDS:
        line = next(line for line in text.splitlines() if line.startswith(f"  {field} = "))
        assert len(line.split(" = ")[1].split("  ")[-1]) > 4, line  # what it is for


def test_help_into_a_pipe_that_closes_is_no_error():
    done = subprocess.run(
        f"{sys.executable} scripts/train.py --help | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        cwd=ROOT,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "name,message",
    [
        ("configs/quikstart.py", "no such file: did you mean 'configs/quickstart.py'"),
        ("quikstart", "did you mean 'configs/quickstart.py'"),
        ("run.yaml", "--config=run.yaml: there is no such file"),
        ("configs/from_yaml.py", "name the YAML file, such as --config=run.yaml"),
        ("configs/from_yaml.py:no.yaml", "no.yaml: No such file"),
        ("configs/quickstart.py:mine", "takes 0 positional arguments"),
        ("README.md", "Python .* or YAML"),
        ("", "no such file"),
        ("a" * 5000, "no such file"),
    ],
)
def test_a_config_file_that_is_not_there_is_one_line(monkeypatch, name, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source,message",
    [
        ("def get_config():\n    return 1 / 0\n", ":2: ZeroDivisionError"),
        ("def get_config(:\n", ":1: SyntaxError"),
        ("x = 1\n", "has no get_config"),
        (
            "def get_config():\n    return {'seed': 1}\n",
            "returned {'seed': 1}: return the configuration",
        ),
        ("import nowhere\n", ":1: ModuleNotFoundError: No module named 'nowhere'"),
        (
            f"{BEGIN}    c.lora.rnak = 3\n    return c\n",
            ":4: there is no config field 'lora.rnak': did you mean 'lora.rank'",
        ),
        (f"{BEGIN}    c.lora.rank = 'x'\n    return c\n", ":4: TypeError: .*rank"),
    ],
)
def test_a_config_file_that_fails_says_its_line(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(tmp_path / "mine.py"))
    assert str(caught.value).isprintable()


def test_a_config_file_imports_what_is_beside_it(tmp_path):
    (tmp_path / "mine.py").write_text("from other_of_mine import get_config\n")
    (tmp_path / "other_of_mine.py").write_text(
        "from lljax.config import default_config as get_config\n"
    )
    before = list(sys.path)
    assert load_config(str(tmp_path / "mine.py")).lora.rank == 8 and sys.path == before


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([QUICKSTART, "--config.optimizer.lr=3"], "did you mean 'optimizer.learning_rate'"),
        ([QUICKSTART, "--config.lora.rank=2.0"], "--config.lora.rank=2.0 is not a whole number"),
        (
            [QUICKSTART, "--config.lora.rank=" + "9" * 10_000],
            "--config.lora.rank=.* is not a whole number",
        ),
        ([QUICKSTART, "--config.memory.refuse=maybe"], "is not True or False"),
        (
            [QUICKSTART, "--config.context.schedule=((10,64,'full')"],
            "--config.context.schedule=.* is not a tuple",
        ),
        ([QUICKSTART, "--config.optimizer.learning_rate=1e"], "learning_rate='1e' is not a number"),
        (
            [QUICKSTART, "--config.lora={'rank': 3}"],
            "lora is a group of fields.* such as lora.rank",
        ),
        (
            [QUICKSTART, "--config.data.train=docs.jsonl", "--config.lora.rank", "4", "--wrkdir=x"],
            "no flag '--wrkdir': see lljax train --help",
        ),
        ([QUICKSTART, "--config.lora.rank"], "lora.rank"),
        (
            ["configs/quickstart.py"],
            "belongs to no flag: did you mean --config=configs/quickstart.py",
        ),
        ([QUICKSTART, "--wrkdir=x"], "wrkdir"),
        ([QUICKSTART, "--lora.rank=8"], "no flag '--lora.rank': did you mean --config.lora.rank"),
        ([QUICKSTART, "--lr=8"], "did you mean --config.optimizer.learning_rate"),
        ([QUICKSTART, "--verbose"], "no flag '--verbose': see lljax train --help"),
    ],
)
def test_a_wrong_argument_is_one_line(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    values, argv = flags.FlagValues(), ["lljax train", *arguments]
    config_flag(values, argv)
    with pytest.raises(ConfigError, match=message) as caught:
        read_flags(values, argv, "", "config")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_two_commands_of_one_process_define_the_same_flag(monkeypatch):
    monkeypatch.chdir(ROOT)
    ranks = []
    for rank in (3, 5):
        values, argv = flags.FlagValues(), ["lljax", QUICKSTART, f"--config.lora.rank={rank}"]
        config_flag(values, argv)
        read_flags(values, argv, "", "config")
        ranks.append(values.config.lora.rank)
    assert ranks == [3, 5]
