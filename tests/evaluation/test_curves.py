"""The picture of scores by length: a line for each model, higher for more, gaps where nothing was scored."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from lljax.evaluation import curves, drawing


def image(scores, **options):
    return np.asarray(Image.open(io.BytesIO(curves.png("Title", scores, **options))))


def heights(picture, number: int, column: int) -> np.ndarray:
    """Where the colour of model `number` stands in the middle of a column, in units of the layout from the top of the plot."""
    x = round(drawing.SCALE * (curves.LEFT + curves.WIDE * (column + 0.5)))
    return np.flatnonzero((picture[:, x] == curves.COLOURS[number]).all(-1)) / drawing.SCALE - curves.TOP


def test_points_stand_where_their_scores_are_and_nan_is_a_gap():
    picture = image({"base": {512: 100.0, 4096: 0.0, 1024: math.nan}, "trained": {512: 50.0, 1024: 75.0}})
    for number, column, place in ((0, 0, 0), (0, 2, 1), (1, 0, 0.5), (1, 1, 0.25)):
        assert heights(picture, number, column).mean() == pytest.approx(place * curves.HIGH, abs=1)
    assert not len(heights(picture, 0, 1)) and not len(heights(picture, 1, 2))


def test_a_logarithmic_axis_sets_equal_ratios_equally_far_apart():
    picture = image({"base": {512: 10.0, 1024: 20.0, 2048: 40.0}}, log=True)
    low, middle, high = (heights(picture, 0, column).mean() for column in range(3))
    assert low > middle > high and low - middle == pytest.approx(middle - high, abs=1)


@pytest.mark.parametrize("values", [[20.0, 20.0], [1.0, 1e9], [18.9, 22.8], [99.99, 100.0]])
@pytest.mark.parametrize("log", [True, False])
def test_any_values_draw_inside_of_the_plot(values, log):
    picture = image({f"model {number}": dict(zip((512, 1024), values)) for number in range(len(curves.COLOURS) + 1)}, log=log)
    for column in (0, 1):
        places = heights(picture, 0, column)
        assert len(places) and (places >= -4).all() and (places <= curves.HIGH + 4).all()
