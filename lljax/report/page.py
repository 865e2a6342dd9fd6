"""report.html: all that a run has to say, on one page that needs nothing else, not even a
network.
"""

import base64
import json
import logging
import math
import shlex
import time
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from lljax.data.files import atomic_write, read_object
from lljax.errors import ConfigError, first_line
from lljax.report import charts
from lljax.report.breakdown import Breakdown
from lljax.report.charts import Band, Line, Mark
from lljax.report.records import read_metrics
from lljax.report.words import compact

STYLE = Path(__file__).parent.parent / "assets" / "report.css"
COMMANDS = (
    ("An adapter for PEFT", "python scripts/export.py --workdir={run} --format=peft"),
    (
        "A checkpoint for transformers and vLLM",
        "python scripts/export.py --workdir={run} --format=merged",
    ),
    (
        "A base and a plain LoRA for vllm --enable-lora",
        "python scripts/export.py --workdir={run} --format=split",
    ),
    ("Held-out perplexity by length", "python scripts/evaluate.py --workdir={run}"),
    (
        "What it finds in long texts",
        "python scripts/evaluate.py --workdir={run} --tasks=perplexity,passkey,needle,ruler",
    ),
    ("A text that it continues", "python scripts/generate.py --workdir={run} --prompt='...'"),
    ("Talk to it", "python scripts/generate.py --workdir={run} --chat"),
    ("Serve the merged model", "vllm serve {run}/export/merged --max-model-len {length}"),
)
MOST_EVALUATIONS = 40  # the newest, in the table of those while training
MOST_FINDINGS, MOST_ROWS, MOST_COLUMNS, LONGEST_CELL = 8, 1000, 64, 300  # that the page shows
LARGEST_IMAGE = 1 << 24  # bytes
# where --output_path may have put them
LM_EVAL = ("results_*.json", "*/results_*.json", "lm_eval/**/results_*.json")
ALARMS = {"skipped": "skipped", "warned": "alarm, applied", "back": "rolled back"}
UNKNOWN, NUMBER = "&#8211;", " class='number'"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{name}</h1><p>{model}</p></header>
<main>{sections}</main>
<footer>lljax, {written}</footer>
</body>
</html>
"""


def write_report(workdir) -> Path:
    """Writes `workdir`/report.html from what lies there and returns its path. What is missing is
    left out; what is damaged too, and said.

    Reads config.json, run.json, metrics.jsonl, data_statistics.json, profile.json (a
    `lljax.report.breakdown.Breakdown`), what the lm-evaluation-harness left (LM_EVAL), and
    evaluation.json: {"finding": [{"what", "before", "after", "note"}, ...], "tables": [{"columns":
    [name, ...], "rows": [[cell, ...], ...], "caption": text}], "charts": as
    `lljax.evaluation.results.charts` makes them, "images": [{"file": name of a PNG in `workdir`,
    "title": text}]}. Of a folder that holds evaluation.json alone the page holds no more.

    Raises:
      ConfigError: no run was started in `workdir`, and nothing was evaluated there.
      OSError: report.html cannot be written.
    """
    workdir = Path(workdir)
    started = any((workdir / name).is_file() for name in ("config.json", "metrics.jsonl"))
    if not started and not (workdir / "evaluation.json").is_file():
        raise ConfigError(
            f"--workdir={workdir}: no run was started there (neither config.json nor metrics.jsonl)"
        )
    config, run, profile, statistics, evaluation = (
        read_object(workdir / f"{name}.json")
        for name in ("config", "run", "profile", "data_statistics", "evaluation")
    )
    records = [
        r for r in read_metrics(workdir) if isinstance(r, dict) and isinstance(r.get("step"), int)
    ]
    steps, evaluations = (
        [r for r in records if "eval" not in r],
        [r for r in records if isinstance(r.get("eval"), dict)],
    )
    section = lambda title, body: f"<section><h2>{title}</h2>{body}</section>" if body else ""
    parts = (
        _guarded("the finding", _finding, evaluation, evaluations),
        _guarded("the summary", _summary, config, run, steps) if started else "",
        section("Curves", _guarded("the curves", _curves, steps, evaluations) if started else ""),
        section("Evaluation", _evaluation(workdir, evaluation, evaluations)),
        section("Where the time goes", _guarded("profile.json", _time, steps, profile)),
        section("Data", _guarded("data_statistics.json", _data, statistics)),
        section(
            "What to do with it",
            _guarded("config.json", _commands, workdir, config, steps) if started else "",
        ),
        section("Configuration", _guarded("config.json", _configuration, config)),
    )
    name, model = workdir.resolve().name, config.get("model")
    model = str(model.get("path", "")) if isinstance(model, dict) else ""
    page = PAGE.format(
        title=escape(f"{name}: {model}" if model else name),
        style=STYLE.read_text(),
        name=escape(name),
        model=escape(model),
        written=time.strftime("%Y-%m-%d %H:%M"),
        sections="".join(parts),
    )
    path = workdir / "report.html"
    atomic_write(path, page.encode("utf-8", "backslashreplace"))
    return path


def _guarded(what: str, make: Callable[..., str], *told) -> str:
    """What `make` makes of files that may hold anything; where it cannot, a line in its place: a
    page of the rest is worth more than none.
    """
    try:
        return make(*told)
    except Exception as error:
        logging.warning(
            "report.html goes without a part of %s: %s (%s)",
            what,
            first_line(error),
            type(error).__name__,
        )
        return f"<p>A part of {what} is damaged and left out.</p>"


def _each(what: str, make: Callable[..., str], items) -> str:
    return "".join(_guarded(what, make, item) for item in items) if isinstance(items, list) else ""


# -------------------------------------------------------------------- the finding
def _finding(evaluation: dict, evaluations: list[dict]) -> str:
    """What came of the training, before and after: by an evaluation, or else by those while
    training.
    """
    found = evaluation.get("finding")
    cells = _each(
        "evaluation.json", _found, (found if isinstance(found, list) else [])[:MOST_FINDINGS]
    )
    if not cells and evaluations:
        cells = "".join(map(_found, _found_while_training(evaluations)))
    return f"<dl class='facts finding'>{cells}</dl>" if cells else ""


def _found(told: dict) -> str:
    what, before, after, note, between = (
        escape(_short(told.get(name, "")))
        for name in ("what", "before", "after", "note", "between")
    )
    compared = told["before"] is not None
    change = f"{before} <span>&#8594;</span> <b>{after}</b>" if compared else f"<b>{after}</b>"
    notes = [(between or "base &#8594; trained") if compared else "trained", note]
    return f"<div><dt>{what}</dt><dd>{change}</dd><dd class='note'>{', '.join(filter(None, notes))}</dd></div>"


def _found_while_training(evaluations: list[dict]) -> list[dict]:
    """Of the held-out perplexity at the longest length: the first and the last."""
    names = {
        (int(length), name)
        for record in evaluations
        for name, _, length in (key.partition("@") for key in record["eval"])
        if name == "perplexity" and length.isdecimal()
    }
    if not names:
        return []
    length, name = max(names)
    told = [
        (r["step"], _number(r["eval"][f"{name}@{length}"]))
        for r in evaluations
        if f"{name}@{length}" in r["eval"]
    ]
    (first, before), (last, after) = told[0], told[-1]
    return [
        {
            "what": f"Held-out perplexity at {length:,} tokens",
            "before": _figures(before) if last > first else None,
            "after": _figures(after),
            "between": f"step {first:,} to step {last:,}",
            "note": "while training",
        }
    ]


# -------------------------------------------------------------------- summary
def _summary(config: dict, run: dict, steps: list[dict]) -> str:
    schedule = config.get("context", {}).get("schedule") or [[None]]
    total, done = schedule[-1][0], steps[-1]["step"] if steps else 0
    facts = []
    if "parameters" in run:
        facts.append(("parameters", compact(run["parameters"]), f"{run['parameters']:,}"))
    if "trainable" in run and run.get("parameters"):
        share = 100 * run["trainable"] / run["parameters"]
        facts.append(("trained", compact(run["trainable"]), f"{share:.3g}% of all"))
    if context := config.get("context", {}).get("length"):
        facts.append(("context", f"{context:,}", "tokens"))
    facts.append(("steps", f"{done:,}", f"of {total:,}" if total and total != done else ""))
    if steps:
        tokens, losses = np.nansum(_column(steps, "tokens")), _column(steps, "loss")
        losses = losses[np.isfinite(losses)][-20:]
        facts.append(("trained tokens", compact(tokens), f"{tokens:,.0f} predicted"))
        facts.append(("time in steps", duration(np.nansum(_column(steps, "seconds"))), ""))
        if (mfu := _finite_values(steps, "mfu")).size:
            facts.append(("MFU", f"{100 * np.median(mfu):.3g}%", "of the peak in bfloat16, median"))
        if len(losses):
            facts.append(
                (
                    "loss at the end",
                    _figures(float(losses.mean())),
                    f"mean of {len(losses)} steps" if len(losses) > 1 else "",
                )
            )
        skipped = sum(bool(r.get("skipped")) for r in steps)
        applied = sum(bool(r.get("spike")) and not r.get("skipped") for r in steps)
        back = sum(len(r.get("rollbacks", ())) for r in steps)
        if skipped or applied or back:
            facts.append(
                (
                    "alarms",
                    f"{skipped + applied + back:,}",
                    f"{skipped:,} skipped, {applied:,} applied"
                    + (f", {back:,} rolled back" if back else ""),
                )
            )
    if "device" in run:
        facts.append(
            ("device", f"{run.get('devices', 1):,} &#215; {escape(str(run['device']))}", "")
        )
    cells = (
        f"<div><dt>{label}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>"
        for label, value, note in facts
    )
    return f"<dl class='facts'>{''.join(cells)}</dl>"


# -------------------------------------------------------------------- curves
def _curves(steps: list[dict], evaluations: list[dict]) -> str:
    if not steps:
        return "<p>No step was recorded yet.</p>"
    x, stage = _column(steps, "step"), _stages(steps)
    bands, held, marks = _bands(steps, stage), _held_out(evaluations), _marks(steps)
    window = min(101, max(5, len(steps) // 50 | 1))
    figures = []
    for name, title, options in (
        ("loss", "Loss", {}),
        ("grad_norm", "Gradient norm", {"log": True, "marks": marks}),
        ("learning_rate", "Learning rate", {"from_zero": True}),
        ("tokens_per_second", "Tokens per second", {"from_zero": True}),
        ("mfu", "Model FLOPs utilisation", {"from_zero": True}),
        ("expert_load_max", "Tokens of the busiest expert, in even shares", {"from_zero": True}),
    ):
        y = _column(steps, name)
        # The devices' peak is not known; the model has no experts.
        if name in ("mfu", "expert_load_max") and not np.isfinite(y).any():
            continue
        if name == "learning_rate":
            lines, legend, readings = [Line(x, y, "smooth")], [], {title.lower(): Line(x, y, "raw")}
        else:
            lines = [Line(x, y, "raw"), Line(x, charts.smoothed(y, window, stage), "smooth")]
            legend = [("raw", "each step"), ("smooth", f"median of {window} steps")]
            readings = {title.lower(): lines[0], "median": lines[1]}
        if name == "loss" and held:
            lines += held
            legend.append(("held", "held out"))
        if name == "grad_norm":
            legend += [
                (kind, text)
                for kind, text in ALARMS.items()
                if any(mark.kind == kind for mark in marks)
            ]
        chart = charts.line_chart(title, lines, bands=bands, readings=readings, **options)
        missing = len(y) - int(np.isfinite(y).sum())
        if missing:
            legend.append(("", f"{missing:,} of {len(y):,} steps not finite"))
        figures.append(
            _figure(chart, legend)
            if chart
            else _figure(f"<p>{title}: no value to draw</p>", legend[-1:])
        )
    return f"<div class='charts'>{''.join(figures)}</div>"


def _figure(chart: str, legend: list[tuple[str, str]]) -> str:
    keys = "".join(
        f"<span>{f'<i class={kind!r}></i>' if kind else ''}{escape(text)}</span>"
        for kind, text in legend
    )
    return f"<figure>{chart}<figcaption>{keys}</figcaption></figure>"


def _stages(steps: list[dict]) -> np.ndarray:
    """The number of the stretch of equal (stage, length, attention) that each step lies in, int
    [n].
    """
    keys = [(r.get("stage"), r.get("length"), r.get("attention")) for r in steps]
    return np.cumsum([i > 0 and key != keys[i - 1] for i, key in enumerate(keys)])


def _bands(steps: list[dict], stage: np.ndarray) -> list[Band]:
    out = []
    for number in range(stage[-1] + 1):
        at = np.flatnonzero(stage == number)
        first, after = steps[at[0]], min(at[-1] + 1, len(steps) - 1)
        if "length" in first:
            out.append(
                Band(
                    first["step"],
                    steps[after]["step"],
                    f"{first['length']:,}",
                    str(first.get("attention", "")),
                    charts.short_length(first["length"]),
                )
            )
    return out


def _marks(steps: list[dict]) -> list[Mark]:
    marks = []
    for record in steps:
        if record.get("skipped") or record.get("spike") or record.get("nonfinite"):
            norm, skipped = _number(record.get("grad_norm")), bool(record.get("skipped"))
            text = f"step {record['step']:,}: gradient norm {norm:.4g}, {'skipped' if skipped else 'applied'}"
            marks.append(Mark(record["step"], norm, "skipped" if skipped else "warned", text))
        for rollback in record.get("rollbacks", ()):
            text = (
                f"back to step {rollback['to']:,} from step {rollback['from']:,}: loss {rollback['loss']:.4g}, "
                f"gradient norm {rollback['grad_norm']:.4g}"
            )
            marks.append(Mark(record["step"], _number(record.get("grad_norm")), "back", text))
    return marks


def _held_out(evaluations: list[dict]) -> list[Line]:
    points = [
        (r["step"], _number(value))
        for r in evaluations
        for name, value in r["eval"].items()
        if name.partition("@")[0] == "loss"
    ]
    points = [point for point in points if math.isfinite(point[1])]
    return [Line(*np.array(points).T, "held")] if points else []


# -------------------------------------------------------------------- time
def _time(steps: list[dict], profile: dict) -> str:
    """What a trace says of a step, and without one what the loop measured: how long the devices
    waited for data.
    """
    waited, seconds = _finite_values(steps, "data_seconds"), _finite_values(steps, "seconds")
    said = ""
    if waited.size and seconds.sum():
        said = (
            f"<p>Waiting for data: {waited.sum() / seconds.sum():.1%} of the time in steps, the longest "
            f"{duration(waited.max())}.</p>"
        )
    if not profile:
        return said
    found = Breakdown(**profile)
    parts = found.parts()
    chart = charts.share_bar(f"A step of {duration(found.seconds)}", parts)
    traced = (
        f"steps {found.steps[0]:,} to {found.steps[-1]:,}"
        if len(found.steps) > 1
        else f"step {found.steps[0]:,}"
    )
    table = {
        "columns": ["", "seconds a step", "%"],
        "rows": [
            [name, value, round(100 * value / found.seconds, 1)] for name, value in parts.items()
        ]
        + [
            [
                "collectives behind computing",
                found.hidden,
                round(100 * found.hidden / found.seconds, 1),
            ]
        ],
        "caption": f"From the trace of {traced}, the average of {found.devices} devices",
    }
    legend = [(f"part{i}", name) for i, name in enumerate(parts)]
    return (
        said
        + f"<div class='tables'>{_table(table)}</div><div class='charts'>{_figure(chart, legend)}</div>"
    )


def _finite_values(steps: list[dict], name: str) -> np.ndarray:
    """The finite values of a field."""
    y = _column(steps, name)
    return y[np.isfinite(y)]


# -------------------------------------------------------------------- tables
def _while_training(evaluations: list[dict]) -> list[dict]:
    """A table with one row a step and length: "loss@4096" is the column loss in the row of 4,096
    tokens.
    """
    rows: dict[tuple, dict] = {}
    for record in evaluations:
        for key, value in record["eval"].items():
            name, _, length = key.partition("@")
            rows.setdefault((record["step"], int(length) if length.isdecimal() else None), {})[
                name
            ] = value
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    shown = list(rows.items())[-MOST_EVALUATIONS:]
    return [
        {
            "columns": ["step", "length", *names],
            "rows": [
                [step, length, *(row.get(name) for name in names)] for (step, length), row in shown
            ],
            "caption": "Held-out documents, while training"
            + (f" (the last {MOST_EVALUATIONS} of {len(rows)})" if len(rows) > len(shown) else ""),
        }
    ]


def _evaluation(workdir: Path, evaluation: dict, evaluations: list[dict]) -> str:
    guarded = lambda make, name: _each("evaluation.json", make, evaluation.get(name, []))
    while_training = _guarded(
        "metrics.jsonl", lambda: "".join(map(_table, _while_training(evaluations)))
    )
    tables = (
        guarded(_table, "tables")
        + _guarded("lm-eval's results", _lm_eval, workdir)
        + while_training
    )
    drawn = guarded(_chart, "charts") + guarded(lambda image: _image(workdir, image), "images")
    return (f"<div class='tables'>{tables}</div>" if tables else "") + (
        f"<div class='charts'>{drawn}</div>" if drawn else ""
    )


def _table(table: dict) -> str:
    columns, rows = [_short(name) for name in table["columns"][:MOST_COLUMNS]], table["rows"]
    caption = _short(table.get("caption", ""), 10 * LONGEST_CELL)
    if len(rows) > MOST_ROWS:
        caption += f" (the first {MOST_ROWS:,} of {len(rows):,} rows)"
    rows = [row[:MOST_COLUMNS] for row in rows[:MOST_ROWS]]
    head = "".join(
        f"<th scope='col'{NUMBER if _numeric(row[i] for row in rows if i < len(row)) else ''}>{escape(name)}</th>"
        for i, name in enumerate(columns)
    )
    body = "".join(
        "<tr>" + "".join(_cell(cell, name) for cell, name in zip(row, columns)) + "</tr>"
        for row in rows
    )
    return (
        f"<div class='table'><table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _chart(chart: dict) -> str:
    """As `lljax.evaluation.results.charts` describes them."""
    numbers = lambda values: [_number(value) for value in values]
    title, lengths = (
        _short(chart["title"]),
        [int(length) for length in chart["lengths"][:MOST_COLUMNS]],
    )
    if chart["kind"] == "heatmap":
        return _figure(
            charts.heatmap(
                title,
                lengths,
                [_short(row) for row in chart["rows"][:MOST_ROWS]],
                [numbers(row) for row in chart["values"]],
                [int(n) for n in chart["samples"]],
            ),
            [],
        )
    lines = {_short(name): numbers(values) for name, values in chart["lines"].items()}
    legend = [(f"series{number % charts.SERIES}", name) for number, name in enumerate(lines)]
    drawn = charts.length_chart(title, lengths, lines, log=bool(chart["log"]))
    return _figure(drawn, legend) if drawn else ""


def _image(workdir: Path, image: dict) -> str:
    path = workdir / Path(str(image["file"])).name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_IMAGE:
        return ""
    png = path.read_bytes()
    if not png.startswith(b"\x89PNG"):
        return ""
    width = int.from_bytes(png[16:20]) // 2  # they have two pixels for one of the page
    return (
        f"<figure><img src='data:image/png;base64,{base64.b64encode(png).decode()}' width='{width}' "
        f"alt='{escape(_short(image['title']))}'></figure>"
    )


def _lm_eval(workdir: Path) -> str:
    """A table of what the lm-evaluation-harness wrote in the run's folder: of each model, task and
    metric the newest value.
    """
    files = sorted(
        {path for pattern in LM_EVAL for path in workdir.glob(pattern)}, key=lambda path: path.name
    )
    rows: dict[tuple, list] = {}
    for path in files:
        try:
            rows |= _lm_eval_rows(read_object(path))
        except (AttributeError, TypeError) as error:  # something else under that name
            logging.warning("%s is passed over: %s", path, first_line(error))
    return (
        _table(
            {
                "columns": ["task", "model", "shots", "metric", "value", "stderr", "n"],
                "rows": [*rows.values()],
                "caption": "lm-evaluation-harness",
            }
        )
        if rows
        else ""
    )


def _lm_eval_rows(found: dict) -> dict[tuple, list]:
    """Of a results file of lm_eval 0.4: {"results": {task: {"acc,none": 0.5, "acc_stderr,none":
    0.1, "alias": ...}}}.
    """
    arguments = found.get("config", {}).get("model_args", "")
    if isinstance(arguments, dict):
        arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
    rows = {}
    for task, values in found.get("results", {}).items():
        shots, n = (
            found.get("n-shot", {}).get(task),
            found.get("n-samples", {}).get(task, {}).get("effective"),
        )
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else f"{metric}, {filtered}"
                error = values.get(f"{metric}_stderr,{filtered}")  # "N/A" where there is none
                rows[task, arguments, key] = [
                    task,
                    arguments,
                    shots,
                    name,
                    value,
                    error if isinstance(error, (int, float)) else None,
                    n,
                ]
    return rows


def _cell(value, column: str) -> str:
    """The column's name is shown beside the value where the page is too narrow for columns."""
    label = f" data-column='{escape(column)}'"
    if value is None:
        return f"<td{NUMBER}{label}>{UNKNOWN}</td>"
    return (
        f"<td{NUMBER}{label}>{_figures(value)}</td>"
        if _numeric([value])
        else f"<td{label}>{escape(_short(value))}</td>"
    )


