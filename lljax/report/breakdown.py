"""Divides the time of traced training steps into computing, communication and waiting for data."""

import bisect
import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

STEP, DATA = "train", "data"  # names of the loop's annotations in a trace

# A collective's name: the compiler's, its JAX primitive's or its NCCL kernel's.
COLLECTIVE = re.compile(
    r"%?(ragged-)?(all[-_](gather|reduce|to[-_]all)|reduce[-_]scatter|"
    r"collective[-_](permute|broadcast)|async-collective-(start|done)|"
    r"psum|pmax|pmin|ppermute|nccl)",
    re.IGNORECASE,
)

# Operations that contain others, or move data beside them.
NO_WORK = re.compile(r"%?(while|conditional|call|tuple|copy-(start|done)|Memcpy\w*|Memset)\b")


Interval = tuple[float, float]  # start and stop, ns


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of a step, averaged over `steps` and devices.

    computing: an operation computes. collectives: devices wait for each other and none computes.
    data: the device is idle and the host reads the next batch. hidden: collectives overlapped with
    computing, part of `computing`.
    """

    steps: list[int]
    devices: int
    seconds: float
    computing: float
    collectives: float
    data: float
    hidden: float

    def parts(self) -> dict[str, float]:
        """The parts that add up to `seconds`, by name."""
        rest = max(self.seconds - self.computing - self.collectives - self.data, 0.0)
        return {
            "computing": self.computing,
            "collectives": self.collectives,
            "waiting for data": self.data,
            "rest": rest,
        }


def breakdown(path: Path) -> Breakdown | None:
    """Reads a trace (an XSpace protocol buffer); None if it has no whole step."""
    from jax.profiler import ProfileData

    steps, reading, work, waits = {}, [], defaultdict(list), defaultdict(list)
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if plane.name == "/host:CPU" and event.name == STEP:
                    steps[dict(event.stats)["step_num"]] = _interval(event)
                elif plane.name == "/host:CPU" and event.name == DATA:
                    reading.append(_interval(event))
                elif operation := _operation(plane.name, line.name, event):
                    device, name = operation
                    if COLLECTIVE.match(name):
                        waits[device].append(_interval(event))
                    elif not NO_WORK.match(name):
                        work[device].append(_interval(event))
    return divide(
        steps,
        merged(reading),
        {d: (merged(work[d]), merged(waits[d])) for d in work.keys() | waits.keys()},
    )


def divide(
    steps: dict[int, Interval],
    reading: list[Interval],
    devices: dict[Any, tuple[list[Interval], list[Interval]]],
) -> Breakdown | None:
    """Divides each step into its parts. devices: (work, waits) of each, as `merged` intervals."""
    if not steps or not devices:
        return None
    sums = defaultdict(float)
    for step in steps.values():
        for work, waits in devices.values():
            computing, waiting = _length(work, step), _length(waits, step)
            busy = merged(work + waits)
            sums["seconds"] += step[1] - step[0]
            sums["computing"] += computing
            sums["collectives"] += _length(busy, step) - computing
            sums["hidden"] += computing + waiting - _length(busy, step)
            sums["data"] += _length(merged(busy + reading), step) - _length(busy, step)
    seconds = 1e-9 / (len(steps) * len(devices))  # ns of all to s of one
    return Breakdown(
        steps=sorted(steps),
        devices=len(devices),
        **{name: seconds * total for name, total in sums.items()},
    )


def merged(intervals: list[Interval]) -> list[Interval]:
    """The union of intervals as disjoint ones in order."""
    out = []
    for start, stop in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def _length(intervals: list[Interval], within: Interval) -> float:
    """The length of the part of disjoint intervals in order that lies within another."""
    first = max(bisect.bisect(intervals, within[:1]) - 1, 0)
    total = 0.0
    for start, stop in intervals[first:]:
        if start >= within[1]:
            break
        total += max(min(stop, within[1]) - max(start, within[0]), 0.0)
    return total


def _operation(plane: str, line: str, event: Any) -> tuple[Any, str] | None:
    """(device, name) of an event that is a device's operation, otherwise None.

    A TPU has one line of operations, a GPU one for each stream; a CPU's are among the other events
    of its threads and carry the statistic "hlo_op".
    """
    if plane.startswith("/device:TPU") and line == "XLA Ops":
        return plane, event.name
    if plane.startswith("/device:GPU") and line.startswith("Stream"):
        return plane, event.name
    if plane == "/host:CPU" and line.startswith("tf_XLA"):
        stats = dict(event.stats)
        if "hlo_op" in stats:
            return stats["device_ordinal"], stats["hlo_op"]
    return None


def _interval(event: Any) -> Interval:
    return event.start_ns, event.start_ns + event.duration_ns
