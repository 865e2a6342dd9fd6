"""Observers hear of a run as it happened, resumed or not; a failing one costs no state."""

import pytest
from run.cases import Heard, bits, records, run_info, steps_saved, trained_leaves

from lljax.run.observer import Observer
from lljax.run.observers import Observers


class FailsAt(Observer):
    """Fails as soon as `step` is recorded."""

    def __init__(self, step: int, error: BaseException):
        self._at, self._error = step, error

    def step(self, record: dict) -> None:
        if record["step"] == self._at:
            raise self._error


class Killed(BaseException):
    """No request to stop: ends a run at once, as kill -9 does."""


def test_an_observer_from_outside_hears_of_a_run_and_a_failing_one_costs_no_state(
    run_config, train_on_one_device, tmp_path
):
    run_config.context.schedule, run_config.checkpoint.every_steps = ((6, 32, "full"),), 4
    run_config.training.eval_every = 4
    events = ("open", "step", "evaluation", "checkpoint", "close")
    heard, parts = Heard(every=3), tmp_path / "parts"
    whole = train_on_one_device(run_config, tmp_path / "whole", observers=[heard])
    assert heard.of(*events) == [
        ("open", 0),
        ("step", 3),
        ("checkpoint", 4),
        ("evaluation", 4),
        ("step", 6),
        ("evaluation", 6),
        ("checkpoint", 6),
        ("close", "NoneType"),
    ]

    heard, failing = Heard(every=3), FailsAt(3, ZeroDivisionError("of a third party"))
    with pytest.raises(ZeroDivisionError, match="of a third party"):
        train_on_one_device(run_config, parts, observers=[failing, heard])
    assert heard.of(*events) == [
        ("open", 0),
        ("step", 3),
        ("checkpoint", 3),
        ("close", "ZeroDivisionError"),
    ]
    with pytest.raises(Killed):
        train_on_one_device(run_config, parts, observers=[FailsAt(4, Killed())])
    assert steps_saved(parts) == [3]

    heard = Heard(every=3)
    resumed = train_on_one_device(run_config, parts, observers=[heard])
    assert heard.of(*events) == [
        ("open", 3),
        ("checkpoint", 4),
        ("evaluation", 4),
        ("step", 6),
        ("evaluation", 6),
        ("checkpoint", 6),
        ("close", "NoneType"),
    ]
    assert bits(trained_leaves(resumed)) == bits(trained_leaves(whole))
    assert records(parts) == records(tmp_path / "whole")


class Fails(Observer):
    def open(self, run) -> None:
        raise ZeroDivisionError

    step = heartbeat = close = open


def test_failures_of_default_observers_pass_and_those_of_others_are_kept(tmp_path):
    heard = Heard()
    observers = Observers([Heard], [Fails(), heard])
    observers.step({"step": 1})
    observers.step({"step": 2})
    assert isinstance(observers.failure, ZeroDivisionError)
    assert heard.events == [("step", 1), ("step", 2)]
    with pytest.raises(ZeroDivisionError):
        Observers([Fails]).heartbeat(1)


def test_observers_close_in_reverse_and_if_one_cannot_open_or_close(tmp_path, caplog):
    order = []

    class Named(Observer):
        def __init__(self, name):
            self.name = name

        def open(self, run):
            order.append(f"open {self.name}")
            if self.name == "bad":
                raise ZeroDivisionError

        def close(self, error):
            order.append(f"close {self.name}")
            raise ZeroDivisionError

    with Observers([], [Named("a"), Named("b")]).opened(run_info(tmp_path)):
        order.append("run")
    assert order == ["open a", "open b", "run", "close b", "close a"]
    assert caplog.text.count("could not be closed") == 2
    order.clear()
    with (
        pytest.raises(ZeroDivisionError),
        Observers([], [Named("a"), Named("bad")]).opened(run_info(tmp_path)),
    ):
        order.append("run")
    assert order == ["open a", "open bad", "close a"]


def test_every_0_hears_of_no_step_but_of_the_rest():
    heard = Heard(every=0)
    observers = Observers([], [heard])
    for step in (1, 2):
        observers.step({"step": step})
    observers.checkpoint(2)
    assert heard.events == [("checkpoint", 2)]