def _short(value, most: int = LONGEST_CELL) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _numeric(column) -> bool:
    """Whether the cells are numbers, or stand for one that is missing; formatted ones ("1,024",
    "3.50 (n=5)", "nan", "–") too.
    """

    def one(value):
        try:
            float(str(value).partition(" (n=")[0].replace(",", ""))
        except ValueError:
            return False
        return not isinstance(value, bool)

    return all(one(value) for value in column if value not in (None, "–"))


def _figures(value) -> str:
    """A number at the precision that a reader compares: whole ones with separators, others with
    four figures.
    """
    if isinstance(value, str) or not math.isfinite(value):
        return escape(_short(value))
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3e}"


def _data(statistics: dict) -> str:
    parts = {part: numbers for part, numbers in statistics.items() if numbers.get("documents")}
    if not parts:
        return ""
    shares = list(
        dict.fromkeys(share for numbers in parts.values() for share in numbers.get("lengths", {}))
    )
    rows = []
    for part, numbers in parts.items():
        tokens, trained = numbers.get("tokens"), numbers.get("trained_tokens")
        percent = round(100 * trained / tokens) if tokens and trained is not None else None
        rows.append(
            [
                part,
                numbers["documents"],
                tokens,
                trained,
                percent,
                *(numbers.get("lengths", {}).get(share) for share in shares),
            ]
        )
    table = {
        "columns": ["", "documents", "tokens", "trained", "%", *shares],
        "rows": rows,
        "caption": "Documents, tokens that are trained on, and quantiles of the lengths in tokens",
    }
    figures = "".join(
        _figure(
            charts.bar_chart(
                f"Documents by length: {part}",
                numbers["histogram"]["edges"],
                numbers["histogram"]["counts"],
                "tokens",
            ),
            [],
        )
        for part, numbers in parts.items()
        if numbers.get("histogram", {}).get("counts")
    )
    return f"<div class='tables'>{_table(table)}</div><div class='charts'>{figures}</div>"


