"""report.html: one page on a run that opens anywhere, without a network and without an account."""

import html
import json
import os
from pathlib import Path

from lljax.training.chart import Band, Line, line_chart, number, smooth
from lljax.training.monitor import read_metrics

STYLE = """
:root { color-scheme: light dark; --text:#1c2330; --soft:#5b6577; --page:#fff; --panel:#f6f7f9; --line:#d9dde4;
  --band0:#eef2f8; --band1:#e2e9f4; --main:#1f5fbf; --raw:#9dbbe6; --eval:#b4530a; --alarm:#c8202f; }
@media (prefers-color-scheme: dark) { :root { --text:#e4e8ef; --soft:#9aa5b8; --page:#12161d; --panel:#1a202a; --line:#333c4a;
  --band0:#19202b; --band1:#202a39; --main:#7db0ff; --raw:#3b5f94; --eval:#f0a35e; --alarm:#ff6b78; } }
* { box-sizing:border-box } body { margin:0 auto; padding:24px 20px 60px; max-width:1080px; background:var(--page);
  color:var(--text); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
h1 { font-size:24px; margin:0 0 4px } h2 { font-size:17px; margin:34px 0 10px } p { margin:6px 0; color:var(--soft) }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:10px; margin-top:16px }
.facts div, figure, details { background:var(--panel); border-radius:8px; padding:10px 14px }
.facts b { display:block; font-size:18px; font-weight:600; overflow-wrap:anywhere } .facts span { color:var(--soft); font-size:13px }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr)); gap:14px }
figure { margin:0 } figcaption { font-weight:600; margin-bottom:2px } figcaption small { color:var(--soft); font-weight:400 }
svg { width:100%; height:auto; display:block } svg text { fill:var(--soft); font-size:11px }
svg .y { text-anchor:end } svg .x, svg .band { text-anchor:middle } .band0 { fill:var(--band0) } .band1 { fill:var(--band1) }
.grid { stroke:var(--line); stroke-width:1 } polyline { fill:none; stroke-width:2; stroke:var(--main); stroke-linejoin:round }
polyline.raw { stroke:var(--raw); stroke-width:1 } polyline.eval { stroke:var(--eval) } circle { fill:var(--main) }
circle.eval { fill:var(--eval) } circle.mark { fill:none; stroke:var(--alarm); stroke-width:2 }
.wide { overflow-x:auto } table { border-collapse:collapse; font-variant-numeric:tabular-nums } caption { text-align:left;
  color:var(--soft); padding-bottom:4px } th,td { padding:5px 14px 5px 0; text-align:right; border-bottom:1px solid var(--line);
  white-space:nowrap } th:first-child,td:first-child { text-align:left } th { color:var(--soft); font-weight:500 }
pre { background:var(--panel); border-radius:8px; padding:12px 14px; overflow-x:auto; font-size:13px }
summary { cursor:pointer; font-weight:600 } details pre { padding:0 } .none { padding:30px 0; text-align:center }
"""


def write_report(workdir: Path) -> Path:
    """Writes `workdir`/report.html from the files of the run and returns its path. Works at any moment of a run."""
    workdir = Path(workdir)
    config, run, data, tables = (_read(workdir / name) for name in (
        "config.json", "run.json", "data_statistics.json", "evaluation.json"))
    records = read_metrics(workdir)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval" in record]
    body = "\n".join([
        _head(workdir, config, run, steps),
        _curves(config, steps, evaluations),
        _stages(config),
        _evaluation(evaluations, tables.get("tables", [])),
        _data(data),
        _commands(workdir),
        f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{html.escape(json.dumps(config, indent=2))}</pre>"
        "</details>",
    ])
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
            f'initial-scale=1"><title>{html.escape(workdir.name)}: lljax report</title><style>{STYLE}</style>{body}</html>')
    path, unfinished = workdir / "report.html", workdir / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _head(workdir, config, run, steps) -> str:
    model = config.get("model", {}).get("path", "")
    facts = {"base": model, "training": config.get("train_type", ""),
             "context": f"{config.get('context', {}).get('length', 0):,} tokens"}
    if run:
        facts |= {"trained / all parameters": f"{number_of(run['trainable'])} / {number_of(run['parameters'])}",
                  "devices": f"{run['devices']} x {run['device']}"}
    if steps:
        facts |= {"steps": f"{steps[-1]['step']:,}", "tokens predicted": number_of(sum(s["tokens"] for s in steps)),
                  "time in steps": _duration(sum(s["seconds"] for s in steps)),
                  "last loss": f"{smooth([(s['step'], s['loss']) for s in steps])[-1][1]:.4f}" if any(
                      isinstance(s["loss"], float) for s in steps) else "none",
                  "skipped steps": str(sum(bool(s["skipped"]) for s in steps))}
    cells = "".join(f"<div><span>{html.escape(name)}</span><b>{html.escape(str(value))}</b></div>"
                    for name, value in facts.items())
    return f'<h1>{html.escape(workdir.name)}</h1><p>A long-context training run of lljax.</p><div class="facts">{cells}</div>'


