"""Regular expressions from users and files, matched in bounded time and memory."""

import functools
import json
import re
import subprocess
import sys

from lljax.errors import ConfigError

SECONDS, BYTES = 20, 1 << 30  # limits of the matching child, which needs a few hundredths
PLAIN = re.compile(r"[\w.-]*")  # a name
CHILD = f"""
import contextlib, json, re, sys
with contextlib.suppress(ImportError):       # without it, the time is the only limit
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
    """The texts that every pattern matches.

    A name matches texts that end with it from a dot on; a regular expression matches by
    `re.fullmatch`, with `prefix` before it. Nothing interrupts `re`, so it runs in another process.

    where: the config field, for errors.

    Raises:
      ConfigError: a pattern is no regular expression, or is not done in time.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: {pattern!r:.60} is no name and no regular expression")
    expressions = [pattern for pattern in patterns if not PLAIN.fullmatch(pattern)]
    prefixed = [f"{prefix}({pattern})" if prefix else pattern for pattern in expressions]
    # fewer answers than expressions if one is not done in time
    answers = dict(zip(expressions, _matches(prefixed, texts), strict=False))
    matched = []
    for pattern in patterns:
        answer = answers.get(pattern)
        if PLAIN.fullmatch(pattern):
            answer = [text for text in texts if f".{text}".endswith(f".{pattern}")]
        if answer is None:
            raise ConfigError(
                f"{where}: the regular expression {pattern!r:.60} is not done with the names of "
                f"the layers in {SECONDS} seconds and {BYTES >> 30} GiB: use a simpler one"
            )
        if isinstance(answer, str):
            raise ConfigError(f"{where}: {pattern!r:.60} is no regular expression ({answer})")
        matched.append(frozenset(answer))
    return matched


def _matches(patterns: list[str], texts: tuple[str, ...]) -> list[list[str] | str]:
    """For each pattern, the texts that it matches or its error, up to a pattern that is not done in
    time.
    """
    if not patterns:
        return []
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        question = json.dumps([patterns, texts]).encode()
        output = subprocess.run(
            command, input=question, capture_output=True, timeout=SECONDS
        ).stdout
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
    return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
