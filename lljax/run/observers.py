"""The observers of a run: the table of those that every run has, and how events reach them."""

import contextlib
import logging
from collections.abc import Sequence

from lljax.errors import first_line
from lljax.run.monitor import Monitor
from lljax.run.observer import Observer, RunInfo
from lljax.run.profile import Tracer
from lljax.run.report_writer import ReportWriter
from lljax.run.tensorboard import TensorBoard
from lljax.run.watchdog import Watchdog

# In the order in which they hear of an event; they close in the reverse order, the report last.
DEFAULT_OBSERVERS: tuple[type[Observer], ...] = (
    ReportWriter,
    Monitor,
    TensorBoard,
    Tracer,
    Watchdog,
)


class Observers(Observer):
    """Passes every event to the default observers of a run, then to the others.

    An exception in a default observer passes through: without a record of its steps a run must not
    go on. An exception in another one becomes `failure`; that observer is dropped, and the run
    stops at the next point where it could be asked to stop.
    """

    def __init__(self, default: Sequence[type[Observer]], others: Sequence[Observer] = ()):
        self._default = [observer() for observer in default]
        self._others = list(others)
        self.failure: Exception | None = None

    @contextlib.contextmanager
    def opened(self, run: RunInfo):
        """A context between the `open` and the `close` of all observers."""
        opened = []
        try:
            for observer in (*self._default, *self._others):
                observer.open(run)
                opened.append(observer)
            yield self
        except BaseException as error:
            _close(opened, error)
            raise
        _close(opened, None)

    def begin(self, step: int) -> None:
        self._tell("begin", step)

    def step(self, record: dict) -> None:
        self._tell("step", record, step=record["step"])

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._tell("evaluation", step, values)

    def checkpoint(self, step: int) -> None:
        self._tell("checkpoint", step)

    def rollback(self, step: int) -> None:
        self._tell("rollback", step)

    def heartbeat(self, step: int) -> None:
        self._tell("heartbeat", step)

    def say(self, text: str) -> None:
        self._tell("say", text)

    def _tell(self, event: str, *arguments, step: int | None = None) -> None:
        """step: the number of the step, if `every` of an observer decides."""

        def hears(observer: Observer) -> bool:
            return step is None or bool(observer.every and step % observer.every == 0)

        for observer in filter(hears, self._default):
            getattr(observer, event)(*arguments)
        for observer in list(filter(hears, self._others)):
            try:
                getattr(observer, event)(*arguments)
            except Exception as error:
                self._others.remove(observer)
                self.failure = self.failure or error
                logging.error(
                    "the observer %s failed (%s: %s): the run saves its state and stops",
                    type(observer).__name__,
                    type(error).__name__,
                    first_line(error),
                )


def _close(observers: Sequence[Observer], error: BaseException | None) -> None:
    for observer in reversed(observers):
        try:
            observer.close(error)
        except Exception as failure:
            logging.warning(
                "the observer %s could not be closed (%s: %s)",
                type(observer).__name__,
                type(failure).__name__,
                first_line(failure),
            )
