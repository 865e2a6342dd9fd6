"""Numbers as a page shows them."""

import pytest

from lljax.report.axes import tick_label
from lljax.report.numbers import compact, duration, four_figures, short_length


@pytest.mark.parametrize(
    "write,value,text",
    [
        (compact, 9_500, "9,500"),
        (compact, 999_999, "1,000k"),
        (compact, 1_234_567, "1.23M"),
        (short_length, 16_384, "16k"),
        (short_length, 1 << 20, "1M"),
        (short_length, 1000, "1,000"),
        (duration, 9.96, "10.0 s"),
        (duration, 200, "3 min 20 s"),
        (duration, 18_180, "5 h 03 min"),
        (four_figures, 2.0, "2.000"),
        (four_figures, 12345.6, "12,346"),
        (four_figures, 1e-5, "1.000e-05"),
        (four_figures, float("inf"), "inf"),
        (tick_label, 1.5e-4, "1.5e-4"),
        (tick_label, 20_000.0, "20k"),
        (tick_label, 0.30000000000000004, "0.3"),
    ],
)
def test_a_number_reads_well(write, value, text):
    assert write(value) == text
