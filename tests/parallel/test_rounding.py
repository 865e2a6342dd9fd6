"""Numbers and arrays are rounded up."""

import numpy as np

from lljax.parallel.rounding import cdiv, round_up


def test_a_division_is_rounded_up_also_of_every_element_of_an_array():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2] and round_up(5, 4) == 8
    np.testing.assert_array_equal(cdiv(np.array([0, 1, 4, 5]), 4), [0, 1, 1, 2])
