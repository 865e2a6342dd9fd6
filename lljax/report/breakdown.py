"""Divides the time of traced training steps into computing, communication and waiting for data."""

import bisect
import dataclasses
import re
from collections import defaultdict
from pathlib import Path

STEP, DATA = "train", "data"  # names of the loop's own marks in a trace

# A collective by the compiler's name, by that of the JAX primitive it came from, or by that of the
# NCCL kernel.
COLLECTIVE = re.compile(
    r"%?(ragged-)?(all[-_](gather|reduce|to[-_]all)|reduce[-_]scatter|collective[-_](permute|broadcast)|"
    r"async-collective-(start|done)|psum|pmax|pmin|ppermute|nccl)",
    re.IGNORECASE,
)


# What holds other operations, or moves data beside them.
NO_WORK = re.compile(r"%?(while|conditional|call|tuple|copy-(start|done)|Memcpy\w*|Memset)\b")


Interval = tuple[float, float]  # start and stop, ns


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of a step, of the average of `steps` and devices.

    computing: something is computed. collectives: devices wait for each other and nothing is
      computed. data: the device is idle and the host reads the next batch. hidden: collectives
      behind which something is computed, part of `computing`.
    """

    steps: list[int]
    devices: int
    seconds: float
    computing: float
    collectives: float
    data: float
    hidden: float

    def parts(self) -> dict[str, float]:
        """What makes up `seconds`, by name."""
        rest = max(self.seconds - self.computing - self.collectives - self.data, 0.0)
        return {
            "computing": self.computing,
            "collectives": self.collectives,
            "waiting for data": self.data,
            "rest": rest,
        }


def breakdown(path: Path) -> Breakdown | None:
    """Reads a trace (an XSpace protocol buffer); None where it has no whole step."""
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


def divide(steps: dict[int, Interval], reading: list[Interval], devices: dict) -> Breakdown | None:
    """Divides each step among its parts. devices: each one's (work, waits) as `merged`
    intervals.
    """
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
    each = 1e-9 / (len(steps) * len(devices))
    return Breakdown(
        sorted(steps), len(devices), **{name: each * total for name, total in sums.items()}
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
    """Of disjoint intervals in order, the part within another."""
    first = max(bisect.bisect(intervals, within[:1]) - 1, 0)
    total = 0.0
    for start, stop in intervals[first:]:
        if start >= within[1]:
            break
        total += max(min(stop, within[1]) - max(start, within[0]), 0.0)
    return total


def _operation(plane: str, line: str, event) -> tuple | None:
    """(device, name) of an event that is an operation of a device. TPUs have a line of them, GPUs
    one for each stream; on CPUs they lie among what else the threads do, and say so.
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


def _interval(event) -> Interval:
    return event.start_ns, event.start_ns + event.duration_ns
