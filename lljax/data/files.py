"""Files that are written whole, and read without failing a run."""

import contextlib
import json
import logging
import os
import uuid
from pathlib import Path

from lljax.errors import first_line, printable


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes `path` so that readers see the old content or the new one, never a part.

    The unfinished file has a unique name, so that two processes may write the same path at once;
    the last one stays.

    Raises:
      OSError: it cannot be written; the old content is unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def read_object(path: Path, max_bytes: int = 1 << 26) -> dict:
    """The JSON object of a side product of a run; empty if there is none.

    A file that is damaged, longer than `max_bytes` or not a regular file is logged and counts as
    none: a side product must not end the run.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > max_bytes:
            raise ValueError(f"more than {max_bytes >> 20} MiB")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        logging.warning("%s is skipped: %s", printable(str(path)), first_line(error))
        return {}