def _curves(config, steps, evaluations) -> str:
    bands, start = [], 0
    for until, length, attention in config.get("context", {}).get("schedule", ()):
        bands.append(Band(start, until, f"{length:,} {attention}"))
        start = until
    bands = [band for band in bands if steps and band.start < steps[-1]["step"]]
    bands = [band._replace(stop=min(band.stop, steps[-1]["step"])) for band in bands]

    def series(name):
        return [(record["step"], record.get(name)) for record in steps]
    alarms = [(s["step"], s["grad_norm"]) for s in steps if s["spike"] or s["skipped"]]
    held_out = [(e["step"], value) for e in evaluations for name, value in e["eval"].items() if name.startswith("loss@")]
    charts = {
        "Loss": ("per token; held-out in orange" if held_out else "per token",
                 line_chart([Line(series("loss"), "raw"), Line(smooth(series("loss")), "smooth"), Line(held_out, "eval")],
                            bands=bands)),
        "Learning rate": ("", line_chart([Line(series("learning_rate"), "smooth")], bands=bands)),
        "Gradient norm": ("before clipping, log scale" + ("; alarms ringed" if alarms else ""),
                          line_chart([Line(series("grad_norm"), "raw"), Line(smooth(series("grad_norm")), "smooth")],
                                     bands=bands, marks=alarms, log=True)),
        "Throughput": ("tokens per second", line_chart([Line(series("tokens_per_second"), "smooth")], bands=bands)),
    }
    figures = "".join(f"<figure><figcaption>{name} <small>{note}</small></figcaption>{chart}</figure>"
                      for name, (note, chart) in charts.items())
    return f'<h2>Curves</h2><div class="charts">{figures}</div>'


def _stages(config) -> str:
    rows, start = [], 0
    for until, length, attention in config.get("context", {}).get("schedule", ()):
        rows.append([f"{start + 1:,} to {until:,}", f"{length:,}", attention])
        start = until
    return "<h2>Stages</h2>" + table(["steps", "row length", "attention"], rows) if rows else ""


def _evaluation(evaluations, tables) -> str:
    parts = [table(t["columns"], t["rows"], t.get("caption", "")) for t in tables]
    if evaluations:
        names = list(dict.fromkeys(name for e in evaluations for name in e["eval"]))
        rows = [[f"{e['step']:,}", *(f"{e['eval'][n]:.4g}" if isinstance(e["eval"].get(n), float) else "" for n in names)]
                for e in evaluations]
        parts.append(table(["step", *names], rows, "Held-out documents during the run"))
    return "<h2>Evaluation</h2>" + ("".join(parts) or "<p>No evaluation yet.</p>")


def _data(data) -> str:
    rows = [[part, f"{d['documents']:,}", f"{d['tokens']:,}", f"{d['trained_tokens']:,}",
             *(f"{d['lengths'].get(q, 0):,}" for q in ("p50", "p90", "p99", "max"))] for part, d in data.items()]
    if not rows:
        return ""
    histogram = data["train"]["histogram"]
    lengths = [[f"{low:,} to {high - 1:,}", f"{count:,}"] for low, high, count in
               zip(histogram["edges"], histogram["edges"][1:], histogram["counts"])]
    return ("<h2>Data</h2>" + table(["documents of", "number", "tokens", "trained tokens", "median length", "90%", "99%",
                                     "longest"], rows)
            + "<details><summary>Lengths of training documents, in tokens</summary>"
            + table(["length", "documents"], lengths) + "</details>")


def _commands(workdir) -> str:
    w = html.escape(str(workdir))
    return ("<h2>What to do with it</h2><pre>"
            f"python scripts/export.py --workdir={w} --format=peft     # an adapter for PEFT\n"
            f"python scripts/export.py --workdir={w} --format=merged   # a checkpoint for transformers and vLLM\n"
            f"python scripts/export.py --workdir={w} --format=split    # a base and a plain LoRA for vllm --enable-lora\n"
            f"python scripts/evaluate.py --workdir={w}                 # held-out perplexity by length\n"
            f"python scripts/generate.py --workdir={w} --prompt='...'  # talk to it</pre>")


def table(columns, rows, caption: str = "") -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}{line(columns, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def number_of(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
