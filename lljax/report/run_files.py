"""The files of a run, or of an evaluation, that the report reads."""

from dataclasses import dataclass
from pathlib import Path

from lljax.data.files import read_object
from lljax.errors import ConfigError
from lljax.report.records import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """The contents of `workdir`; {} for a file that is missing or damaged.

    run: facts of run.json; among them "metrics", {name of a metric: its title}, "base_length", the
      tokens the base model was made for, and "chat_template", whether the base has one.
    steps and evaluations: records of metrics.jsonl.
    started: training has begun here; otherwise the folder holds an evaluation alone.
    """

    workdir: Path
    started: bool
    config: dict
    run: dict
    profile: dict
    statistics: dict
    evaluation: dict
    steps: list[dict]
    evaluations: list[dict]

    @property
    def model(self) -> str:
        model = self.config.get("model")
        return str(model.get("path", "")) if isinstance(model, dict) else ""

    @property
    def context(self) -> dict:
        context = self.config.get("context")
        return context if isinstance(context, dict) else {}


def read_run(workdir: Path) -> RunFiles:
    """Raises:
    ConfigError: no run was started in `workdir`, and nothing was evaluated there.
    """
    started = any((workdir / name).is_file() for name in ("config.json", "metrics.jsonl"))
    if not started and not (workdir / "evaluation.json").is_file():
        raise ConfigError(
            f"--workdir={workdir}: no run was started there (neither config.json nor metrics.jsonl)"
        )
    records = read_metrics(workdir)
    return RunFiles(
        workdir=workdir,
        started=started,
        config=read_object(workdir / "config.json"),
        run=read_object(workdir / "run.json"),
        profile=read_object(workdir / "profile.json"),
        statistics=read_object(workdir / "data_statistics.json"),
        evaluation=read_object(workdir / "evaluation.json"),
        steps=[record for record in records if "eval" not in record],
        evaluations=[record for record in records if isinstance(record.get("eval"), dict)],
    )
