"""`lljax train`: flags are checked first, and a finished run says what comes next."""

import pytest
from ml_collections import ConfigDict

from lljax.cli.train import main, next_commands


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--config=quickstart"], "--workdir is missing"),
        (["--workdir=runs/x"], "--config is missing"),
        (["--config=quickstart", "--workdir=x", "--config.lora.rank=0"], "lora.rank"),
        (["--config=quickstart", "--workdir=x", "--search=context"], "search"),
        (["--config=quickstart", "--wrkdir=x"], "no flag '--wrkdir': did you mean --workdir?"),
    ],
)
def test_a_wrong_command_line_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_next_commands_are_of_the_installed_command_and_quote_the_folder():
    lines = next_commands("a run", ConfigDict({"valid": (), "valid_fraction": 0.1})).splitlines()
    assert "'a run/report.html'" in lines[0]
    assert lines[1].startswith("lljax export --workdir='a run' --format=peft")
    assert lines[2] == "lljax evaluate --workdir='a run' --tasks=perplexity,passkey"
    assert lines[3].startswith("lljax generate --workdir='a run' --prompt=")
    without = ConfigDict({"valid": (), "valid_fraction": 0.0})
    assert "--tasks=passkey" in next_commands("run", without)
