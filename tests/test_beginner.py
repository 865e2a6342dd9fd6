"""Mistakes of a first day: each ends in one line that says what to do, and with the exit code of
its kind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TRAIN = ("train.py", "--config=configs/quickstart.py", "--workdir={tmp}/run")
DATA = "--config.data.train=('{tmp}/rows.jsonl',)"
MISTAKES = {  # name: (command, exit code, what the line says)
    "no config": (("train.py", "--workdir={tmp}/run"), 2, "--config"),
    "a misspelled config": (
        ("train.py", "--config=configs/quikstart.py", "--workdir={tmp}/run"),
        2,
        "quickstart.py",
    ),
    "from_yaml without a file": (
        ("train.py", "--config=configs/from_yaml.py", "--workdir={tmp}/run"),
        2,
        "from_yaml.py:",
    ),
    "a YAML file that is not there": (
        ("train.py", "--config=run.yaml", "--workdir={tmp}/run"),
        2,
        "run.yaml",
    ),
    "no workdir": (("train.py", "--config=configs/quickstart.py"), 2, "--workdir"),
    "lr": ((*TRAIN, "--config.optimizer.lr=1e-4"), 2, "learning_rate"),
    "batch_size": ((*TRAIN, "--config.training.batch_size=4"), 2, "rows"),
    "a number where a word belongs": ((*TRAIN, "--config.lora.rank=eight"), 2, "rank"),
    "an optimizer's other name": ((*TRAIN, DATA, "--config.optimizer.name=adam"), 2, "adamw"),
    "a missing data file": (
        (*TRAIN, "--config.data.train=('{tmp}/none.jsonl',)"),
        3,
        "prepare_data.py",
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
        ("plan.py", "--config=configs/quickstart.py", "--device=h100"),
        2,
        "h100-80g",
    ),
    "export before training": (("export.py", "--workdir={tmp}/run"), 2, "no run was started"),
    "generate before training": (
        ("generate.py", "--workdir={tmp}/run", "--prompt=hi"),
        2,
        "no run was started",
    ),
    "evaluate a base without --out": (("evaluate.py", "--model=lljax/assets/tiny-512"), 2, "--out"),
    "a misspelled task": (
        ("evaluate.py", "--model=lljax/assets/tiny-512", "--out={tmp}/out", "--tasks=pasky"),
        2,
        "passkey",
    ),
    "a folder without text": (
        ("prepare_data.py", "folder", "{tmp}/empty", "--out={tmp}/x.jsonl"),
        3,
        "no text file",
    ),
    "a conversation without a reply": (
        ("prepare_data.py", "validate", "{tmp}/asked.jsonl"),
        3,
        "assistant",
    ),
    "preference pairs for fine-tuning": (
        ("prepare_data.py", "validate", "{tmp}/pairs.jsonl"),
        3,
        "chosen",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_beginners_mistake_is_one_line_that_helps(mistake, tmp_path):
    user = [{"role": "user", "content": "hi"}]
    for name, row in (
        ("rows", {"text": "some text " * 20}),
        ("asked", {"messages": user}),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "empty").mkdir()
    command, code, hint = MISTAKES[mistake]
    script, *arguments = (part.format(tmp=tmp_path) for part in command)
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", *arguments],
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
    )
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr[-1500:]
    assert hint in (done.stderr + done.stdout), last
    assert len(last) < 600, last
