"""ROUGE as LongBench computes it, and as SCROLLS does: F-measures from 0 to 1."""

import re
from collections import Counter
from collections.abc import Sequence


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of the package `rouge` 1.0.1, which LongBench uses.

    A sentence ends at every period. Counts the distinct words in a longest common subsequence of
    any sentence of the answer with any sentence of the prediction, over the distinct words of
    either text. An empty text scores 0. (The package recurses, so that LongBench gives 0 to a
    sentence too long for Python's stack; here it gets its true score.)
    """
    predicted, wanted = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part]
        for text in (prediction, answer)
    )
    if not predicted or not wanted:
        return 0.0
    common = {word for w in wanted for p in predicted for word in _common_words(w, p)}
    precision = len(common) / len({word for part in predicted for word in part})
    recall = len(common) / len({word for part in wanted for word in part})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _common_words(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """A longest common subsequence: the one found from the end when y is shortened first."""
    table = _lengths(x, y)
    i, j, words = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _lengths(x: Sequence[str], y: Sequence[str]) -> list[list[int]]:
    """table[i][j]: the length of a longest common subsequence of x[:i] and y[:j]."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def scrolls_rouge(prediction: str, answer: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of the package `rouge_score` without stemming."""
    predicted, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, answer))
    grams = [
        Counter(zip(*(words[i:] for i in range(n)), strict=False))
        for n in (1, 2)
        for words in (predicted, wanted)
    ]
    common = _lengths(predicted, wanted)[-1][-1]
    return (
        _f((grams[0] & grams[1]).total(), len(predicted), len(wanted)),
        _f((grams[2] & grams[3]).total(), len(predicted) - 1, len(wanted) - 1),
        _f(common, len(predicted), len(wanted)),
    )


def _f(common: int, predicted: int, wanted: int) -> float:
    return 2 * common / (predicted + wanted) if common else 0.0
