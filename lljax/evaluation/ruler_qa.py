"""SQuAD and HotpotQA, in the files they are published as, as the questions and documents that
RULER's qa tasks draw from.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

from lljax.errors import DataError
from lljax.evaluation.records import checked, read_json, texts


@dataclasses.dataclass(frozen=True)
class Question:
    """documents: indices of those that hold the answer. related: of those of the same article,
    taken first as company.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Questions:
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


@functools.lru_cache(maxsize=1)
def squad(path: Path) -> Questions:
    """SQuAD 1.1 or 2.0: the questions that have an answer."""
    data = checked(read_json(path), str(path), {"data": list})["data"]
    articles = []
    for i, article in enumerate(data):
        where = f"{path}: data[{i}]"
        articles.append(
            [
                checked(paragraph, f"{where}.paragraphs[{j}]", {"context": str, "qas": list})
                for j, paragraph in enumerate(
                    checked(article, where, {"paragraphs": list})["paragraphs"]
                )
            ]
        )
    documents, at = _numbered(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for i, article in enumerate(articles):
        together = {at[paragraph["context"]] for paragraph in article}
        for paragraph in article:
            own = at[paragraph["context"]]
            for qa in paragraph["qas"]:
                where = f"{path}: a question of data[{i}]"
                if checked(qa, where, {"question": str, "answers": list}).get("is_impossible"):
                    continue
                answers = [
                    checked(answer, where, {"text": str})["text"] for answer in qa["answers"]
                ]
                questions.append(
                    Question(
                        qa["question"],
                        texts(answers, where, "answers"),
                        (own,),
                        tuple(sorted(together - {own})),
                    )
                )
    return _some(path, documents, questions)


@functools.lru_cache(maxsize=1)
def hotpotqa(path: Path) -> Questions:
    """HotpotQA's distractor or fullwiki file: the ten paragraphs of a question belong to it."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a list of questions, as HotpotQA's files are")
    contexts = []
    for i, row in enumerate(rows):
        where = f"{path}: question {i + 1}"
        paragraphs = checked(row, where, {"question": str, "answer": str, "context": list})[
            "context"
        ]
        try:
            contexts.append([f"{title}\n{''.join(sentences)}" for title, sentences in paragraphs])
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: 'context' is not a list of [title, [sentence, ...]]"
            ) from None
    documents, at = _numbered(text for context in contexts for text in context)
    return _some(
        path,
        documents,
        [
            Question(row["question"], (row["answer"],), tuple(at[text] for text in context))
            for row, context in zip(rows, contexts)
        ],
    )


def _numbered(found: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    documents = tuple(sorted(set(found)))
    return documents, {text: i for i, text in enumerate(documents)}


def _some(path: Path, documents, questions) -> Questions:
    if not questions:
        raise DataError(f"{path}: no question with an answer")
    return Questions(documents, tuple(questions))
