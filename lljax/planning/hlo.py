"""Traffic between devices and the workspace of cuDNN, read from the text of a compiled program."""

import math
import re
from collections import Counter

from lljax.parallel.rounding import cdiv

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that one device receives while the program runs, by kind of collective. The body of a
    loop counts as often as it runs.

    text: `compiled.as_text()`.
    """
    computations = _computations(text)
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    counted: dict[str, Counter] = {}

    def count(name: str) -> Counter:
        if name in counted:
            return counted[name]
        counted[name] = total = Counter()
        for line in computations[name][1] if name in computations else ():
            if _waits(line):
                continue
            total.update(_received(line, name, computations[name][1]))
            trips = _trips(line, computations)
            for child in _called(line):
                for kind, size in count(child).items():
                    total[kind] += trips * size
        return total

    return dict(count(entry))


def _waits(line: str) -> bool:
    """Whether an instruction only waits for a collective that is counted elsewhere: the TPU's
    compiler writes an asynchronous collective into every fusion that overlaps it, and instructions
    that wait for it name its computation again.
    """
    return bool(
        re.match(r" *(ROOT )?%?async-collective-done", line)
        or "calls=%async_collective_fusion" in line
        or re.search(r" async-(update|done)\(", line)
    )


def _called(line: str) -> list[str]:
    """The names of the computations that an instruction runs."""
    called = re.findall(
        r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)="
        r"\{?([^,}]*(?:, ?%[^,}]*)*)",
        line,
    )
    return [child for names in called for child in re.findall(r"%?([\w.-]+)", names)]


def cudnn_workspace(text: str) -> int:
    """Bytes of the largest workspace of a backward pass of cuDNN's attention; a compiler without a
    device reports 0.

    The workspace holds a sum shaped like q and one row of statistics, both float32 (cudnn-frontend,
    `get_fe_workspace_size_node` of the backward node). With K < N it is assumed to hold the
    gradients of k and v of every query head before they are summed.
    """
    calls = re.findall(
        r"= \((\w+)\[([\d,]+)\]\S* \w+\[([\d,]+)\][^\n]*\"__cudnn\$fmhaSoftmaxBackward\"", text
    )

    def size(dtype: str, q: str, k: str):  # [B, N, T, H], [B, K, S, H]
        (B, N, T, H), (_, K, S, _) = (map(int, x.split(",")) for x in (q, k))
        return 4 * B * N * T * (H + 1) + (2 * B * N * S * H * bits(dtype) // 8 if N > K else 0)

    return max((size(*call) for call in calls), default=0)


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """The lines of every computation by its name, and whether it is the entry."""
    out, lines = {}, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith(" "):
            lines = []
            out[head[2]] = (bool(head[1]), lines)
        elif lines is not None:
            lines.append(line)
    return out


def _received(line: str, computation: str, lines: list[str]) -> Counter:
    """Bytes that one device receives in an instruction, by kind; empty unless it is a collective.

    computation, lines: which the instruction belongs to.
    """
    match = re.search(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(([^)]*)", line)
    if not match:
        return Counter()
    shape, kind, started, operands = match.groups()
    size = sum(_sizes(shape))
    if started and kind != "all-reduce":  # its tuple holds the operands first, then the results
        size = _sizes(shape)[:2][0 if kind == "reduce-scatter" else -1]
    elif kind == "reduce-scatter":  # the result is a device's part
        shapes = dict(re.findall(r"%?([\w.-]+) = (\(.*?\)|\S+) [\w-]+\(", "\n".join(lines)))
        size = sum(
            sum(_sizes(shapes[name]))
            for name in re.findall(r"[\w.-]+", re.sub(r"/\*.*?\*/", "", operands))
        )
    # how the TPU's compiler writes most of its reduce-scatters
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    # a reduce-scatter and an all-gather of it
    return Counter({kind: size * (2 if kind == "all-reduce" else 1)})


def _sizes(shape: str) -> list[int]:
    """Bytes of an array, or of each element of a tuple."""
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)  # without layouts
    elements = re.findall(
        r"\([^()]*\)|\w+\[[\d,<=]*\]", shape[1:] if shape.startswith("(") else shape
    )
    return [
        sum(_bytes(dtype, dims) for dtype, dims in re.findall(r"(\w+)\[([\d,<=]*)\]", element))
        for element in elements
    ]


def _bytes(dtype: str, dims: str) -> int:
    """Bytes of an array. A dynamic dimension ("<=8") counts at its bound."""
    return cdiv(bits(dtype) * math.prod(int(n.removeprefix("<=")) for n in dims.split(",") if n), 8)


def bits(dtype: str) -> int:
    """Bits of one value of an HLO type: 4 for s4, which is packed, 8 for f8e4m3fn, 64 for c64, 0
    for token and opaque.

    Raises:
      ValueError: an unknown type.
    """
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    match = re.fullmatch(r"(?:[suc]|bf)(\d+)|f(\d+)(?:e\d+m\d+\w*)?", dtype)
    if not match:
        raise ValueError(f"unknown HLO type {dtype!r}: lljax.planning.hlo.bits needs its size")
    return int(match[1] or match[2])


def _trips(line: str, computations: dict[str, tuple[bool, list[str]]]) -> int:
    """How often the body of a loop runs. The GPU and CPU compilers write the number; in a TPU
    program the condition compares a counter with a constant. Anything else counts once.
    """
    said = re.search(r' while\(.*known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)', line)
    if said:
        return int(said[1])
    match = re.search(r" while\(.*condition=%?([\w.-]+)", line)
    if not match:
        return 1
    condition = "\n".join(computations[match[1]][1])
    constants = dict(re.findall(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)", condition))
    compared = re.search(r"compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT", condition)
    return int(constants.get(compared[1], 1)) if compared else 1
