"""Where the seconds of a step go: a trace of a few steps, and what it says."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import jax
from jax.profiler import ProfileOptions, StepTraceAnnotation, TraceAnnotation

from lljax.errors import ConfigError
from lljax.parallel.processes import first
from lljax.report.breakdown import DATA, STEP, breakdown


def read_steps(text: str | None) -> range | None:
    """The steps of `--profile_steps=first:stop`, the stop left out, as metrics.jsonl numbers them.

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


class Tracer:
    """Writes a trace of `steps` into `workdir`/profile and what it says into
    `workdir`/profile.json.

    Of several processes the first one does. step: steps that were taken before.
    """

    def __init__(self, workdir: Path, steps: range | None, *, step: int):
        if steps and steps[-1] <= step:
            logging.warning(
                "--profile_steps=%d:%d: nothing to trace, step %d was taken before",
                steps.start,
                steps.stop,
                step,
            )
        self._folder = Path(workdir) / "profile"
        self._steps = steps if steps and first() else range(0)
        self._tracing = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tracing:  # the run ended among the steps
            self._stop()

    def step(self, number: int):
        """A context for a step."""
        if number in self._steps and not self._tracing:
            options = ProfileOptions()
            # it slows the host down, and the loop has its own marks
            options.python_tracer_level = 0
            self._before = self._traces()
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True
        return StepTraceAnnotation(STEP, step_num=number)

    def _traces(self) -> set[tuple[Path, int]]:
        """Those in the folder, told apart by name and time: a clock may have been put back since
        the last.
        """
        return {(path, path.stat().st_mtime_ns) for path in self._folder.rglob("*.xplane.pb")}

    def done(self, number: int) -> None:
        """Ends the trace after its last step."""
        if self._tracing and number == self._steps[-1]:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        new = [path for path, _ in self._traces() - self._before]
        found = breakdown(new[0]) if new else None
        logging.info(
            "trace of steps %d to %d: tensorboard --logdir %s",
            self._steps[0],
            self._steps[-1],
            self._folder,
        )
        if found is None:
            logging.warning("the trace holds no whole step")
            return
        logging.info(
            "a step of %.3f s: %s",
            found.seconds,
            ", ".join(
                f"{name} {seconds / found.seconds:.1%}" for name, seconds in found.parts().items()
            ),
        )
        (self._folder.parent / "profile.json").write_text(
            json.dumps(dataclasses.asdict(found), indent=2)
        )


def waiting_for_data():
    """A context for the reading of a batch."""
    return TraceAnnotation(DATA)
