import random
import string
import sys
from itertools import pairwise

import jieba
import pytest
import rouge

from lljax.errors import ConfigError
from lljax.evaluation import metrics, zeroscrolls
from lljax.evaluation.rouge import rouge_l, scrolls_rouge
from lljax.evaluation.task import Example

ENGLISH = [
    "the",
    "a",
    "an",
    "A",
    "cat",
    "dog,",
    "house.",
    "runs!",
    "12",
    "3",
    "45",
    "x",
    "=",
    "café",
    "It's",
    "The",
    ".",
    "..",
]
CHINESE = "我们来到北京清华大学，他来到了网易杭研大厦。小明硕士毕业于中国科学院计算所！12 3"
CODE = [
    "x = y + 1",
    "# why",
    "```python",
    "return x",
    "// no",
    "",
    "for i in range(3):",
    "    print(i)",
]
CLASSES = ["News", "News report", "Sport", "Sports", "Art", "Science", "Scientific", "Sci"]
PAIRS = 200


def likely(rng, make):
    """A prediction and an answer that have something in common now and then."""
    answer = make()
    prediction = answer[: rng.randrange(len(answer) + 1)] + make() if rng.random() < 0.4 else make()
    return prediction, answer


def english(rng):
    return "".join(
        word + rng.choice((" ", " ", "\n", "  "))
        for word in rng.choices(ENGLISH, k=rng.randrange(30))
    )


def chinese(rng):
    start = rng.randrange(len(CHINESE))
    return CHINESE[start : start + rng.randrange(20)]


def code(rng):
    return "\n".join(rng.choices(CODE, k=rng.randrange(5)))


@pytest.fixture(autouse=True, scope="module")
def quiet_jieba():
    jieba.setLogLevel("ERROR")


def bag_f1(prediction, answer):
    left, common = list(answer), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = (common / len(words) if words else 0 for words in (prediction, answer))
    return 2 * precision * recall / (precision + recall) if common else 0.0


def plain_words(text):
    text = "".join(" " if c.isspace() else c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split(" ") if word and word not in ("a", "an", "the")]


def chinese_words(text):
    words = (word.lower() for word in jieba.lcut(text))
    dropped = string.punctuation + metrics.CHINESE_PUNCTUATION + string.whitespace
    return [
        word for word in ("".join(c for c in word if c not in dropped) for word in words) if word
    ]


def package_rouge_l(prediction, answer):
    try:
        return rouge.Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)[
            "rouge-l"
        ]["f"]
    except ValueError:
        return 0.0


def ratcliff_obershelp(a, b):
    """Twice the characters of the longest common block, and of those on either side of it, over all
    characters.
    """

    def matched(a, b):
        best = (0, 0, 0)
        for i in range(len(a)):
            for j in range(len(b)):
                k = 0
                while i + k < len(a) and j + k < len(b) and a[i + k] == b[j + k]:
                    k += 1
                best = max(best, (k, -i, -j))
        size, i, j = best[0], -best[1], -best[2]
        return size + matched(a[:i], b[:j]) + matched(a[i + size :], b[j + size :]) if size else 0

    return 2 * matched(a, b) / (len(a) + len(b)) if a or b else 1.0


def first_code_line(text):
    while text.startswith("\n"):
        text = text[1:]
    for line in text.split("\n"):
        if not set("`#") & set(line) and "//" not in line:
            return line
    return ""


def numbers(text):
    return "".join(c if c in string.digits else " " for c in text).split()


def share(prediction, number):
    found = numbers(prediction)
    return sum(n == number for n in found) / len(found) if found else 0.0


