"""The section of curves: metrics over steps with the stages shaded and the alarms marked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lljax.report.content import Figure, Key, Section
from lljax.report.drawing import svg
from lljax.report.numbers import column, short_length, to_float
from lljax.report.run_files import RunFiles
from lljax.report.step_chart import Band, Line, Mark, line_chart, smoothed
from lljax.report.tables import clipped

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


@dataclass(frozen=True)
class Curve:
    """How a metric is drawn. title: unless run.json has another.

    optional: no chart if no step has a value. smooth: with a running median. marks: with the
    alarms. held: with the held-out loss.
    """

    title: str
    log: bool = False
    from_zero: bool = False
    optional: bool = False
    smooth: bool = True
    marks: bool = False
    held: bool = False


CURVES = {
    "loss": Curve("Loss", held=True),
    "grad_norm": Curve("Gradient norm", log=True, marks=True),
    "learning_rate": Curve("Learning rate", from_zero=True, smooth=False),
    "tokens_per_second": Curve("Tokens per second", from_zero=True),
    "mfu": Curve("Model FLOPs utilization", from_zero=True, optional=True),
    "expert_load_max": Curve(
        "Load of the busiest expert, relative to an even split", from_zero=True, optional=True
    ),
}
# Fields of a record that are shown elsewhere, or tell the steps apart.
STEP_FIELDS = ("step", "stage", "length", "attention", "tokens", "seconds", "data_seconds")
ALARM_FIELDS = ("bad", "z", "loss_z", "nonfinite", "spike", "skipped", "rollbacks")
NOT_DRAWN = frozenset(STEP_FIELDS + ALARM_FIELDS)
ALARMS = {"skipped": "skipped", "warned": "alarm, applied", "back": "rolled back"}
MOST_CURVES, MOST_MARKS = 24, 200


@dataclass(frozen=True)
class Steps:
    """The records of all steps, and the stages and marks that their curves share."""

    records: list[dict]
    x: np.ndarray
    stage: np.ndarray
    bands: list[Band]
    marks: list[Mark]
    held: list[Line]


def curves_section(files: RunFiles) -> Section:
    section = Section("Curves")
    if not files.steps:
        section.notes += ["No step was recorded yet."] if files.started else []
        return section
    section.guarded("metrics.jsonl", _add_curves, section, files)
    held = section.guarded("metrics.jsonl", _held_out_perplexity, files.evaluations)
    section.figures += [held] if held else []
    return section


def headline_chart(files: RunFiles) -> tuple["MatplotlibFigure", str] | None:
    """The chart of a run's headline metric, the loss unless run.json names another, and its title;
    None if there is nothing to draw.
    """
    titles = files.run.get("metrics")
    headline = files.run.get("headline", "loss")
    rows = _rows(files.steps, titles if isinstance(titles, dict) else {}, headline)
    name, title, curve = rows[0]
    figure, _ = _drawn(_steps(Section(), files), name, title, curve)
    return (figure, title) if figure else None


def _steps(section: Section, files: RunFiles) -> Steps:
    records = files.steps
    stage = _stages(records)
    return Steps(
        records=records,
        x=column(records, "step"),
        stage=stage,
        bands=section.guarded("metrics.jsonl", _bands, records, stage) or [],
        marks=section.guarded("metrics.jsonl", lambda: [*_marks(records)]) or [],
        held=_held_out_loss(files.evaluations),
    )


def _add_curves(section: Section, files: RunFiles) -> None:
    records, steps = files.steps, _steps(section, files)
    titles = files.run.get("metrics")
    rows = _rows(records, titles if isinstance(titles, dict) else {}, files.run.get("headline"))
    section.extend(section.figures, "metrics.jsonl", lambda row: _figure(steps, *row), rows)
    if len(steps.marks) == MOST_MARKS:
        section.notes.append(f"Only {MOST_MARKS} of the marked steps are drawn.")


def _rows(
    records: list[dict], titles: dict[str, Any], headline: Any
) -> list[tuple[str, str, Curve]]:
    """(name, title, how to draw) of every metric: the headline, the rows of CURVES, then all other
    numbers that steps recorded, under the titles of their objective, those with a title first.
    """
    extra = {
        name: Curve(name, optional=True)
        for record in records[:: max(1, len(records) // 100)]
        for name, value in record.items()
        if name not in CURVES and name not in NOT_DRAWN and type(value) in (int, float)
    }
    places = {name: place for place, name in enumerate(titles)}
    order = sorted(extra, key=lambda name: places.get(name, len(places)))
    names = sorted([*CURVES, *order], key=lambda name: name != headline)
    curves = extra | CURVES
    return [
        (name, clipped(titles.get(name, curves[name].title)), curves[name])
        for name in names[:MOST_CURVES]
    ]


def _figure(steps: Steps, name: str, title: str, curve: Curve) -> Figure | None:
    figure, legend = _drawn(steps, name, title, curve)
    if not figure and not legend:
        return None
    return Figure(svg(figure, title) if figure else "", tuple(legend))


def _drawn(
    steps: Steps, name: str, title: str, curve: Curve
) -> tuple["MatplotlibFigure | None", list[Key]]:
    """The chart of a metric and its legend; no legend either if the curve is left out."""
    y = column(steps.records, name)
    missing = len(y) - int(np.isfinite(y).sum())
    if missing == len(y):
        return None, [] if curve.optional else [Key("", f"{title}: no value to draw")]
    lines = [Line(steps.x, y, "raw")]
    legend: list[Key] = []
    readings = {title.lower(): lines[0]}
    if curve.smooth:
        window = min(101, max(5, len(y) // 50 | 1))
        lines.append(Line(steps.x, smoothed(y, window, steps.stage), "smooth"))
        legend += [Key("raw", "each step"), Key("smooth", f"median of {window} steps")]
        readings["median"] = lines[1]
    else:
        lines = [Line(steps.x, y, "smooth")]
    if curve.held and steps.held:
        lines += steps.held
        legend.append(Key("held", "held out"))
    marks = steps.marks if curve.marks else []
    kinds = {mark.kind for mark in marks}
    legend += [Key(kind, text) for kind, text in ALARMS.items() if kind in kinds]
    if missing:
        legend.append(Key("", f"{missing:,} of {len(y):,} steps not finite"))
    figure = line_chart(
        title,
        lines,
        bands=steps.bands,
        marks=marks,
        log=curve.log,
        from_zero=curve.from_zero,
        readings=readings,
    )
    if figure is None:
        legend.append(Key("", f"{title}: no value to draw"))
    return figure, legend


def _stages(records: list[dict]) -> np.ndarray:
    """The number of the run of equal (stage, length, attention) of each step, int [n]."""
    keys = [(r.get("stage"), r.get("length"), r.get("attention")) for r in records]
    return np.cumsum([i > 0 and key != keys[i - 1] for i, key in enumerate(keys)])


def _bands(records: list[dict], stage: np.ndarray) -> list[Band]:
    bands = []
    starts = np.flatnonzero(np.diff(stage, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(records) - 1], strict=True):
        first = records[start]
        if "length" in first:
            bands.append(
                Band(
                    start=first["step"],
                    stop=records[stop]["step"],
                    first=f"{first['length']:,}",
                    second=str(first.get("attention", "")),
                    short=short_length(first["length"]),
                )
            )
    return bands


def _marks(records: list[dict]) -> Iterator[Mark]:
    """The first MOST_MARKS alarms and rollbacks."""
    count = 0
    for record in records:
        for mark in _marks_of(record):
            yield mark
            count += 1
            if count == MOST_MARKS:
                return


def _marks_of(record: dict) -> Iterator[Mark]:
    norm, step = to_float(record.get("grad_norm")), record["step"]
    if record.get("skipped") or record.get("spike") or record.get("nonfinite"):
        skipped = bool(record.get("skipped"))
        action = "skipped" if skipped else "applied"
        text = f"step {step:,}: gradient norm {norm:.4g}, {action}"
        yield Mark(step, norm, "skipped" if skipped else "warned", text)
    for rollback in record.get("rollbacks", ()):
        text = (
            f"back to step {rollback['to']:,} from step {rollback['from']:,}: "
            f"loss {rollback['loss']:.4g}, gradient norm {rollback['grad_norm']:.4g}"
        )
        yield Mark(step, norm, "back", text)


def _held_out(evaluations: list[dict], metric: str) -> dict[str, np.ndarray]:
    """By length the (step, value) pairs of a held-out metric, float64 [n, 2]; finite ones."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in evaluations:
        for key, value in record["eval"].items():
            name, _, length = key.partition("@")
            if name == metric and np.isfinite(to_float(value)):
                points.setdefault(length, []).append((record["step"], to_float(value)))
    return {length: np.array(pairs) for length, pairs in points.items()}


def _held_out_loss(evaluations: list[dict]) -> list[Line]:
    return [Line(*pairs.T, kind="held") for pairs in _held_out(evaluations, "loss").values()]


def _held_out_perplexity(evaluations: list[dict]) -> Figure | None:
    """Perplexity over steps, a line for each of up to six lengths; None below two evaluations."""
    points = {n: p for n, p in _held_out(evaluations, "perplexity").items() if len(p) > 1}
    lengths = sorted((n for n in points if n.isdecimal()), key=int)[-6:]
    title = "Held-out perplexity"
    lines = [Line(*points[n].T, kind=f"series{i}") for i, n in enumerate(lengths)]
    figure = line_chart(title, lines, log=True) if lines else None
    legend = tuple(Key(f"series{i}", f"{int(n):,} tokens") for i, n in enumerate(lengths))
    return Figure(svg(figure, title), legend) if figure else None
