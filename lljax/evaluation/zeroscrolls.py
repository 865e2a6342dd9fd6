"""ZeroSCROLLS (Shaham et al. 2023, arXiv 2305.14196), from its files: FOLDER/NAME/validation.jsonl
and test.jsonl.

The answers of the test split are not public: zeroscrolls_test/NAME only collects predictions, which
  `write_submission` makes into the file that the leaderboard takes. The metrics are those that the
  authors keep beside the data.
"""

import csv
import functools
import io
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lljax.errors import ConfigError, DataError
from lljax.evaluation.metrics import f1, normalised
from lljax.evaluation.records import read_rows
from lljax.evaluation.rouge import scrolls_rouge
from lljax.evaluation.sizes import Counter, cut_end
from lljax.evaluation.task import Example, Task, TooShort, mean

FIELDS = {
    "id": str,
    "input": str,
    "output": None,
    "query_start_index": int,
    "truncation_seperator": str,
}
# What unidecode makes of signs and letters that NFKD does not take apart into ASCII.
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
    """The geometric mean of ROUGE-1, 2 and L, each the mean over examples of the best over
    answers.
    """
    if not examples:
        return math.nan
    best = [
        [
            max(column)
            for column in zip(*(scrolls_rouge(prediction, answer) for answer in example.answers))
        ]
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    return 100 * math.prod(sum(column) / len(best) for column in zip(*best)) ** (1 / 3)


def folded_f1(prediction: str, answer: str) -> float:
    """The F1 of words in ASCII. The authors put what is normalised through unidecode, so that a
    typographic apostrophe comes back as one of ASCII and tells words apart. Other scripts, which
    unidecode spells in Latin letters, are dropped here.
    """
    fold = lambda text: (
        unicodedata.normalize("NFKD", normalised(text).translate(ASCII))
        .encode("ascii", "ignore")
        .decode()
    )
    return f1(fold(prediction).split(), fold(answer).split())


def same_letter(prediction: str, answer: str) -> float:
    found, wanted = (re.search(r"\b[A-D]\b", text) for text in (prediction, answer))
    return float(found is not None and wanted is not None and found[0] == wanted[0])


def exponential_similarity(prediction: str, answer: str) -> float:
    """Halved for every ten points between two percentages."""
    found, wanted = (re.search(r"(\d+\.?\d*)%", text) for text in (prediction, answer))
    return 0.5 ** (abs(float(found[1]) - float(wanted[1])) / 10) if found and wanted else 0.0


def concordance(prediction: str, answer: str) -> float:
    """The share of pairs in the right order of two lists of the same numbers; 0 where they are not
    the same.
    """
    found, wanted = (
        [int(word) for word in re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()]
        for text in (prediction, answer)
    )
    if sorted(found) != sorted(wanted) or len(wanted) < 2:
        return 0.0
    place = {number: i for i, number in enumerate(found)}
    pairs = list(itertools.combinations(wanted, 2))
    return sum(place[a] < place[b] for a, b in pairs) / len(pairs)


def _best(metric):
    return mean(
        lambda prediction, example: max(metric(prediction, answer) for answer in example.answers)
    )


TASKS = {  # name: new tokens, score
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
    """zeroscrolls/NAME, scored, and zeroscrolls_test/NAME, whose score is NaN."""
    found = {}
    for family, split in (("zeroscrolls", "validation"), ("zeroscrolls_test", "test")):
        for name, (_, score) in TASKS.items():
            found[f"{family}/{name}"] = Task(
                f"{family}/{name}",
                functools.partial(_examples, name, split, folder),
                score if split == "validation" else lambda predictions, examples: math.nan,
            )
    return found


def _examples(
    name: str,
    split: str,
    folder: Path | None,
    tokenizer,
    length: int,
    samples: int | None,
    seed: int,
) -> Iterator[Example]:
    if folder is None:
        raise ConfigError(
            "ZeroSCROLLS is read from its files: name their folder with --zeroscrolls"
        )
    path, tokens, counter = folder / name / f"{split}.jsonl", TASKS[name][0], Counter(tokenizer)
    rows: dict[str, dict] = {}
    answers: dict[str, list[str]] = {}  # an example with several answers has a row for each
    for i, row in enumerate(read_rows(path, FIELDS), 1):
        if split == "validation" and not isinstance(row["output"], str):
            raise DataError(
                f"{path}: row {i}: 'output' is not a text, and the validation split is scored against it"
            )
        rows.setdefault(row["id"], row)
        answers.setdefault(row["id"], []).append(row["output"] if split == "validation" else "")
    for key, row in itertools.islice(rows.items(), samples):
        yield Example(
            key,
            _cut(counter, row, length - tokens, f"zeroscrolls/{name}"),
            tuple(answers[key]),
            tokens,
        )


def _cut(counter: Counter, row: dict, budget: int, name: str) -> str:
    """The input; where it is too long, its document cut at the end, the separator, and the
    query.
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
        over = counter(text) - budget  # where the parts meet they may tokenise into more
        if over <= 0:
            return text
        room -= over
    raise TooShort(
        f"{name}: the query alone takes {counter(rest)} tokens, and {budget} are left for what is read: ask for "
        "longer ones with --lengths"
    )


def write_submission(path: Path, predictions: Mapping[str, Mapping[str, str]]) -> None:
    """The leaderboard's CSV, from the predictions of each task by the id of the example.

    Raises:
      ConfigError: a task is missing; the leaderboard takes all ten only.
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
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(unfinished, path)
