"""A bad step is described in one line, and stops a run if `alarm` says so."""

import math

import pytest

from lljax.config import default_config
from lljax.run import alarms

GOOD = {
    "loss": 2.0,
    "grad_norm": 0.5,
    "nonfinite": False,
    "spike": False,
    "skipped": False,
    "bad": 0,
    "z": 0.0,
    "loss_z": 0.0,
}


@pytest.mark.parametrize(
    "changes,line",
    [
        ({}, ""),
        (
            {"nonfinite": True, "grad_norm": math.inf, "bad": 2},
            "the gradient is not finite; skipped (2 in a row)",
        ),
        ({"nonfinite": True, "bad": 1}, "the update is not finite; skipped (1 in a row)"),
        (
            {"spike": True, "loss": 9.0, "loss_z": 7.0, "z": 1.0},
            "loss 9 is 7.0 deviations above its median; applied",
        ),
        (
            {"spike": True, "skipped": True, "bad": 3, "z": 8.25},
            "gradient norm 0.5 is 8.2 deviations above its median; skipped (3 in a row)",
        ),
    ],
)
def test_a_bad_step_is_described_in_one_line(changes, line):
    assert alarms.trouble(GOOD | changes) == line


@pytest.mark.parametrize(
    "changes,nonfinite,spike,stops",
    [
        ({"nonfinite": True, "bad": 1}, "skip", "warn", False),
        ({"nonfinite": True, "bad": 1}, "stop", "warn", True),
        ({"spike": True}, "skip", "warn", False),
        ({"spike": True}, "stop", "stop", True),
        ({"nonfinite": True, "bad": 5}, "skip", "warn", True),
    ],
)
def test_a_policy_or_too_many_bad_steps_stop_a_run(changes, nonfinite, spike, stops):
    alarm = default_config().alarm
    alarm.nonfinite, alarm.spike, alarm.max_bad_steps = nonfinite, spike, 5
    assert alarms.stops(GOOD | changes, alarm) == stops
