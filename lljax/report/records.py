"""Reads metrics.jsonl."""

import json
import logging
import math
from pathlib import Path
from typing import Any


def json_safe(value: Any) -> Any:
    """`value` for JSON, which has no NaN: a number that is not finite becomes its name."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl in order.

    Damaged lines are skipped with a warning; a last line cut short by a kill, without.
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = [_record(line) for line in lines]
    if damaged := [number for number, record in enumerate(records[:-1], 1) if record is None]:
        logging.warning(
            "%s: skipped %d damaged lines (the first is line %d)", path, len(damaged), damaged[0]
        )
    return [record for record in records if record is not None]


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also for bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