def _commands(workdir: Path, config: dict, steps: list[dict]) -> str:
    length = (
        config.get("context", {}).get("length")
        or (steps[-1].get("length") if steps else None)
        or 8192
    )
    run = shlex.quote(str(workdir))
    return "".join(
        f"<p class='command'><span>{escape(what)}</span><code>"
        f"{escape(command.format(run=run, length=length))}</code></p>"
        for what, command in COMMANDS
    )


def _configuration(config: dict) -> str:
    fields = dict(_flat(config))
    if not fields:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{escape(field)}</th><td>{escape(_short(json.dumps(value, ensure_ascii=False), 4000))}"
        "</td></tr>"
        for field, value in fields.items()
    )
    return (
        f"<details><summary>{len(fields)} fields</summary><div class='table'><table class='config'><tbody>{rows}"
        "</tbody></table></div></details>"
    )


def _flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


# -------------------------------------------------------------------- reading
def duration(seconds: float) -> str:
    """Seconds as people say them: 3.5 s, 42 s, 3 min 20 s, 5 h 03 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(float(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02} min"


def _column(steps: list[dict], name: str) -> np.ndarray:
    """The values of a field, float64 [n]; NaN where a record has none or it is not finite."""
    values = np.array([_number(record.get(name)) for record in steps])
    return np.where(np.isfinite(values), values, np.nan)


def _number(value) -> float:
    """A value of metrics.jsonl, where "nan" and "inf" are words; NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
