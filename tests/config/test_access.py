"""Values by dotted name, and the quantities that follow from them."""

import pytest

from lljax.config import default_config, flat, get, total_steps, warmup_steps


@pytest.mark.parametrize(
    "steps,expected", [(1, 1), (8, 1), (20, 1), (240, 10), (500, 20), (5000, 20)]
)
def test_the_warm_up_fits_the_run(steps, expected):
    c = default_config()
    assert warmup_steps(c.optimizer, steps) == expected
    c.optimizer.warmup_steps = 3
    assert warmup_steps(c.optimizer, steps) == 3


def test_values_are_read_by_dotted_name():
    c = default_config()
    assert get(c, "context.rope.type") == "yarn" == flat(c)["context.rope.type"]
    assert flat(c.context)["rope.factor"] == "auto" and total_steps(c) == 1000
