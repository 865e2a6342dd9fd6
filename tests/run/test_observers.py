"""Observers hear of a run as it happened, resumed or not; a failing one costs no state."""

import numpy as np
import pytest
from run.cases import Heard, StopAfter, records, run_info, steps_saved, trained_leaves

from lljax.errors import Stopped
from lljax.run.observer import Observer
from lljax.run.observers import Observers


@pytest.fixture
def config(run_config):
    run_config.context.schedule, run_config.checkpoint.every_steps = ((8, 32, "full"),), 4
    run_config.training.eval_every = 4
    return run_config


def test_an_observer_from_outside_hears_of_steps_evaluations_checkpoints_and_the_end(
    config, train_on_one_device, tmp_path
):
    heard = Heard(every=3)
    with pytest.raises(Stopped):
        train_on_one_device(config, tmp_path, observers=[heard, StopAfter(5)])
    assert heard.of("open", "step", "evaluation", "checkpoint", "close") == [
        ("open", 0),
        ("step", 3),
        ("checkpoint", 4),
        ("evaluation", 4),
        ("checkpoint", 5),
        ("close", "Stopped"),
    ]
    resumed = Heard(every=3)
    train_on_one_device(config, tmp_path, observers=[resumed])
    assert resumed.of("open", "step", "evaluation", "checkpoint", "close") == [
        ("open", 5),
        ("step", 6),
        ("checkpoint", 8),
        ("evaluation", 8),
        ("close", "NoneType"),
    ]


class FailsAt(Observer):
    """Fails as soon as `step` is recorded."""

    def __init__(self, step: int, error: BaseException):
        self._at, self._error = step, error

    def step(self, record: dict) -> None:
        if record["step"] == self._at:
            raise self._error


class Killed(BaseException):
    pass


def test_a_run_whose_observer_fails_saves_its_state_and_resumes_bitwise(
    config, train_on_one_device, tmp_path
):
    whole = train_on_one_device(config, tmp_path / "whole")
    parts, heard = tmp_path / "parts", Heard()
    with pytest.raises(ZeroDivisionError, match="of a third party"):
        failing = FailsAt(3, ZeroDivisionError("of a third party"))
        train_on_one_device(config, parts, observers=[failing, heard])
    assert steps_saved(parts) == [3]  # after that step, which is recorded
    assert heard.of("step", "close") == [
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("close", "ZeroDivisionError"),
    ]
    with pytest.raises(Killed):  # no request to stop: at once, as kill -9
        train_on_one_device(config, parts, observers=[FailsAt(6, Killed())])
    assert steps_saved(parts) == [3, 4]
    for x, y in zip(
        trained_leaves(whole), trained_leaves(train_on_one_device(config, parts)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
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
