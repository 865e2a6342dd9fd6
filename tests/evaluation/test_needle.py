import io

import numpy as np
import pytest
from PIL import Image

from lljax.errors import ConfigError
from lljax.evaluation import drawing, heatmap, needle
from lljax.evaluation.sizes import Counter
from lljax.evaluation.task import group_scores


@pytest.mark.parametrize("length", [512, 4096])
def test_the_needle_lies_at_its_depth_between_sentences(length, tiny_512):
    counter, task = Counter(tiny_512), needle.task()
    made = list(task.examples(tiny_512, length, 2, 0))
    assert [example.groups for example in made] == [(needle.group(depth),) for depth in needle.DEPTHS for _ in range(2)]
    for example in made:
        assert 0.95 * length <= counter(example.text) + example.tokens <= length
        before, after = example.prompt.split("\n\n")[1].split("The secret number of", 1)
        depth, found = int(example.groups[0].split()[1][:-1]) / 100, len(before) / (len(before) + len(after))
        assert depth - 0.45 <= found <= depth + 0.05 if length == 512 else depth - 0.1 <= found <= depth + 0.02
        assert not before or before[-2] in ".!?" or depth == 1
        assert example.prompt.count(example.answers[0]) == 1
    assert len({example.answers for example in made}) == len(made)
    predictions = [f" {example.answers[0]}." if i % 2 else " 12" for i, example in enumerate(made)]
    assert task.score(predictions, made) == 50
    assert group_scores(task, predictions, made) == {needle.group(depth): 50 for depth in needle.DEPTHS}


def test_the_grid_has_depths_as_rows_and_lengths_as_columns():
    grid = needle.grid({4096: {needle.group(0): 1.0, needle.group(100): 2.0}, 512: {needle.group(0): 3.0}})
    assert grid.shape == (11, 2) and grid[0].tolist() == [3.0, 1.0] and grid[10, 1] == 2.0 and np.isnan(grid).sum() == 19


def test_the_users_own_text_is_the_haystack(tmp_path, tiny_512):
    path = tmp_path / "text.txt"
    path.write_text("Call me Ishmael. Some years ago I went to sea. ")
    example = next(needle.task(path).examples(tiny_512, 512, 1, 0))
    assert example.prompt.count("Call me Ishmael.") > 5
    with pytest.raises(ConfigError, match="^needle: .*--lengths"):
        next(needle.task(path).examples(tiny_512, 32, 1, 0))


def test_the_heatmap_is_a_png_whose_cells_have_the_scores_colours():
    scores = np.array([[0, 100, np.nan], [50, 25, 75]])
    image = Image.open(io.BytesIO(heatmap.png("Title", [512, 4096, 131_072], [0, 100], scores)))
    assert image.format == "PNG" and image.getpixel((1, 1)) == (255, 255, 255)
    for row in range(2):
        for column in range(3):
            x = heatmap.LEFT + heatmap.CELL[0] * column + 4
            y = heatmap.TOP + heatmap.CELL[1] * row + 4
            assert image.getpixel((drawing.SCALE * x, drawing.SCALE * y)) == heatmap.colour(scores[row, column])
    assert heatmap.colour(0) != heatmap.colour(100) and heatmap.colour(np.nan) == heatmap.NOTHING
    wide = Image.open(io.BytesIO(heatmap.png("A title that is far longer than one column of cells", [512], [0], [[1]])))
    assert wide.width > 2 * drawing.SCALE * (heatmap.LEFT + heatmap.CELL[0])
