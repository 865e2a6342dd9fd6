"""Mistakes of a first day: each ends in one line that says what to do, with the exit code of its
kind.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lljax.cli.main import main

ROOT = Path(__file__).parents[1]
TRAIN = ("train", "--config=configs/quickstart.py", "--workdir={tmp}/run")
DATA = "--config.data.train=('{tmp}/rows.jsonl',)"
MISTAKES = {  # name: (command, exit code, what the line says)
    "no config": (("train", "--workdir={tmp}/run"), 2, "--config"),
    "a misspelled config": (
        ("train", "--config=configs/quikstart.py", "--workdir={tmp}/run"),
        2,
        "quickstart.py",
    ),
    "from_yaml without a file": (
        ("train", "--config=configs/from_yaml.py", "--workdir={tmp}/run"),
        2,
        "from_yaml.py:",
    ),
    "a YAML file that is not there": (
        ("train", "--config=run.yaml", "--workdir={tmp}/run"),
        2,
        "run.yaml",
    ),
    "no workdir": (("train", "--config=configs/quickstart.py"), 2, "--workdir"),
    "lr": ((*TRAIN, "--config.optimizer.lr=1e-4"), 2, "learning_rate"),
    "batch_size": ((*TRAIN, "--config.training.batch_size=4"), 2, "rows"),
    "a number where a word belongs": ((*TRAIN, "--config.lora.rank=eight"), 2, "rank"),
    "an optimizer's other name": ((*TRAIN, DATA, "--config.optimizer.name=adam"), 2, "adamw"),
    "a missing data file": (
        (*TRAIN, "--config.data.train=('{tmp}/none.jsonl',)"),
        3,
        "prepare_data.py|lljax data",
    ),
    "no such model": ((*TRAIN, DATA, "--config.model.path={tmp}/none"), 2, "model.path"),
    "a target no layer has": (
        (*TRAIN, DATA, "--config.data.valid_fraction=0.0", "--config.lora.targets=('qproj',)"),
        2,
        "q_proj",
    ),
    "rank 0": ((*TRAIN, DATA, "--config.lora.rank=0"), 2, "lora.rank"),
    "a stage beyond the context": (
        (*TRAIN, DATA, "--config.context.schedule=((9,8192,'full'),)"),
        2,
        "context.length",
    ),
    "more devices than there are": (
        (*TRAIN, DATA, "--config.mesh.sequence=4", "--config.mesh.fsdp=1"),
        2,
        "mesh",
    ),
    "warm-up as long as the run": (
        (*TRAIN, DATA, "--config.optimizer.warmup_steps=240"),
        2,
        "warmup_steps",
    ),
    "plan for a GPU by its brand": (
        ("plan", "--config=configs/quickstart.py", "--device=h100"),
        2,
        "h100-80g",
    ),
    "export before training": (("export", "--workdir={tmp}/run"), 2, "no run was started"),
    "generate before training": (
        ("generate", "--workdir={tmp}/run", "--prompt=hi"),
        2,
        "no run was started",
    ),
    "evaluate a base without --out": (("evaluate", "--model=lljax/assets/tiny-512"), 2, "--out"),
    "a misspelled task": (
        ("evaluate", "--model=lljax/assets/tiny-512", "--out={tmp}/out", "--tasks=pasky"),
        2,
        "passkey",
    ),
    "a folder without text": (
        ("data", "folder", "{tmp}/empty", "--out={tmp}/x.jsonl"),
        3,
        "no text file",
    ),
    "a conversation without a reply": (
        ("data", "validate", "{tmp}/asked.jsonl"),
        3,
        "assistant",
    ),
    "preference pairs for fine-tuning": (
        ("data", "validate", "{tmp}/pairs.jsonl"),
        3,
        "chosen",
    ),
}


# These get as far as the training process, which ends itself.
IN_TRAINING = {
    "an optimizer's other name",
    "a missing data file",
    "no such model",
    "a target no layer has",
    "rank 0",
    "a stage beyond the context",
    "more devices than there are",
    "warm-up as long as the run",
}


@pytest.fixture
def command(request, tmp_path):
    """The arguments of a mistake, its exit code and its hint; with the files that they name."""
    user = [{"role": "user", "content": "hi"}]
    for name, row in (
        ("rows", {"text": "some text " * 20}),
        ("asked", {"messages": user}),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "empty").mkdir()
    arguments, code, hint = MISTAKES[request.param]
    return [part.format(tmp=tmp_path) for part in arguments], code, hint


def check(code: int, out: str, error: str, expected: int, hint: str) -> None:
    last = (out + error).strip().splitlines()[-1]
    assert (code, "Traceback" in error) == (expected, False), error[-1500:]
    assert re.search(hint, error + out), last
    assert len(last) < 600, last


@pytest.mark.parametrize("command", sorted(MISTAKES.keys() - IN_TRAINING), indirect=True)
def test_a_beginners_mistake_is_one_line_that_helps(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments, code, hint = command
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    check(ended.value.code, *capsys.readouterr(), code, hint)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(IN_TRAINING), indirect=True)
def test_a_mistake_that_training_finds_is_one_line_too(command):
    arguments, code, hint = command
    done = subprocess.run(
        [sys.executable, "-c", "from lljax.cli.main import run; run()", *arguments],
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
    )
    check(done.returncode, done.stdout, done.stderr, code, hint)
