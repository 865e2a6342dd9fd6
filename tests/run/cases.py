"""Helpers that several tests of runs share."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lljax.config import default_config
from lljax.models import lora
from lljax.report.records import read_metrics
from lljax.run.observer import Observer, RunInfo

TIMES = (
    *("seconds", "tokens_per_second", "data_seconds"),
    *("rollout/seconds", "rollout/tokens_per_second"),
)
REWARD = """
def letters(prompts, completions, completion_ids, **columns):
    return [len(set(text) & set("aeiou")) / 5 for text in completions]


def same(completions, **columns):
    return [1.0] * len(completions)


def broken(completions, **columns):
    raise ValueError("no answer is good enough")
"""


def write_answers(folder: Path) -> None:
    """Files of pairs, judged answers and prompts, about 40 rows each, and of reward functions."""
    rng = np.random.default_rng(0)
    words = ["def", "add", "first", "second", "return", "the", "sum", "of", "both", "class"]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(least, most)))

    rows = {"pairs": [], "judged": [], "prompts": []}
    for number in range(40):
        prompt, good, bad = text(3, 10), text(1, 4), text(1, 4)
        if good != bad:
            rows["pairs"].append({"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"})
        rows["judged"].append({"prompt": prompt, "completion": f" {good}", "label": number % 3 > 0})
        wanted = {} if number == 5 else {"answers": [good.split()[0]]}
        rows["prompts"].append({"prompt": prompt} | wanted)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "reward.py").write_text(REWARD)


def records(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl without the values that depend on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(workdir)]


def last_step(workdir: Path) -> int:
    return max((record["step"] for record in read_metrics(workdir)), default=0)


def steps_saved(workdir: Path) -> list[int]:
    """The steps with a checkpoint."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*[0-9]"))


def wait_for_step(workdir: Path, step: int, alive, since: float = 0.0) -> None:
    """Waits until a process has recorded `step` after the time `since`, or is not alive()."""
    path = workdir / "metrics.jsonl"
    while alive():
        if path.exists() and path.stat().st_mtime > since and last_step(workdir) >= step:
            return
        time.sleep(0.005)


def bits(tree) -> list[bytes]:
    """The bytes of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def trained_leaves(model: nnx.Module) -> list[jax.Array]:
    return jax.tree.leaves(nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1]))


class StopAfter(Observer):
    """Sends SIGTERM to its own process as soon as `step` is recorded."""

    def __init__(self, step: int):
        self._at = step

    def step(self, record: dict) -> None:
        if record["step"] == self._at:
            os.kill(os.getpid(), signal.SIGTERM)


class Heard(Observer):
    """Keeps every event that it hears of."""

    def __init__(self, every: int = 1):
        self.every, self.events = every, []

    def open(self, run: RunInfo) -> None:
        self.events.append(("open", run.step))

    def step(self, record: dict) -> None:
        self.events.append(("step", record["step"]))

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self.events.append(("evaluation", step))

    def checkpoint(self, step: int) -> None:
        self.events.append(("checkpoint", step))

    def heartbeat(self, step: int) -> None:
        self.events.append(("heartbeat", step))

    def close(self, error: BaseException | None) -> None:
        self.events.append(("close", type(error).__name__))

    def of(self, *names: str) -> list[tuple[str, int]]:
        return [event for event in self.events if event[0] in names]


def run_info(workdir: Path, *, step: int = 0, total: int = 10, **changes) -> RunInfo:
    """A run of one stage with `total` steps."""
    return RunInfo(
        **{
            "workdir": workdir,
            "config": default_config(),
            "step": step,
            "stages": ((total, 1.0),),
            "last_checkpoint": lambda: None,
            "profile_steps": None,
        }
        | changes
    )


def limit_file_size(size: int) -> int:
    """Makes writes beyond `size` bytes of a file fail, which stands for a full disk; returns the
    limit before.
    """
    import resource

    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    return before
