"""An observer watches a run: it hears of every step, evaluation and checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lljax.config import Config


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The facts that an observer gets when a run begins or resumes.

    step: optimizer steps done before. stages: (last step, FLOPs of a step) of every stage of the
      schedule. last_checkpoint() -> the step of the newest checkpoint on disk, or None.
      profile_steps: steps to trace, see lljax.run.profile.
    """

    workdir: Path
    config: Config
    step: int
    stages: tuple[tuple[int, float], ...]
    last_checkpoint: Callable[[], int | None]
    profile_steps: range | None = None


class Observer:
    """The base class of observers; a subclass overrides the methods that it needs.

    Every process of a run calls its own observers: write files in one of them only, the process
    whose `lljax.parallel.processes.is_first()` is true.

    An exception in an observer that was passed to `train` is a request to stop: after the current
    step, batch or rollback the run saves its state, closes its observers and raises the exception.
    The observer hears of nothing more except `close`. KeyboardInterrupt and the like pass at once.

    every: steps from one call of `step` to the next; 0: never. The other methods do not count it.
    """

    every: int = 1

    def open(self, run: RunInfo) -> None:
        """Called once, before the first step. An exception here ends the run at once."""

    def begin(self, step: int) -> None:
        """Step number `step`, counted from 1, is about to be computed."""

    def step(self, record: dict) -> None:
        """A step is done; `record` becomes a line of metrics.jsonl: step, stage, length, attention,
        loss, grad_norm, learning_rate, seconds, tokens_per_second ...

        The metrics of the objective and their meaning are in lljax.objectives.
        data_seconds: time that the device waited for the next batch, otherwise 0.
        mfu: model FLOPs per second over the peak of the devices, if their peak is known.
        rollbacks: in the first step after a rollback, every rollback to the step before it.
        """

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The model after `step` was evaluated; `values`: for example {"loss@4096": 2.1}."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint of `step` was handed to the background thread that writes it."""

    def rollback(self, step: int) -> None:
        """The run went back to the checkpoint of `step`: later records are void."""

    def heartbeat(self, step: int) -> None:
        """Something was finished after `step` steps: a step, a held-out batch, an evaluation
        example or a save.
        """

    def say(self, text: str) -> None:
        """A line for the person who watches."""

    def close(self, error: BaseException | None) -> None:
        """The run ends. error: the exception that ends it; None if it is done.

        Called in the reverse of the order of `open`. An exception here is logged.
        """
