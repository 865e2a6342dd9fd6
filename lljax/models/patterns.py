"""Regular expressions of other people's, matched in bounded time and memory."""

import functools
import json
import re
import subprocess
import sys

from lljax.errors import ConfigError

SECONDS, BYTES = 20, 1 << 30  # of the child that matches; it needs a few hundredths
PLAIN = re.compile(r"[\w.-]*")  # a name
CHILD = f"""
import contextlib, json, re, sys
with contextlib.suppress(ImportError):       # where there are no limits, the time is one
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
patterns, texts = json.load(sys.stdin)
for pattern in patterns:
    try:
        matches = re.compile(pattern).fullmatch
        print(json.dumps([text for text in texts if matches(text)]), flush=True)
    except Exception as error:
        print(json.dumps(str(error) or type(error).__name__), flush=True)
"""


@functools.lru_cache(256)
def matching(
    patterns: tuple[str, ...], texts: tuple[str, ...], where: str, prefix: str = ""
) -> list[frozenset[str]]:
    """Of every pattern the texts that it matches.

    A name matches what ends with it from a dot on, a regular expression what `re.fullmatch` says
    with `prefix` before it. `re` can be interrupted by nothing: it works in a process of its own.

    Raises:
      ConfigError: a pattern is no regular expression, or is not done in time.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: {pattern!r:.60} is no name and no regular expression")
    asked = [pattern for pattern in patterns if not PLAIN.fullmatch(pattern)]
    answers = dict(
        zip(
            asked, _ask([f"{prefix}({pattern})" if prefix else pattern for pattern in asked], texts)
        )
    )
    found = []
    for pattern in patterns:
        answer = answers.get(pattern)
        if PLAIN.fullmatch(pattern):
            answer = [text for text in texts if f".{text}".endswith(f".{pattern}")]
        if answer is None:
            raise ConfigError(
                f"{where}: the regular expression {pattern!r:.60} is not done with the "
                f"names of the layers in {SECONDS} seconds and {BYTES >> 30} GiB: use a "
                "simpler one"
            )
        if isinstance(answer, str):
            raise ConfigError(f"{where}: {pattern!r:.60} is no regular expression ({answer})")
        found.append(frozenset(answer))
    return found


def _ask(patterns: list[str], texts) -> list:
    """What the child says of the first patterns: of all, unless one is never done."""
    if not patterns:
        return []
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        asked = json.dumps([patterns, texts]).encode()
        said = subprocess.run(command, input=asked, capture_output=True, timeout=SECONDS).stdout
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
    return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
