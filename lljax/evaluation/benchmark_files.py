"""Reads benchmark files in their published schema; errors name file, line and field."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lljax.errors import DataError

TYPES = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
      DataError: the file is missing or is not JSON.
    """
    return _parsed(_text(path), str(path))


def read_rows(path: Path, fields: Mapping[str, type | None]) -> list[dict]:
    """The rows of a JSONL file, or of a JSON file with a list of objects.

    fields: {name: type}; None allows any type.

    Raises:
      DataError: as `read_json`; or a row lacks a field, or a field has another type.
    """
    if path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise DataError(f"{path}: not a list of objects")
        numbered = enumerate(rows, 1)
    else:
        numbered = _lines(path)
    checked_rows = [checked(row, f"{path}:{number}", fields) for number, row in numbered]
    if not checked_rows:
        raise DataError(f"{path}: the file has no rows")
    return checked_rows


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    # splitlines() would also split inside strings.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, _parsed(line, f"{path}:{number}")


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a device never ends
        raise DataError(f"{path}: not a regular file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        reason = reason if path.exists() else "there is no such file"
        raise DataError(f"{path}: {reason}") from None
    except UnicodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:  # neither UTF-8 nor a tokenizer has half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise DataError(f"{where}: a text holds half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def checked(row: Any, where: str, fields: Mapping[str, type | None]) -> dict:
    """`row`, if it is an object with these fields.

    Raises:
      DataError: it is not an object, or a field is missing or has another type.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object but a {type(row).__name__}")
    for field, kind in fields.items():
        if field not in row:
            raise DataError(f"{where}: no field {field!r}; a row has {', '.join(fields)}")
        if kind and not isinstance(row[field], kind):
            raise DataError(
                f"{where}: {field!r} is a {type(row[field]).__name__}, not {TYPES[kind]}"
            )
    return row


def texts(value: Any, where: str, field: str) -> tuple[str, ...]:
    """A nonempty list of texts as a tuple.

    Raises:
      DataError: `value` is anything else.
    """
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: {field!r} is not a list of texts, or is empty")
    return tuple(value)
