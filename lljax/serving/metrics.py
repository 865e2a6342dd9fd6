"""Counters in Prometheus' text format, which is short enough to write by hand."""

import collections
import time
from collections.abc import Iterable, Sequence
from typing import Any

from lljax.generation.completion import Piece

WINDOW = 10.0  # seconds over which tokens per second are measured
TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Of the engines' counts, by field: name, kind and help.
ENGINE = {
    "waiting": ("requests_waiting", "gauge", "completions that wait for a slot"),
    "reading": ("requests_reading", "gauge", "completions whose prompt is read"),
    "writing": ("requests_writing", "gauge", "completions that are written"),
    "read": ("prompt_tokens_read_total", "counter", "tokens of prompts that were read"),
    "reused": ("prefix_cache_hits_total", "counter", "tokens of prompts in the prefix cache"),
    "kept": ("prefix_cache_bytes", "gauge", "memory of the prefix cache"),
}

Sample = tuple[dict[str, Any], float]


class Metrics:
    """What has happened since the start. Lives in the event loop."""

    def __init__(self):
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.prompt_tokens: collections.Counter[str] = collections.Counter()
        self.generated = 0
        self.endings: collections.Counter[str] = collections.Counter()
        self.first_token = Durations()
        self.whole = Durations()
        self._recent: collections.deque[float] = collections.deque()

    def heard(self, piece: Piece) -> None:
        """Counts a piece of an engine."""
        if piece.token is not None:
            self.generated += 1
            self._recent.append(time.monotonic())
            self._forget()
        if piece.reason:
            self.endings[piece.reason] += 1

    @property
    def tokens_per_second(self) -> float:
        self._forget()
        return len(self._recent) / WINDOW

    def _forget(self) -> None:
        oldest = time.monotonic() - WINDOW
        while self._recent and self._recent[0] < oldest:
            self._recent.popleft()

    def text(self, engines: Sequence[Any], slots: int, queue: int) -> str:
        """Everything, and the present state of the engines.

        slots: requests that an engine serves at the same time. queue: requests that may wait.
        """
        counts = [engine.counts() for engine in engines]
        by_request = [
            ({"endpoint": endpoint, "status": status}, n)
            for (endpoint, status), n in sorted(self.requests.items())
        ]
        prompts = [({"model": name}, n) for name, n in sorted(self.prompt_tokens.items())]
        endings = [({"reason": reason}, n) for reason, n in sorted(self.endings.items())]
        busy = [({}, sum(count.reading + count.writing for count in counts))]
        speed = f"tokens written a second, over the last {WINDOW:.0f}"
        families: list[tuple[str, str, str, Any]] = [
            ("requests_total", "counter", "answered requests", by_request),
            ("prompt_tokens_total", "counter", "tokens of prompts", prompts),
            ("generated_tokens_total", "counter", "tokens written", [({}, self.generated)]),
            ("completions_total", "counter", "completions by how they ended", endings),
            ("tokens_per_second", "gauge", speed, [({}, self.tokens_per_second)]),
            ("queue_limit", "gauge", "completions that may wait", [({}, queue)]),
            ("slots", "gauge", "completions served at once", [({}, slots * len(counts))]),
            ("slots_busy", "gauge", "slots in use", busy),
        ]
        for field, family in ENGINE.items():
            families.append((*family, [({}, sum(getattr(count, field) for count in counts))]))
        lines = [line for family in families for line in _family(*family)]
        lines += self.first_token.lines("time_to_first_token_seconds", "from request to answer")
        lines += self.whole.lines("request_seconds", "from request to the end of the answer")
        return "\n".join(lines) + "\n"


class Durations:
    """The number and the sum of durations: a summary of Prometheus without quantiles."""

    def __init__(self):
        self.count, self.sum = 0, 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.sum += seconds

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def lines(self, name: str, help: str) -> list[str]:
        name = f"lljax_{name}"
        return [
            *_header(name, "summary", help),
            f"{name}_count {self.count}",
            f"{name}_sum {self.sum:.6f}",
        ]


def _header(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _family(name: str, kind: str, help: str, samples: Iterable[Sample]) -> list[str]:
    name = f"lljax_{name}"
    lines = _header(name, kind, help)
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}")
    return lines


def _escaped(text: Any) -> str:
    return str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
