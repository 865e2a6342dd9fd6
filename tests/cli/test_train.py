"""`lljax train`: flags are checked first, and a finished run says what comes next."""

import pytest

from lljax.cli.train import main, next_commands
from lljax.config import default_config


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
    config = default_config()
    config.data.valid_fraction = 0.1
    lines = next_commands("a run", config).splitlines()
    assert "'a run/report.html'" in lines[0]
    others = "merged, split, w4a16, w8a16, fp8, gguf, gguf_lora"
    assert lines[1] == f"lljax export --workdir='a run' --format=peft     # or {others}"
    assert lines[2] == "lljax evaluate --workdir='a run' --tasks=perplexity,passkey"
    assert lines[3].startswith("lljax generate --workdir='a run' --prompt=")
    config.data.valid_fraction, config.train_type = 0.0, "full"
    lines = next_commands("run", config).splitlines()
    others = "w4a16, w8a16, fp8, gguf"
    assert lines[1] == f"lljax export --workdir=run --format=merged     # or {others}"
    assert lines[2] == "lljax evaluate --workdir=run --tasks=passkey"
