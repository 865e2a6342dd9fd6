"""Fits texts to a number of tokens: counts them, finds the largest size that fits, truncates."""

from collections.abc import Callable
from typing import Any

from lljax.data.template import adds_bos

FILLED = 0.98  # share of a budget that is enough: no further text is tokenized
AIM = 0.99  # share of a budget at which the next try aims


class TokenCounter:
    """Counts the tokens of a text as a model reads it, bos included."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.bos = tokenizer, int(adds_bos(tokenizer))

    def __call__(self, text: str) -> int:
        return self.bos + len(self.ids(text))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def largest(size: Callable[[int], int], budget: int, *, least: int, guess: int) -> int | None:
    """A number n >= `least` with FILLED * budget <= size(n) <= budget; if there is none, the
    largest n within the budget; None if size(least) exceeds it.

    least > 0. size grows almost linearly, so that a few calls are enough: the next n is where the
    line through the last two tries meets the budget.
    """
    low = high = last = None  # (n, size) that fits; that does not fit; of the previous try
    n = max(least, guess)
    while True:
        now = n, size(n)
        if now[1] <= budget:
            low = now
            if now[1] >= FILLED * budget or (high and high[0] == n + 1):
                return n
        else:
            high = now
            if n == least:
                return None
            if low and low[0] == n - 1:
                return low[0]
        other = last or (0, 0)
        # The slope between two close tries may be anything.
        slope = max((now[1] - other[1]) / (n - other[0] or 1), now[1] / n / 4)
        n, last = round(n + (AIM * budget - now[1]) / slope), now
        n = max(n, low[0] + 1) if low else max(n, least)
        n = min(n, high[0] - 1) if high else n


def cut_middle(counter: TokenCounter, text: str, budget: int) -> str:
    """Truncates a text to the first and the last half of `budget` tokens, as LongBench does."""
    ids = counter.ids(text)
    if len(ids) + counter.bos <= budget:
        return text
    half = (budget - counter.bos) // 2
    while half > 0:
        decode = lambda part: counter.tokenizer.decode(part, skip_special_tokens=True)
        cut = decode(ids[:half]) + decode(ids[-half:])
        over = counter(cut) - budget  # the halves may tokenize to more than they came from
        if over <= 0:
            return cut
        half -= (over + 1) // 2
    return ""


def cut_end(counter: TokenCounter, text: str, budget: int) -> str:
    """Truncates a text to its first `budget` tokens."""
    ids = counter.ids(text)[: max(budget, 0)]
    return counter.tokenizer.decode(ids, skip_special_tokens=True) if len(ids) == budget else text
