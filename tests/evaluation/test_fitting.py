import pytest

from lljax.evaluation.fitting import FILLED, TokenCounter, cut_end, cut_middle, largest


@pytest.mark.parametrize(
    "fixed,each,budget",
    [
        (100, 1, 10_000),
        (3000, 7, 131_072),
        (50, 0.31, 4096),
        (20, 90, 1000),
        (0, 500, 1000),
        (90, 11, 101),
    ],
)
@pytest.mark.parametrize("guess", [2, 40, 100_000])
def test_the_largest_number_that_fits_is_found_with_few_tries(fixed, each, budget, guess):
    tried = []

    def size(n):
        tried.append(n)
        return round(fixed + each * n)

    n = largest(size, budget, least=1, guess=guess)
    assert size(n) <= budget and (size(n) >= FILLED * budget or size(n + 1) > budget)
    assert len(tried) <= 10


def test_an_uneven_size_ends_too():
    sizes = [0, 90, 300, 280, 260, 500, 470, 700, 690, 950, 1200]
    size = lambda n: sizes[n] if n < len(sizes) else 100 * n + 300
    for budget in range(100, 2000, 37):
        for guess in (1, 5, 9):
            n = largest(size, budget, least=1, guess=guess)
            assert size(n) <= budget and (size(n) >= FILLED * budget or size(n + 1) > budget)


def test_nothing_fits():
    assert largest(lambda n: 100 + n, 100, least=1, guess=7) is None


def test_the_middle_goes_and_both_ends_stay(tokenizer):
    counter = TokenCounter(tokenizer)
    text = "first " + "def add name thing " * 100 + " last"
    cut = cut_middle(counter, text, 50)
    assert cut.startswith("first def") and cut.endswith(" last") and 46 <= counter(cut) <= 50
    assert cut_middle(counter, "short", 50) == "short"
    assert cut_middle(counter, "schön öäü " * 60, 33).startswith("sch")


def test_the_end_goes(tokenizer):
    counter = TokenCounter(tokenizer)
    text = "first " + "def add name thing " * 100
    assert text.startswith(cut_end(counter, text, 20)) and counter(cut_end(counter, text, 20)) == 20
    assert cut_end(counter, "short", 50) == "short" and cut_end(counter, text, 0) == ""
