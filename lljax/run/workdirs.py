"""The folder of a run: which files it holds, and the small ones that are written once."""

import json
from pathlib import Path

from lljax.data.files import atomic_write
from lljax.errors import ConfigError
from lljax.parallel.processes import from_all, is_first
from lljax.report.records import read_metrics

FOLDERS = ("checkpoints", "data", "profile", "reference", "rollouts", "tensorboard")
FILES = (
    "lock",
    "config.json",
    "run.json",
    "data_statistics.json",
    "metrics.jsonl",
    "bad_rows.jsonl",
    "eval_predictions.jsonl",
    "rollouts.jsonl",
    "report.html",
)


def make(workdir: Path) -> None:
    """Raises ConfigError if the folder cannot be made."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"--workdir={workdir}: it cannot be made ({reason}): name another folder"
        ) from None


def check_kinds(workdir: Path) -> None:
    """Raises ConfigError if there is a file in the place of a folder of a run, or the reverse."""
    for names, is_kind, kind in ((FOLDERS, Path.is_dir, "folder"), (FILES, Path.is_file, "file")):
        for path in (workdir / name for name in names):
            if path.exists() and not is_kind(path):
                raise ConfigError(
                    f"--workdir={workdir}: {path.name} is there and is no {kind}, which a run "
                    "needs: move it away, or name another folder"
                )


def check_shared(workdir: Path) -> None:
    """Raises ConfigError if a process does not see the files of the first one."""
    if not all(from_all((workdir / "lock").is_file())):
        raise ConfigError(
            f"--workdir={workdir}: not every process sees the files of the first one: name a "
            "folder on a file system that they share"
        )


def write_json(path: Path, content: dict) -> None:
    """Written by the first process."""
    if is_first():
        atomic_write(path, json.dumps(content, indent=2))


def is_evaluated(workdir: Path, step: int) -> bool:
    """Whether metrics.jsonl holds an evaluation after `step`, by the first process."""
    return from_all(
        any(record["step"] == step and "eval" in record for record in read_metrics(workdir))
    )[0]
