"""ZeroSCROLLS (Shaham et al. 2023, arXiv 2305.14196), from its files: FOLDER/NAME/validation.jsonl
and test.jsonl.

The answers of the test split are not public: zeroscrolls_test/NAME only collects predictions, and
`write_submission` writes them in the leaderboard's format. The metrics are the authors' own, which
are published beside the data.
"""

import csv
import functools
import io
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lljax.data.files import atomic_write
from lljax.errors import ConfigError, DataError
from lljax.evaluation.benchmark_files import read_rows
from lljax.evaluation.fitting import TokenCounter, cut_end
from lljax.evaluation.metrics import f1, normalized
from lljax.evaluation.rouge import scrolls_rouge
from lljax.evaluation.task import Example, Task, TooShort, mean

FIELDS = {
    "id": str,
    "input": str,
    "output": None,
    "query_start_index": int,
    "truncation_seperator": str,
}
# unidecode's spelling of signs and letters that NFKD does not decompose into ASCII.
ASCII = str.maketrans(
    {
        **dict.fromkeys("‘’‛′´", "'"),
        **dict.fromkeys("“”‟", '"'),
        "″": "''",
        "‚": ",",
        "„": ",,",
        "‹": "<",
        "›": ">",
        "«": "<<",
        "»": ">>",
        **dict.fromkeys("‐‑‒–−", "-"),
        **dict.fromkeys("—―", "--"),
        **dict.fromkeys("•·", "*"),
        "¡": "!",
        "¿": "?",
        "ß": "ss",
        "æ": "ae",
        "œ": "oe",
        "ø": "o",
        "ł": "l",
        "đ": "d",
        "ð": "d",
        "þ": "th",
        "ħ": "h",
        "ı": "i",
        "ŋ": "ng",
        "ŧ": "t",
        "¼": " 1/4",
        "½": " 1/2",
        "¾": " 3/4",
        "⁄": "/",
        "×": "x",
        "÷": "/",
        "±": "+-",
        "≤": "<=",
        "≥": ">=",
        "°": "deg",
        "µ": "u",
        "§": "SS",
        "©": "(c)",
        "®": "(r)",
        "™": "(tm)",
        "†": "+",
        "‡": "++",
        "¢": "C/",
        "£": "PS",
        "¥": "Y=",
        "€": "EUR",
    }
)


