"""report.html: all that a run has to say, on one page that needs nothing else, not even a network."""

import base64
import json
import logging
import math
import os
import shlex
import time
from html import escape
from pathlib import Path

import numpy as np

from lljax.errors import ConfigError
from lljax.training import charts
from lljax.training.charts import Band, Line, Mark, compact
from lljax.training.monitor import read_metrics
from lljax.training.profile import Breakdown

STYLE = Path(__file__).parent.parent / "assets" / "report.css"
COMMANDS = (
    ("An adapter for PEFT", "python scripts/export.py --workdir={run} --format=peft"),
    ("A checkpoint for transformers and vLLM", "python scripts/export.py --workdir={run} --format=merged"),
    ("A base and a plain LoRA for vllm --enable-lora", "python scripts/export.py --workdir={run} --format=split"),
    ("Held-out perplexity by length", "python scripts/evaluate.py --workdir={run}"),
    ("What it finds in long texts", "python scripts/evaluate.py --workdir={run} --tasks=perplexity,passkey,needle,ruler"),
    ("Talk to it", "python scripts/generate.py --workdir={run} --prompt='...'"),
    ("Serve the merged model", "vllm serve {run}/export/merged --max-model-len {length}"),
)
MOST_EVALUATIONS = 40                        # the newest, in the table of those while training
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
<main>{summary}{sections}</main>
<footer>lljax, {written}</footer>
</body>
</html>
"""


def write_report(workdir) -> Path:
    """Writes `workdir`/report.html from what lies there (what is missing is left out) and returns its path.

    Reads config.json, run.json, metrics.jsonl, data_statistics.json, profile.json (a `lljax.training.profile.Breakdown`), and
    evaluation.json: {"tables": [{"columns": [name, ...], "rows": [[cell, ...], ...], "caption": text}], "images": [{"file":
    name of a PNG in `workdir`, "title": text}]}. Of a folder that holds evaluation.json alone the page holds no more.

    Raises:
      ConfigError: no run was started in `workdir`, and nothing was evaluated there.
    """
    workdir = Path(workdir)
    started = any((workdir / name).is_file() for name in ("config.json", "metrics.jsonl"))
    if not started and not (workdir / "evaluation.json").is_file():
        raise ConfigError(f"--workdir={workdir}: no run was started there (neither config.json nor metrics.jsonl)")
    config, run = _read(workdir / "config.json"), _read(workdir / "run.json")
    records = read_metrics(workdir)
    steps, evaluations = [r for r in records if "eval" not in r], [r for r in records if "eval" in r]
    model, name = config.get("model", {}).get("path", ""), workdir.resolve().name
    evaluation = _read(workdir / "evaluation.json")
    told = _tables(evaluation.get("tables", []) + _while_training(evaluations)) + _images(workdir, evaluation.get("images", []))
    sections = (
        ("Curves", _curves(steps, evaluations) if started else ""),
        ("Evaluation", told),
        ("Where the time goes", _time(steps, _read(workdir / "profile.json"))),
        ("Data", _data(_read(workdir / "data_statistics.json"))),
        ("What to do with it", _commands(workdir, config, steps) if started else ""),
        ("Configuration", _configuration(config)),
    )
    page = PAGE.format(
        title=escape(f"{name}: {model}" if model else name), style=STYLE.read_text(), name=escape(name),
        model=escape(model), written=time.strftime("%Y-%m-%d %H:%M"), summary=_summary(config, run, steps) if started else "",
        sections="".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in sections if body))
    unfinished = workdir / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, workdir / "report.html")
    return workdir / "report.html"


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
            facts.append(("loss at the end", _figures(float(losses.mean())),
                          f"mean of {len(losses)} steps" if len(losses) > 1 else ""))
        skipped = sum(bool(r.get("skipped")) for r in steps)
        applied = sum(bool(r.get("spike")) and not r.get("skipped") for r in steps)
        back = sum(len(r.get("rollbacks", ())) for r in steps)
        if skipped or applied or back:
            facts.append(("alarms", f"{skipped + applied + back:,}",
                          f"{skipped:,} skipped, {applied:,} applied" + (f", {back:,} rolled back" if back else "")))
    if "device" in run:
        facts.append(("device", f"{run.get('devices', 1):,} &#215; {escape(str(run['device']))}", ""))
    cells = (f"<div><dt>{label}</dt><dd>{value}</dd><dd class='note'>{note}</dd></div>" for label, value, note in facts)
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
            ("loss", "Loss", {}), ("grad_norm", "Gradient norm", {"log": True, "marks": marks}),
            ("learning_rate", "Learning rate", {"from_zero": True}),
            ("tokens_per_second", "Tokens per second", {"from_zero": True}),
            ("mfu", "Model FLOPs utilisation", {"from_zero": True}),
            ("expert_load_max", "Tokens of the busiest expert, in even shares", {"from_zero": True})):
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
            legend += [(kind, text) for kind, text in ALARMS.items() if any(mark.kind == kind for mark in marks)]
        chart = charts.line_chart(title, lines, bands=bands, readings=readings, **options)
        missing = len(y) - int(np.isfinite(y).sum())
        if missing:
            legend.append(("", f"{missing:,} of {len(y):,} steps not finite"))
        figures.append(_figure(chart, legend) if chart else _figure(f"<p>{title}: no value to draw</p>", legend[-1:]))
    return f"<div class='charts'>{''.join(figures)}</div>"


def _figure(chart: str, legend: list[tuple[str, str]]) -> str:
    keys = "".join(f"<span>{f'<i class={kind!r}></i>' if kind else ''}{escape(text)}</span>" for kind, text in legend)
    return f"<figure>{chart}<figcaption>{keys}</figcaption></figure>"


def _stages(steps: list[dict]) -> np.ndarray:
    """The number of the stretch of equal (stage, length, attention) that each step lies in, int [n]."""
    keys = [(r.get("stage"), r.get("length"), r.get("attention")) for r in steps]
    return np.cumsum([i > 0 and key != keys[i - 1] for i, key in enumerate(keys)])


def _bands(steps: list[dict], stage: np.ndarray) -> list[Band]:
    out = []
    for number in range(stage[-1] + 1):
        at = np.flatnonzero(stage == number)
        first, after = steps[at[0]], min(at[-1] + 1, len(steps) - 1)
        if "length" in first:
            out.append(Band(first["step"], steps[after]["step"], f"{first['length']:,}",
                            str(first.get("attention", "")), charts.short_length(first["length"])))
    return out


def _marks(steps: list[dict]) -> list[Mark]:
    marks = []
    for record in steps:
        if record.get("skipped") or record.get("spike") or record.get("nonfinite"):
            norm, skipped = _number(record.get("grad_norm")), bool(record.get("skipped"))
            text = f"step {record['step']:,}: gradient norm {norm:.4g}, {'skipped' if skipped else 'applied'}"
            marks.append(Mark(record["step"], norm, "skipped" if skipped else "warned", text))
        for rollback in record.get("rollbacks", ()):
            text = (f"back to step {rollback['to']:,} from step {rollback['from']:,}: loss {rollback['loss']:.4g}, "
                    f"gradient norm {rollback['grad_norm']:.4g}")
            marks.append(Mark(record["step"], _number(record.get("grad_norm")), "back", text))
    return marks


def _held_out(evaluations: list[dict]) -> list[Line]:
    points = [(r["step"], _number(value)) for r in evaluations for name, value in r["eval"].items()
              if name.partition("@")[0] == "loss"]
    points = [point for point in points if math.isfinite(point[1])]
    return [Line(*np.array(points).T, "held")] if points else []


# -------------------------------------------------------------------- time
def _time(steps: list[dict], profile: dict) -> str:
    """What a trace says of a step, and without one what the loop measured: how long the devices waited for data."""
    waited, seconds = _finite_values(steps, "data_seconds"), _finite_values(steps, "seconds")
    said = ""
    if waited.size and seconds.sum():
        said = (f"<p>Waiting for data: {waited.sum() / seconds.sum():.1%} of the time in steps, the longest "
                f"{duration(waited.max())}.</p>")
    if not profile:
        return said
    found = Breakdown(**profile)
    parts = found.parts()
    chart = charts.share_bar(f"A step of {duration(found.seconds)}", parts)
    traced = f"steps {found.steps[0]:,} to {found.steps[-1]:,}" if len(found.steps) > 1 else f"step {found.steps[0]:,}"
    table = {"columns": ["", "seconds a step", "%"],
             "rows": [[name, value, round(100 * value / found.seconds, 1)] for name, value in parts.items()]
             + [["collectives behind computing", found.hidden, round(100 * found.hidden / found.seconds, 1)]],
             "caption": f"From the trace of {traced}, the average of {found.devices} devices"}
    legend = [(f"part{i}", name) for i, name in enumerate(parts)]
    return said + _tables([table]) + f"<div class='charts'>{_figure(chart, legend)}</div>"


def _finite_values(steps: list[dict], name: str) -> np.ndarray:
    """The finite values of a field."""
    y = _column(steps, name)
    return y[np.isfinite(y)]


# -------------------------------------------------------------------- tables
def _while_training(evaluations: list[dict]) -> list[dict]:
    """A table with one row a step and length: "loss@4096" is the column loss in the row of 4,096 tokens."""
    rows: dict[tuple, dict] = {}
    for record in evaluations:
        for key, value in record["eval"].items():
            name, _, length = key.partition("@")
            rows.setdefault((record["step"], int(length) if length.isdecimal() else None), {})[name] = value
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    shown = list(rows.items())[-MOST_EVALUATIONS:]
    return [{"columns": ["step", "length", *names],
             "rows": [[step, length, *(row.get(name) for name in names)] for (step, length), row in shown],
             "caption": "Held-out documents, while training" + (
                 f" (the last {MOST_EVALUATIONS} of {len(rows)})" if len(rows) > len(shown) else "")}]


def _tables(tables: list[dict]) -> str:
    out = []
    for table in tables:
        head = "".join(f"<th scope='col'{NUMBER if _numeric(row[i] for row in table['rows']) else ''}>"
                       f"{escape(str(name))}</th>" for i, name in enumerate(table["columns"]))
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table["rows"])
        out.append(f"<div class='table'><table><caption>{escape(table.get('caption', ''))}</caption>"
                   f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
    return f"<div class='tables'>{''.join(out)}</div>" if out else ""


def _images(workdir: Path, images: list[dict]) -> str:
    shown = ""
    for image in images:
        path = workdir / Path(image["file"]).name
        if path.is_file():
            png = path.read_bytes()
            width = int.from_bytes(png[16:20]) // 2      # they have two pixels for one of the page
            shown += (f"<figure><img src='data:image/png;base64,{base64.b64encode(png).decode()}' width='{width}' "
                      f"alt='{escape(image['title'])}'></figure>")
    return f"<div class='charts'>{shown}</div>" if shown else ""


def _cell(value) -> str:
    if value is None:
        return f"<td{NUMBER}>{UNKNOWN}</td>"
    return f"<td{NUMBER}>{_figures(value)}</td>" if _numeric([value]) else f"<td>{escape(str(value))}</td>"


def _numeric(column) -> bool:
    """Whether the cells are numbers, or stand for one that is missing; formatted ones ("1,024", "3.50", "nan", "–") too."""
    def one(value):
        try:
            float(str(value).replace(",", ""))
        except ValueError:
            return False
        return not isinstance(value, bool)
    return all(one(value) for value in column if value not in (None, "–"))


def _figures(value) -> str:
    """A number at the precision that a reader compares: whole ones with separators, others with four figures."""
    if isinstance(value, str) or not math.isfinite(value):
        return escape(str(value))
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3e}"


def _data(statistics: dict) -> str:
    parts = {part: numbers for part, numbers in statistics.items() if numbers.get("documents")}
    if not parts:
        return ""
    shares = list(dict.fromkeys(share for numbers in parts.values() for share in numbers.get("lengths", {})))
    rows = []
    for part, numbers in parts.items():
        tokens, trained = numbers.get("tokens"), numbers.get("trained_tokens")
        percent = round(100 * trained / tokens) if tokens and trained is not None else None
        rows.append([part, numbers["documents"], tokens, trained, percent,
                     *(numbers.get("lengths", {}).get(share) for share in shares)])
    table = {"columns": ["", "documents", "tokens", "trained", "%", *shares], "rows": rows,
             "caption": "Documents, tokens that are trained on, and quantiles of the lengths in tokens"}
    figures = "".join(
        _figure(charts.bar_chart(f"Documents by length: {part}", numbers["histogram"]["edges"],
                                 numbers["histogram"]["counts"], "tokens"), [])
        for part, numbers in parts.items() if numbers.get("histogram", {}).get("counts"))
    return _tables([table]) + f"<div class='charts'>{figures}</div>"


def _commands(workdir: Path, config: dict, steps: list[dict]) -> str:
    length = config.get("context", {}).get("length") or (steps[-1].get("length") if steps else None) or 8192
    run = shlex.quote(str(workdir))
    return "".join(f"<p class='command'><span>{escape(what)}</span><code>"
                   f"{escape(command.format(run=run, length=length))}</code></p>" for what, command in COMMANDS)


def _configuration(config: dict) -> str:
    fields = dict(_flat(config))
    if not fields:
        return ""
    rows = "".join(f"<tr><th scope='row'>{escape(field)}</th><td>{escape(json.dumps(value, ensure_ascii=False))}"
                   "</td></tr>" for field, value in fields.items())
    return (f"<details><summary>{len(fields)} fields</summary><div class='table'><table class='config'><tbody>{rows}"
            "</tbody></table></div></details>")


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
    """A value of metrics.jsonl, where "nan" and "inf" are words."""
    return math.nan if value is None else float(value)


def _read(path: Path) -> dict:
    """The JSON object of a file; empty where there is none, or it is broken (a report does not fail for that)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logging.warning("%s is not JSON (%s): the report goes without it", path, error)
        return {}
