import numpy as np
import pytest

from lljax.errors import ConfigError
from lljax.evaluation import needle
from lljax.evaluation.fitting import TokenCounter
from lljax.evaluation.task import group_scores


@pytest.mark.parametrize("length", [512, 4096])
def test_the_needle_lies_at_its_depth_between_sentences(length, tiny_512):
    counter, task = TokenCounter(tiny_512), needle.task()
    made = list(task.examples(tiny_512, length, 2, 0))
    assert [example.groups for example in made] == [
        (needle.group(depth),) for depth in needle.DEPTHS for _ in range(2)
    ]
    for example in made:
        assert 0.95 * length <= counter(example.text) + example.tokens <= length
        before, after = example.prompt.split("\n\n")[1].split("The secret number of", 1)
        depth, found = (
            int(example.groups[0].split()[1][:-1]) / 100,
            len(before) / (len(before) + len(after)),
        )
        assert (
            depth - 0.45 <= found <= depth + 0.05
            if length == 512
            else depth - 0.1 <= found <= depth + 0.02
        )
        assert not before or before[-2] in ".!?" or depth == 1
        assert example.prompt.count(example.answers[0]) == 1
    assert len({example.answers for example in made}) == len(made)
    predictions = [f" {example.answers[0]}." if i % 2 else " 12" for i, example in enumerate(made)]
    assert task.score(predictions, made) == 50
    assert group_scores(task, predictions, made) == {
        needle.group(depth): 50 for depth in needle.DEPTHS
    }


def test_the_grid_has_depths_as_rows_and_lengths_as_columns():
    grid = needle.grid(
        {4096: {needle.group(0): 1.0, needle.group(100): 2.0}, 512: {needle.group(0): 3.0}}
    )
    assert (
        grid.shape == (11, 2)
        and grid[0].tolist() == [3.0, 1.0]
        and grid[10, 1] == 2.0
        and np.isnan(grid).sum() == 19
    )


def test_the_users_own_text_is_the_haystack(tmp_path, tiny_512):
    path = tmp_path / "text.txt"
    path.write_text("Call me Ishmael. Some years ago I went to sea. ")
    example = next(needle.task(path).examples(tiny_512, 512, 1, 0))
    assert example.prompt.count("Call me Ishmael.") > 5
    with pytest.raises(ConfigError, match="^needle: .*--lengths"):
        next(needle.task(path).examples(tiny_512, 32, 1, 0))
