"""Traces a few steps of a run and says where their seconds went."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import jax
from jax.profiler import ProfileOptions, StepTraceAnnotation, TraceAnnotation

from lljax.errors import ConfigError
from lljax.parallel.processes import is_first
from lljax.report.breakdown import DATA, STEP, breakdown
from lljax.run.observer import Observer, RunInfo


def read_steps(text: str | None) -> range | None:
    """The steps of `--profile_steps=first:stop`, without the stop, as metrics.jsonl numbers them.

    Raises:
      ConfigError: it is not first:stop with 1 <= first < stop.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise ConfigError(
            f"--profile_steps={text}: give the first step and the one after the last, such as 20:23"
        )
    return range(int(match[1]), int(match[2]))


class Tracer(Observer):
    """Writes a trace of `profile_steps` into `workdir`/profile and its breakdown into
    `workdir`/profile.json.

    Of several processes the first one traces. A run that ends among the steps closes its trace.
    """

    def open(self, run: RunInfo) -> None:
        steps = run.profile_steps
        if steps and steps[-1] <= run.step:
            logging.warning(
                "--profile_steps=%d:%d: nothing to trace, step %d was taken before",
                steps.start,
                steps.stop,
                run.step,
            )
        self._folder = Path(run.workdir) / "profile"
        self._steps = steps if steps and is_first() else range(0)
        self._tracing = False

    def begin(self, step: int) -> None:
        if step in self._steps and not self._tracing:
            options = ProfileOptions()
            # Python's tracer slows the host down, and the run sets marks of its own.
            options.python_tracer_level = 0
            self._before = self._traces()
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True

    def step(self, record: dict) -> None:
        if self._tracing and record["step"] == self._steps[-1]:
            self._stop()

    def close(self, error: BaseException | None) -> None:
        if self._tracing:
            self._stop()

    def _traces(self) -> set[tuple[Path, int]]:
        """The traces in the folder, by name and time: after a clock was put back, a new trace may
        have the name of an earlier one.
        """
        return {(path, path.stat().st_mtime_ns) for path in self._folder.rglob("*.xplane.pb")}

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        new = [path for path, _ in self._traces() - self._before]
        parts = breakdown(new[0]) if new else None
        logging.info(
            "trace of steps %d to %d: tensorboard --logdir %s",
            self._steps[0],
            self._steps[-1],
            self._folder,
        )
        if parts is None:
            logging.warning("the trace holds no whole step")
            return
        logging.info(
            "a step of %.3f s: %s",
            parts.seconds,
            ", ".join(
                f"{name} {seconds / parts.seconds:.1%}" for name, seconds in parts.parts().items()
            ),
        )
        (self._folder.parent / "profile.json").write_text(
            json.dumps(dataclasses.asdict(parts), indent=2)
        )


def mark_step(step: int) -> StepTraceAnnotation:
    """Trace annotation around a step."""
    return StepTraceAnnotation(STEP, step_num=step)


def mark_data() -> TraceAnnotation:
    """Trace annotation around reading a batch."""
    return TraceAnnotation(DATA)
