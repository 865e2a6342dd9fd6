"""Texts made to fit a number of tokens: how many they are, how much fits, and what is cut."""

from collections.abc import Callable

from lljax.data.template import adds_bos

FILLED = 0.98  # of a budget: enough, no further text is tokenised
AIM = 0.99  # of a budget: where the next try is aimed


class Counter:
    """Counts a text's tokens as a model will read them, its bos included."""

    def __init__(self, tokenizer):
        self.tokenizer, self.bos = tokenizer, int(adds_bos(tokenizer))

    def __call__(self, text: str) -> int:
        return self.bos + len(self.ids(text))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def largest(size: Callable[[int], int], budget: int, *, least: int, guess: int) -> int | None:
    """A number n of at least `least` with FILLED * budget <= size(n) <= budget; failing that, the
    largest within it.

    None where size(least) is already above; least > 0. size grows nearly linearly, so that a few
    calls of it are enough: the next n is where the line through the last two tries meets the
    budget.
    """
    low = high = last = None  # (n, size) that fits; that does not; of the try before
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
        # of close tries it may be anything
        slope = max((now[1] - other[1]) / (n - other[0] or 1), now[1] / n / 4)
        n, last = round(n + (AIM * budget - now[1]) / slope), now
        n = max(n, low[0] + 1) if low else max(n, least)
        n = min(n, high[0] - 1) if high else n


def cut_middle(counter: Counter, text: str, budget: int) -> str:
    """The first and the last half of `budget` tokens of a text that has more, as LongBench cuts."""
    ids = counter.ids(text)
    if len(ids) + counter.bos <= budget:
        return text
    half = (budget - counter.bos) // 2
    while half > 0:
        decode = lambda part: counter.tokenizer.decode(part, skip_special_tokens=True)
        cut = decode(ids[:half]) + decode(ids[-half:])
        over = counter(cut) - budget  # the halves may tokenise into more than they were cut from
        if over <= 0:
            return cut
        half -= -(-over // 2)
    return ""


def cut_end(counter: Counter, text: str, budget: int) -> str:
    """The first `budget` tokens of a text that has more."""
    ids = counter.ids(text)[: max(budget, 0)]
    return counter.tokenizer.decode(ids, skip_special_tokens=True) if len(ids) == budget else text
