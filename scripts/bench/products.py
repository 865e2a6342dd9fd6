"""FLOPs of the matrix products of a compiled program, read from its text."""

import math
import re
from collections.abc import Mapping

Lines = Mapping[str, list[str]]  # of every computation, by its name


def product_flops(text: str, trips: float) -> float:
    """FLOPs of every product that the program computes; a product of [a, b] and [b, c] is 2abc. The
    body of a loop counts as often as it runs, which `compiled.cost_analysis()` does not do.

    text: `compiled.as_text()`.
    trips: how often, on average, a loop runs whose trip count the compiler does not know.
    """
    entry, computations = _computations(text)
    counted: dict[str, float] = {}

    def count(name: str) -> float:
        if name not in counted:
            shapes = _shapes(computations[name])
            counted[name] = sum(line_flops(line, shapes) for line in computations[name])
        return counted[name]

    def line_flops(line: str, shapes: dict[str, list[int]]) -> float:
        if dot := re.search(r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+).*lhs_contracting_dims=", line):
            lhs, contracted = shapes[dot[2]], line.split("lhs_contracting_dims={")[1].split("}")[0]
            inner = math.prod(lhs[int(axis)] for axis in contracted.split(","))
            return 2 * math.prod(_sizes(dot[1])) * inner
        inside = sum(count(name) for name in _called(line) if name in computations)
        if " while(" not in line:
            return inside
        known = re.search(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)', line)
        return inside * (int(known[1]) if known else trips)

    return count(entry)


def _computations(text: str) -> tuple[str, Lines]:
    """The name of the entry, and the lines of every computation."""
    entry, lines, computations = "", [], {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith(" "):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return entry, computations


def _called(line: str) -> list[str]:
    """The computations that an instruction runs; of a loop its body, not its condition."""
    called = re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", line)
    for names in re.findall(r"branch_computations=\{([^}]*)\}", line):
        called += re.findall(r"%?([\w.-]+)", names)
    return called


def _shapes(lines: list[str]) -> dict[str, list[int]]:
    """The dimensions of every array of a computation, by its name."""
    arrays = re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", "\n".join(lines))
    return {name: _sizes(dims) for name, dims in arrays}


def _sizes(dims: str) -> list[int]:
    return [int(n) for n in dims.split(",") if n]
