"""Grades of a prediction, from 0 to 1: LongBench, RULER and needles.

LongBench: github.com/THUDM/LongBench, LongBench/metrics.py. RULER: github.com/NVIDIA/RULER,
  scripts/eval.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from lljax.errors import ConfigError
from lljax.evaluation.rouge import rouge_l
from lljax.evaluation.task import Example

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗"
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")
DROPPED = str.maketrans("", "", string.punctuation)
DROPPED_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and surplus space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(DROPPED)).split())


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of two bags of tokens."""
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def qa_f1(prediction: str, answer: str) -> float:
    return f1(normalized(prediction).split(), normalized(answer).split())


def segmented(text: str) -> list[str]:
    """The words of a Chinese text."""
    try:
        import jieba
    except ImportError:
        raise ConfigError(
            "the Chinese tasks of LongBench are scored by words that jieba finds: pip install "
            "jieba, or leave them out of --tasks"
        ) from None
    jieba.setLogLevel("ERROR")  # otherwise it reports its dictionary on stderr
    return list(jieba.cut(text, cut_all=False))


def qa_f1_zh(prediction: str, answer: str) -> float:
    tokens = [
        ["".join(word.lower().translate(DROPPED_CHINESE).split()) for word in segmented(text)]
        for text in (prediction, answer)
    ]
    return f1(*([token for token in of_text if token] for of_text in tokens))


def rouge_l_zh(prediction: str, answer: str) -> float:
    return rouge_l(" ".join(segmented(prediction)), " ".join(segmented(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the prediction names, if the answer is among them.

    A class whose name is part of the answer's name is not counted. As in LongBench, which removes
    items from the list while iterating over it, the class after a removed one is not checked.
    """
    named = [name for name in classes if name in prediction]
    i = 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            named.remove(named[i])
        i += 1
    return 1 / len(named) if answer in named else 0.0


def _share_of_numbers(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def count(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the answer."""
    return _share_of_numbers(prediction, answer)


def retrieval(prediction: str, answer: str) -> float:
    """`count` for an answer such as "Paragraph 12" or "段落12"."""
    paragraph = PARAGRAPH.search(answer)
    assert paragraph is not None, "checked when the file was read"
    return _share_of_numbers(prediction, paragraph[1])


def first_number(prediction: str, example: Example) -> float:
    """1 if the first number in the prediction is the answer: needles and Landmark's passkey."""
    match = re.search(r"\d+", prediction)
    return float(match is not None and match[0] == example.answers[0])


def code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the first line that is neither a comment nor a fence, rounded to 1/100.

    fuzzywuzzy's ratio as LongBench installs it: with difflib, without python-Levenshtein.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def printable(prediction: str) -> str:
    """RULER's cleanup: control characters become line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def matches_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of the answers that the prediction contains, ignoring
    case.
    """
    text = printable(prediction).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def matches_part(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part: 1 if the prediction contains an answer."""
    text = printable(prediction).lower()
    return float(any(answer.lower() in text for answer in answers))
