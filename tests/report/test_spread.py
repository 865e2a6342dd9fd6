"""The picture of values and their spread: a row for each name that has any, marks where the values
are.
"""

import io

import numpy as np
import pytest
from PIL import Image

from lljax.report import drawing, spread


def image(values):
    return np.asarray(Image.open(io.BytesIO(spread.png("Title", values))))


def columns(picture, row: int, colour) -> np.ndarray:
    """Where `colour` stands in the middle of a row, in units of the layout."""
    y = drawing.SCALE * (spread.TOP + spread.ROW * row + spread.ROW // 2)
    return np.flatnonzero((picture[y] == colour).all(-1)) / drawing.SCALE


def test_rows_are_as_many_as_have_values_and_means_lie_in_order():
    picture = image({"one": [1.0, 3.0], "nothing": [], "another": [9.0, 9.5, 10.0]})
    assert picture.shape[0] == drawing.SCALE * (spread.TOP + 2 * spread.ROW + spread.BOTTOM)
    low, high = (columns(picture, row, spread.BAR) for row in (0, 1))
    assert low.mean() < high.mean()
    # A unit of value is PLOT / 10 wide: 1.41 and 0.5 are the standard deviations.
    for bar, deviation in ((low, 2**0.5), (high, 0.5)):
        assert np.ptp(bar) == pytest.approx(2 * deviation * spread.PLOT / 10, abs=4)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, 1e6]])
def test_any_values_draw(values):
    assert len(columns(image({"one": values}), 0, spread.BAR))