@pytest.mark.parametrize(
    "ours,theirs,make",
    [
        (metrics.qa_f1, lambda p, a: bag_f1(plain_words(p), plain_words(a)), english),
        (metrics.qa_f1_zh, lambda p, a: bag_f1(chinese_words(p), chinese_words(a)), chinese),
        (rouge_l, package_rouge_l, english),
        (
            metrics.rouge_l_zh,
            lambda p, a: package_rouge_l(" ".join(jieba.lcut(p)), " ".join(jieba.lcut(a))),
            chinese,
        ),
        (
            metrics.code_similarity,
            lambda p, a: round(100 * ratcliff_obershelp(first_code_line(p), a)) / 100,
            code,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_metric_of_longbench_equals_an_independent_one_on_random_pairs(ours, theirs, make):
    rng = random.Random(0)
    pairs = [likely(rng, lambda: make(rng)) for _ in range(PAIRS)]
    grades = [ours(*pair) for pair in pairs]
    assert grades == pytest.approx([theirs(*pair) for pair in pairs], abs=1e-12)
    assert len(set(grades)) > 15 and min(grades) >= 0 and max(grades) <= 1


def test_counts_and_retrieval_are_the_share_of_numbers_that_are_right():
    rng = random.Random(1)
    for _ in range(PAIRS):
        prediction, number = english(rng), rng.choice(("12", "3", "45"))
        assert metrics.count(prediction, number) == share(prediction, number)
        assert metrics.retrieval(prediction, f"Paragraph {number}") == share(prediction, number)
        assert metrics.retrieval(prediction, f"段落{number}") == share(prediction, number)


def test_classification_shares_one_among_the_classes_named_and_drops_parts_of_the_answers_name():
    def walked(prediction, answer, classes):
        named = [name for name in classes if name in prediction]
        for name in named:  # LongBench's own walk, which skips the neighbor of what it drops
            if name in answer and name != answer:
                named.remove(name)
        return 1 / len(named) if answer in named else 0.0

    rng = random.Random(2)
    for _ in range(PAIRS):
        classes = rng.sample(CLASSES, len(CLASSES))
        prediction, answer = " ".join(rng.choices(CLASSES, k=rng.randrange(5))), rng.choice(CLASSES)
        assert metrics.classification(prediction, answer, classes) == walked(
            prediction, answer, classes
        )
    assert metrics.classification("News report", "News report", ["News", "News report"]) == 1
    assert metrics.classification("Art or Sport", "Art", ["Art", "Sport"]) == 0.5


def test_the_rouges_of_scrolls_equal_plain_ones_on_random_pairs():
    def words(text):
        return "".join(
            c if c in string.ascii_lowercase + string.digits else " " for c in text.lower()
        ).split()

    def longest(x, y):
        memory = {}

        def at(i, j):
            if i == len(x) or j == len(y):
                return 0
            if (i, j) not in memory:
                memory[i, j] = (
                    1 + at(i + 1, j + 1) if x[i] == y[j] else max(at(i + 1, j), at(i, j + 1))
                )
            return memory[i, j]

        return at(0, 0)

    rng = random.Random(3)
    for _ in range(PAIRS):
        prediction, answer = likely(rng, lambda: english(rng))
        p, a = words(prediction), words(answer)
        common = longest(p, a)
        expected = (
            bag_f1(p, a),
            bag_f1(list(pairwise(p)), list(pairwise(a))),
            2 * common / (len(p) + len(a)) if common else 0.0,
        )
        assert scrolls_rouge(prediction, answer) == pytest.approx(expected, abs=1e-12)


def test_the_other_metrics_of_zeroscrolls():
    assert zeroscrolls.folded_f1("The café, in Köln", "a cafe in Koln") == 1
    assert zeroscrolls.folded_f1("Straße nach Łódź, Ærø", "strasse nach Lodz aero") == 1
    # The authors fold after they have dropped the punctuation of ASCII.
    assert (
        zeroscrolls.folded_f1("Anna’s", "Anna's") == 0
        and zeroscrolls.folded_f1("Anna’s", "Anna‘s") == 1
    )
    assert (
        zeroscrolls.folded_f1("the “end”", "end") == 0
        and zeroscrolls.folded_f1("1914–18", "1914−18") == 1
    )
    assert zeroscrolls.folded_f1("1914–18", "191418") == 0
    assert (
        zeroscrolls.same_letter("The answer is (B).", "B") == 1
        and zeroscrolls.same_letter("because", "B") == 0
    )
    assert zeroscrolls.exponential_similarity("about 50%", "60%") == pytest.approx(0.5)
    assert (
        zeroscrolls.exponential_similarity("12.5%", "12.5%") == 1
        and zeroscrolls.exponential_similarity("50", "60%") == 0
    )
    assert zeroscrolls.concordance("Summary order: 3, 1, 2", "3, 1, 2") == 1
    assert zeroscrolls.concordance("2, 1, 3", "3, 1, 2") == 0
    assert zeroscrolls.concordance("1, 3, 2", "3, 1, 2") == pytest.approx(2 / 3)
    assert zeroscrolls.concordance("1, 2", "3, 1, 2") == 0


def test_the_rouge_score_of_zeroscrolls_is_the_geometric_mean_of_means_of_the_best():
    examples = [
        Example("1", "", ("one two three", "one two four"), 9),
        Example("2", "", ("five six",), 9),
    ]
    # ROUGE-1, 2, L: (2/3, 1/2, 2/3) and (1, 1, 1); then the means over the two.
    assert zeroscrolls.rouge(["one two", "five six"], examples) == pytest.approx(
        100 * ((4 / 5 + 1) / 2 * (2 / 3 + 1) / 2 * (4 / 5 + 1) / 2) ** (1 / 3)
    )


def test_without_jieba_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="pip install jieba"):
        metrics.qa_f1_zh("你好", "你好")


def test_rulers_matches_are_substrings_in_any_case():
    assert metrics.matches_all(" ABC\x00 and def", ("abc", "DEF", "g", "h")) == 0.5
    assert metrics.matches_part("The answer is Paris.", ("paris", "Lyon")) == 1
    assert metrics.matches_part("", ("paris",)) == 0
