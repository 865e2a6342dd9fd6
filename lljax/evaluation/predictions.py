"""Predictions of an evaluation, kept on disk as soon as they are made."""

import hashlib
import json
import logging
import os
from pathlib import Path

from lljax.errors import DataError, first_line, printable
from lljax.evaluation.task import Example

KEY = ("model", "task", "length", "id", "question")  # identifies a prediction


class Predictions:
    """A JSONL file with one prediction a line. Every addition is on disk when `add` returns, and a
    kill at any moment leaves the file usable.

    A prediction is identified by model, task, length, example and a digest of the question.
    `model` must name everything about the model that changes its answers. The file holds answers
    and predictions, but no prompts.

    Raises:
      DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: predictions are kept there, and it is not a regular file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stored, whole = _read(path)
            self._file = open(path, "ab")
        except OSError as error:
            raise DataError(
                f"{path}: predictions cannot be kept there ({first_line(error)})"
            ) from None
        self._used: dict[tuple, str] = {}
        self._file.truncate(whole)  # drop a line that a kill cut short

    def find(self, model: str, task: str, length: int, example: Example) -> str | None:
        key = model, task, length, example.id, _digest(example)
        if key in self._stored:
            self._used[key] = self._stored[key]
        return self._stored.get(key)

    def add(self, model: str, task: str, length: int, example: Example, prediction: str) -> None:
        row = {
            "model": model,
            "task": task,
            "length": length,
            "id": example.id,
            "question": _digest(example),
            "prediction": prediction,
            "answers": example.answers,
        }
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        key = model, task, length, example.id, row["question"]
        self._stored[key] = self._used[key] = prediction

    def of(self, model: str, task: str, length: int) -> dict[str, str]:
        """The predictions of a task by the id of the example, as far as they were found or added
        since the file was opened.
        """
        return {
            key[3]: prediction
            for key, prediction in self._used.items()
            if key[:3] == (model, task, length)
        }

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _digest(example: Example) -> str:
    """A fingerprint of the question."""
    return hashlib.sha256(
        json.dumps([example.prompt, example.answer_prefix, example.tokens]).encode()
    ).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[tuple, str], int]:
    """The predictions by their key, and the number of bytes that hold whole lines. Damaged lines
    are skipped with a warning: their questions are asked again.
    """
    stored, whole, damaged = {}, 0, []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            key, prediction = tuple(row[name] for name in KEY), row["prediction"]
            if not isinstance(prediction, str):
                raise TypeError
            stored[key] = prediction
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
        whole += len(line)
    if damaged:
        logging.warning(
            "%s:%d: %d damaged lines are skipped, and their questions are asked again",
            printable(str(path)),
            damaged[0],
            len(damaged),
        )
    return stored, whole
