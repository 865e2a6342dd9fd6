"""Reads SQuAD and HotpotQA files as the questions and documents of RULER's qa tasks."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

from lljax.errors import DataError
from lljax.evaluation.benchmark_files import checked, read_json, texts


@dataclasses.dataclass(frozen=True)
class Question:
    """documents: indices of the documents with the answer. related: indices of other documents of
    the same article, the first choice of distractors.
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
    """The questions with an answer of SQuAD 1.1 or 2.0."""
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
    documents, index = _numbered(
        paragraph["context"] for article in articles for paragraph in article
    )
    questions = []
    for i, article in enumerate(articles):
        together = {index[paragraph["context"]] for paragraph in article}
        for paragraph in article:
            document = index[paragraph["context"]]
            for qa in paragraph["qas"]:
                where = f"{path}: a question of data[{i}]"
                if checked(qa, where, {"question": str, "answers": list}).get("is_impossible"):
                    continue
                answers = [
                    checked(answer, where, {"text": str})["text"] for answer in qa["answers"]
                ]
                questions.append(
                    Question(
                        text=qa["question"],
                        answers=texts(answers, where, "answers"),
                        documents=(document,),
                        related=tuple(sorted(together - {document})),
                    )
                )
    return _nonempty(path, documents, questions)


@functools.lru_cache(maxsize=1)
def hotpotqa(path: Path) -> Questions:
    """The questions of HotpotQA's distractor or fullwiki file, with their ten paragraphs each."""
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
    documents, index = _numbered(text for context in contexts for text in context)
    return _nonempty(
        path,
        documents,
        [
            Question(row["question"], (row["answer"],), tuple(index[text] for text in context))
            for row, context in zip(rows, contexts, strict=True)
        ],
    )


def _numbered(texts: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The distinct texts in order, and the index of each."""
    documents = tuple(sorted(set(texts)))
    return documents, {text: i for i, text in enumerate(documents)}


def _nonempty(path: Path, documents: tuple[str, ...], questions: list[Question]) -> Questions:
    if not questions:
        raise DataError(f"{path}: no question with an answer")
    return Questions(documents, tuple(questions))
