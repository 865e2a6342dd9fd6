"""Reads the body of a request: its size and time are bounded, and it is strict JSON."""

import asyncio
import json
import re
from typing import Any, NoReturn

from starlette.requests import Request

from lljax.data.messages import deeper
from lljax.errors import first_line
from lljax.serving.errors import ApiError

SECONDS = 60  # for a body to arrive
DISCARDED = 1 << 28  # bytes of a body too large that are still read, so that the client sees why
MAX_DEPTH = 64  # of nested lists and objects
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, most: int) -> bytes:
    """The body, of at most `most` bytes.

    Raises:
      ApiError: it is larger, is not declared as JSON, or does not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page may send other types to a local server without asking the browser's user.
    if kind != "application/json":
        raise ApiError(415, f"send Content-Type: application/json instead of {kind or 'none'!r}")
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most + DISCARDED:
                    break
                if size <= most:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SECONDS} seconds") from None
    if size > most:
        raise ApiError(413, f"the body has more than the {most} bytes that --max_body allows")
    return b"".join(parts)


def parse_body(body: bytes) -> dict[str, Any]:
    """The object that the body holds.

    Raises:
      ApiError: it is no JSON object in UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {first_line(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    if deeper(value, MAX_DEPTH):
        raise ApiError(400, f"the body is nested in more than {MAX_DEPTH} levels")
    if SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, "the body has half of a surrogate pair, which is no text") from None
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
