"""Files that appear whole, and text of other people's shown safely in a terminal."""

import contextlib
import json
import logging
import os
import uuid
from pathlib import Path

from lljax.errors import first_line, printable


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes `path` so that readers see the old content or the new one, never a part.

    The unfinished file has a name of its own, so that two processes may write the same path at
    once; the last one stays.

    Raises:
      OSError: it cannot be written; the old content is as it was.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def read_object(path: Path, longest: int = 1 << 26) -> dict:
    """The JSON object of a side product; empty where there is none. One that is damaged, longer
    than `longest` bytes or not a
    regular file is as good as none, and logged: what only tells of a run must not end it.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > longest:
            raise ValueError(f"more than {longest >> 20} MiB")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        logging.warning("%s is passed over: %s", printable(str(path)), first_line(error))
        return {}
