"""The page says what the run did, needs nothing but itself, and survives whatever a run leaves behind."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lljax.training.report import write_report

ROOT = Path(__file__).parents[2]
SCHEDULE = [[10, 8192, "shifted"], [20, 16384, "shifted"], [40, 32768, "full"]]
VOID = {"meta", "br", "hr", "rect", "path", "circle", "line", "polyline"}


def record(step, **changes):
    stage = next(i for i, (until, _, _) in enumerate(SCHEDULE) if step <= until)
    return {"step": step, "stage": stage, "length": SCHEDULE[stage][1], "attention": SCHEDULE[stage][2],
            "learning_rate": 1e-4, "loss": 3.0 - 0.01 * step, "grad_norm": 0.5 + 0.1 * math.sin(step),
            "tokens": 7000.0, "z": 0.0, "nonfinite": False, "spike": False, "skipped": False, "bad": 0,
            "tokens_per_second": 9000.0, "seconds": 1.0} | changes


def page(workdir, records, *, config=None, **files):
    workdir.mkdir(exist_ok=True)
    config = config or {"model": {"path": "base"}, "context": {"length": 32768, "schedule": SCHEDULE}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, content in files.items():
        (workdir / f"{name}.json").write_text(json.dumps(content))
    path = write_report(workdir)
    assert path == workdir / "report.html"
    text = path.read_text(encoding="utf-8")
    check_nesting(text)
    return text


def check_nesting(text):
    class Parser(HTMLParser):
        stack = []

        def handle_starttag(self, tag, attributes):
            if tag not in VOID:
                self.stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in VOID:
                assert self.stack.pop() == tag

    parser = Parser()
    parser.stack = []
    parser.feed(text)
    assert not parser.stack


def coordinates(text):
    return [float(number) for svg in re.findall(r"<svg.*?</svg>", text, re.S)
            for value in re.findall(r' (?:x|y|cx|cy|d|points)="([^"]*)"', svg)
            for number in re.findall(r"-?\d+\.?\d*|nan|inf", value)]


def test_a_whole_run_is_told(tmp_path):
    table = {"columns": ["model", "512"], "rows": [["base", 18.2], ["adapter", "16.44"]], "caption": "Perplexity"}
    part = {"documents": 7872, "tokens": 56780736, "trained_tokens": 34636248, "lengths": {"p50": 4096, "max": 130211},
            "histogram": {"edges": [128, 256, 512], "counts": [12, 80]}}
    text = page(tmp_path / "run", [record(s) for s in range(1, 41)] + [{"step": 40, "eval": {"loss@32768": 2.125}}],
                run={"parameters": 8_212_000_000, "trainable": 30_670_848, "devices": 8, "device": "TPU v5"},
                evaluation={"tables": [table]}, data_statistics={"train": part, "valid": part | {"documents": 152}})
    for told in ("run", "TPU v5", "30.7M", "280", "2.125", "16.44", "Perplexity", "7,872", "152", "130,211",
                 "export.py", "--format=peft", "evaluate.py", "generate.py", "vllm", "schedule"):
        assert told in text, told
    for title in ("Loss", "Learning rate", "Gradient norm"):
        assert title in text
    assert text.count("</svg>") >= 4


def test_every_stage_is_labelled_with_its_length_and_attention(tmp_path):
    text = page(tmp_path, [record(s) for s in range(1, 41)])
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    for length, attention in (("8,192", "shifted"), ("16,384", "shifted"), ("32,768", "full")):
        assert re.search(rf"{length}(?:<[^>]*>|\s)*{attention}", charts), length


def test_nothing_is_fetched_from_anywhere(tmp_path):
    text = page(tmp_path, [record(1)])
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", text.replace("http://www.w3.org/2000/svg", ""))


def test_where_the_peak_is_not_known_there_is_no_utilisation(tmp_path):
    assert "utilisation" not in page(tmp_path, [record(s) for s in range(1, 6)])


def test_light_and_dark_and_a_phone(tmp_path):
    text = page(tmp_path, [record(1)])
    assert "prefers-color-scheme: dark" in text.replace(":dark", ": dark") and 'name="viewport"' in text


@pytest.mark.parametrize("where", ["config", "eval", "table", "device"])
def test_what_a_user_wrote_is_text_and_not_markup(tmp_path, where):
    evil = "<script>alert(1)</script>\"'&"
    config = {"model": {"path": evil if where == "config" else "base"}, "data": {"train": [evil]}}
    tables = {"tables": [{"columns": [evil], "rows": [[evil]], "caption": evil}]} if where == "table" else {}
    run = {"parameters": 10, "trainable": 1, "devices": 1, "device": evil if where == "device" else "cpu"}
    evaluation = {"step": 1, "eval": {evil if where == "eval" else "loss@512": 1.0}}
    text = page(tmp_path, [record(1), evaluation], config=config, run=run, evaluation=tables)
    assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("records", [
    [],
    [record(1)],
    [record(1), record(2)],
    [record(s, loss="nan", grad_norm="nan", nonfinite=True, skipped=True, bad=s) for s in range(1, 6)],
    [record(s, grad_norm="inf" if s == 3 else 1.0, nonfinite=s == 3, skipped=s == 3) for s in range(1, 6)],
    [record(s, loss=0.0, grad_norm=0.0, learning_rate=0.0, tokens_per_second=0.0) for s in range(1, 6)],
    [record(s, loss=10.0 ** (s % 9), grad_norm=10.0 ** (s % 30 - 15)) for s in range(1, 41)],
    [record(s, loss=2.0001) for s in range(30, 34)],
    [record(3), {"step": 3, "eval": {"loss@512": "nan", "perplexity@512": "inf"}}],
], ids=["none", "one", "two", "all nan", "inf", "zero", "huge", "resumed", "nan evaluation"])
def test_whatever_a_run_leaves_gives_a_sane_page(tmp_path, records):
    text = page(tmp_path, records)
    assert all(math.isfinite(number) for number in coordinates(text))


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    page(tmp_path, [record(1)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    write_report(tmp_path)


def test_a_step_that_was_not_finite_is_marked_among_the_alarms(tmp_path):
    def marks(text):
        return len(re.findall(r'class="(?:mark|skipped|warned)[^"]*"', text))
    calm = [record(s) for s in range(1, 11)]
    bad = calm[:4] + [record(5, grad_norm="inf", nonfinite=True, skipped=True)] + calm[5:]
    assert marks(page(tmp_path / "calm", calm)) == 0 and marks(page(tmp_path / "bad", bad)) == 1


def test_a_rollback_is_counted_and_marked_where_the_run_went_on(tmp_path):
    back = {"to": 4, "from": 8, "loss": 90.0, "loss_z": 70.0, "grad_norm": 3.0, "z": 1.0}
    text = page(tmp_path, [record(s) for s in range(1, 5)] + [record(5, rollbacks=[back])] + [record(6)])
    assert "1 rolled back" in text and "back to step 4 from step 8: loss 90" in text and text.count('<circle class="back"') == 1


def test_a_long_run_still_gives_a_small_page(tmp_path):
    page(tmp_path, [record(40) | {"step": s, "loss": 3.0 + math.sin(s)} for s in range(1, 30_001)])
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_the_script_writes_it_and_refuses_a_folder_without_a_run(tmp_path):
    def script(workdir):
        return subprocess.run([sys.executable, "scripts/report.py", f"--workdir={workdir}"], cwd=ROOT, text=True,
                              capture_output=True, env={"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"})
    page(tmp_path / "run", [record(1)])
    done = script(tmp_path / "run")
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html")
    refused = script(tmp_path)
    assert refused.returncode == 2 and "no run was started there" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_trace_shows_as_a_bar_of_parts_that_make_up_the_step(tmp_path):
    profile = {"steps": [20, 21, 22], "devices": 8, "seconds": 2.0, "computing": 1.2, "collectives": 0.5, "data": 0.1,
               "hidden": 0.3}
    text = page(tmp_path, [record(1)], profile=profile)
    widths = [float(w) for w in re.findall(r'class="part\d" x="[\d.]+" y="26" width="([\d.]+)"', text)]
    assert len(widths) == 4 and sum(widths) == pytest.approx(480, abs=0.3) and widths[0] == pytest.approx(288, abs=0.1)
    for told in ("steps 20 to 22", "8 devices", "A step of 2.0 s", "waiting for data", "collectives behind computing"):
        assert told in text, told