def rouge(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """The geometric mean of ROUGE-1, 2 and L; each is the best over answers, averaged over
    examples.
    """
    if not examples:
        return math.nan
    best = [
        [
            max(column)
            for column in zip(
                *(scrolls_rouge(prediction, answer) for answer in example.answers), strict=True
            )
        ]
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    return 100 * math.prod(sum(column) / len(best) for column in zip(*best, strict=True)) ** (1 / 3)


def folded_f1(prediction: str, answer: str) -> float:
    """The F1 of words in ASCII.

    As in the authors' code, which applies unidecode after normalization, a typographic apostrophe
    becomes an ASCII apostrophe that stays in the word. Other scripts, which unidecode transcribes
    to Latin letters, are dropped here.
    """
    fold = lambda text: (
        unicodedata.normalize("NFKD", normalized(text).translate(ASCII))
        .encode("ascii", "ignore")
        .decode()
    )
    return f1(fold(prediction).split(), fold(answer).split())


def same_letter(prediction: str, answer: str) -> float:
    predicted, wanted = (re.search(r"\b[A-D]\b", text) for text in (prediction, answer))
    return float(predicted is not None and wanted is not None and predicted[0] == wanted[0])


def exponential_similarity(prediction: str, answer: str) -> float:
    """0.5 ** (difference of two percentages / 10 points)."""
    predicted, wanted = (re.search(r"(\d+\.?\d*)%", text) for text in (prediction, answer))
    if not predicted or not wanted:
        return 0.0
    return 0.5 ** (abs(float(predicted[1]) - float(wanted[1])) / 10)


def concordance(prediction: str, answer: str) -> float:
    """The share of pairs in the right order; 0 if the two lists do not hold the same numbers."""
    predicted, wanted = (
        [int(word) for word in re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()]
        for text in (prediction, answer)
    )
    if sorted(predicted) != sorted(wanted) or len(wanted) < 2:
        return 0.0
    place = {number: i for i, number in enumerate(predicted)}
    pairs = list(itertools.combinations(wanted, 2))
    return sum(place[a] < place[b] for a, b in pairs) / len(pairs)


def _best(metric: Callable[[str, str], float]) -> Callable[..., float]:
    """The mean over examples of the best over answers."""
    return mean(
        lambda prediction, example: max(metric(prediction, answer) for answer in example.answers)
    )


TASKS = {  # name: (new tokens, score)
    "gov_report": (1024, rouge),
    "summ_screen_fd": (512, rouge),
    "qmsum": (512, rouge),
    "squality": (512, rouge),
    "qasper": (128, _best(folded_f1)),
    "narrative_qa": (64, _best(folded_f1)),
    "quality": (10, _best(same_letter)),
    "musique": (32, _best(folded_f1)),
    "space_digest": (36, _best(exponential_similarity)),
    "book_sum_sort": (256, _best(concordance)),
}


def tasks(folder: Path | None) -> dict[str, Task]:
    """zeroscrolls/NAME, and zeroscrolls_test/NAME, whose score is NaN."""
    result = {}
    for family, split in (("zeroscrolls", "validation"), ("zeroscrolls_test", "test")):
        for name, (_, score) in TASKS.items():
            result[f"{family}/{name}"] = Task(
                f"{family}/{name}",
                functools.partial(_examples, folder, (name, split)),
                score if split == "validation" else lambda predictions, examples: math.nan,
            )
    return result


def _examples(
    folder: Path | None,
    part: tuple[str, str],
    tokenizer: Any,
    length: int,
    samples: int | None,
    seed: int,
) -> Iterator[Example]:
    """The examples of `part`, a (task, split), truncated to `length`."""
    name, split = part
    if folder is None:
        raise ConfigError(
            "ZeroSCROLLS is read from its files: name their folder with --zeroscrolls"
        )
    path, tokens, counter = (
        folder / name / f"{split}.jsonl",
        TASKS[name][0],
        TokenCounter(tokenizer),
    )
    rows: dict[str, dict] = {}
    answers: dict[str, list[str]] = {}  # one row for each answer of an example
    for i, row in enumerate(read_rows(path, FIELDS), 1):
        if split == "validation" and not isinstance(row["output"], str):
            raise DataError(
                f"{path}: row {i}: 'output' is not a text, and the validation split is scored "
                "against it"
            )
        rows.setdefault(row["id"], row)
        answers.setdefault(row["id"], []).append(row["output"] if split == "validation" else "")
    for key, row in itertools.islice(rows.items(), samples):
        yield Example(
            id=key,
            prompt=_cut(counter, row, length - tokens, f"zeroscrolls/{name}"),
            answers=tuple(answers[key]),
            tokens=tokens,
        )


def _cut(counter: TokenCounter, row: dict, budget: int, name: str) -> str:
    """The input; if it is too long, its document is truncated at the end, then come the separator
    and the query.
    """
    if counter(row["input"]) <= budget:
        return row["input"]
    document, query = (
        row["input"][: row["query_start_index"]],
        row["input"][row["query_start_index"] :],
    )
    rest = row["truncation_seperator"] + query
    room = budget - counter(rest)
    while room > 0:
        text = cut_end(counter, document, room) + rest
        over = counter(text) - budget  # the joined text may have more tokens than its parts
        if over <= 0:
            return text
        room -= over
    raise TooShort(
        f"{name}: the query alone takes {counter(rest)} tokens, and {budget} are left for the "
        "prompt: use longer --lengths"
    )


def write_submission(path: Path, predictions: Mapping[str, Mapping[str, str]]) -> None:
    """Writes the leaderboard's CSV. predictions: {task: {id of an example: prediction}}.

    Raises:
      ConfigError: a task is missing; the leaderboard only takes all ten.
    """
    missing = [name for name in TASKS if not predictions.get(name)]
    if missing:
        raise ConfigError(
            f"a submission to ZeroSCROLLS has all ten tasks, and there are no predictions for "
            f"{', '.join(missing)}: run --tasks=zeroscrolls_test"
        )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("Task", "ID", "Prediction"))
    writer.writerows(
        (name, key, prediction) for name in TASKS for key, prediction in predictions[name].items()
    )
    atomic_write(path, text.getvalue())
