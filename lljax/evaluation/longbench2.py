"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): 503 questions with four choices, from its
data.json or a JSONL file.

Its authors sample at temperature 0.1; here the caller decides.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lljax.errors import ConfigError, DataError
from lljax.evaluation.benchmark_files import read_rows
from lljax.evaluation.fitting import TokenCounter, cut_middle
from lljax.evaluation.task import Example, Task, TooShort, mean

PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n$DOC$\n</text>\n\n"
    "What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n"
    "(C) $C_C$\n(D) $C_D$\n\nFormat your response as "
    'follows: "The correct answer is (insert answer here)".'
)
TOKENS = 128
FIELDS: dict[str, type | None] = dict.fromkeys(
    (
        "_id",
        "domain",
        "sub_domain",
        "difficulty",
        "length",
        "question",
        "choice_A",
        "choice_B",
        "choice_C",
        "choice_D",
        "answer",
        "context",
    ),
    str,
)
GROUPS = {"difficulty": ("easy", "hard"), "length": ("short", "medium", "long")}


def task(path: Path | None) -> Task:
    return Task(
        "longbench2",
        functools.partial(_examples, path),
        mean(lambda prediction, example: float(choice(prediction) == example.answers[0])),
    )


def choice(prediction: str) -> str | None:
    """The letter of the prediction's answer, None if it does not follow the requested form."""
    text = prediction.replace("*", "")
    match = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
        r"The correct answer is ([A-D])", text
    )
    return match and match[1]


def _examples(
    path: Path | None, tokenizer: Any, length: int, samples: int | None, seed: int
) -> Iterator[Example]:
    if path is None:
        raise ConfigError("LongBench v2 is read from its file: name it with --longbench2")
    if length < 2 * TOKENS:
        raise TooShort(
            f"longbench2: {TOKENS} new tokens are too many for a length of {length}: use longer "
            "--lengths"
        )
    counter = TokenCounter(tokenizer)
    for i, row in enumerate(read_rows(path, FIELDS)[:samples], 1):
        for field, known in {**GROUPS, "answer": tuple("ABCD")}.items():
            if row[field] not in known:
                raise DataError(f"{path}: row {i}: {field!r} is none of {', '.join(known)}")
        parts = {"DOC": row["context"], "Q": row["question"]}
        parts |= {f"C_{letter}": row[f"choice_{letter}"] for letter in "ABCD"}
        # In one substitution: a document may contain $Q$.
        fill = lambda match, parts=parts: parts[match[1]].strip()
        text = re.sub(r"\$(DOC|Q|C_[A-D])\$", fill, PROMPT)
        yield Example(
            id=row["_id"],
            prompt=cut_middle(counter, text, length - TOKENS),
            answers=(row["answer"],),
            tokens=TOKENS,
            groups=tuple(row[field] for field in GROUPS),
        )
