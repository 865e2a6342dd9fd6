"""The page shows the run, needs no other file, and survives damaged ones."""

import json
import math
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest

from lljax.report.page import write_report

SCHEDULE = [[10, 8192, "shifted"], [20, 16384, "shifted"], [40, 32768, "full"]]
VOID = {"meta", "br", "hr", "img", "rect", "path", "circle", "line", "polyline"}


def record(step, **changes):
    stage = next(i for i, (until, _, _) in enumerate(SCHEDULE) if step <= until)
    return {
        "step": step,
        "stage": stage,
        "length": SCHEDULE[stage][1],
        "attention": SCHEDULE[stage][2],
        "learning_rate": 1e-4,
        "loss": 3.0 - 0.01 * step,
        "grad_norm": 0.5 + 0.1 * math.sin(step),
        "tokens": 7000.0,
        "z": 0.0,
        "nonfinite": False,
        "spike": False,
        "skipped": False,
        "bad": 0,
        "tokens_per_second": 9000.0,
        "seconds": 1.0,
    } | changes


def page(workdir, records, *, config=None, **files):
    workdir.mkdir(exist_ok=True)
    config = config or {
        "model": {"path": "base"},
        "context": {"length": 32768, "schedule": SCHEDULE},
    }
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
    return [
        float(number)
        for svg in re.findall(r"<svg.*?</svg>", text, re.S)
        for value in re.findall(r' (?:x|y|cx|cy|d|points)="([^"]*)"', svg)
        for number in re.findall(r"-?\d+\.?\d*|nan|inf", value)
    ]


def test_the_page_shows_a_whole_run(tmp_path):
    table = {
        "columns": ["model", "512"],
        "rows": [["base", 18.2], ["adapter", "16.44"]],
        "caption": "Perplexity",
    }
    part = {
        "documents": 7872,
        "tokens": 56780736,
        "trained_tokens": 34636248,
        "lengths": {"p50": 4096, "max": 130211},
        "histogram": {"edges": [128, 256, 512], "counts": [12, 80]},
    }
    text = page(
        tmp_path / "run",
        [record(s) for s in range(1, 41)] + [{"step": 40, "eval": {"loss@32768": 2.125}}],
        run={
            "parameters": 8_212_000_000,
            "trainable": 30_670_848,
            "devices": 8,
            "device": "TPU v5",
        },
        evaluation={"tables": [table]},
        data_statistics={"train": part, "valid": part | {"documents": 152}},
    )
    for told in (
        "run",
        "TPU v5",
        "30.7M",
        "280",
        "2.125",
        "16.44",
        "Perplexity",
        "7,872",
        "152",
        "130,211",
        "lljax export --workdir=",
        "--format=peft",
        "lljax evaluate --workdir=",
        "lljax generate --workdir=",
        "vllm",
        "schedule",
    ):
        assert told in text, told
    for title in ("Loss", "Learning rate", "Gradient norm"):
        assert title in text
    assert text.count("</svg>") >= 4


@pytest.mark.parametrize(
    "config,template,conversations,shown",
    [
        (
            {"data": {"valid_fraction": 0.1}},
            True,
            0,
            {"peft", "merged", "split", "perplexity", "Chat"},
        ),
        ({"train_type": "full"}, False, 3, {"merged", "Chat"}),
        ({"lora": {"init": "loftq"}, "data": {"valid": ["v"]}}, False, 0,
         {"merged", "split", "perplexity"}),
        ({"lora": {"dora": True}}, False, 0, {"peft", "merged"}),
    ],
)  # fmt: skip
def test_only_commands_that_serve_the_run_are_shown(
    tmp_path, config, template, conversations, shown
):
    text = page(
        tmp_path,
        [record(1)],
        config=config,
        run={"chat_template": template},
        data_statistics={"train": {"documents": 3, "conversations": conversations}},
    )
    marks = {name: f"--format={name}" for name in ("peft", "merged", "split")}
    marks |= {"perplexity": "Held-out perplexity by length", "Chat": "Chat"}
    assert {name for name, mark in marks.items() if f">{mark}<" in text or f"{mark}<" in text} == (
        shown
    )


def test_every_stage_is_labelled_with_its_length_and_attention(tmp_path):
    text = page(tmp_path, [record(s) for s in range(1, 41)])
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    for length, attention in (("8,192", "shifted"), ("16,384", "shifted"), ("32,768", "full")):
        assert re.search(rf"{length}(?:<[^>]*>|\s)*{attention}", charts), length


def test_nothing_is_fetched_from_anywhere(tmp_path):
    text = page(tmp_path, [record(1)])
    assert not re.search(r"src\s*=|href\s*=\s*(?!\"#)|@import|url\((?!#)|https?://", text)


def test_there_is_no_utilization_if_the_peak_is_unknown(tmp_path):
    assert "Model FLOPs utilization" not in page(tmp_path, [record(s) for s in range(1, 6)])


def test_light_and_dark_and_a_phone(tmp_path):
    text = page(tmp_path, [record(1)])
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


@pytest.mark.parametrize("where", ["config", "eval", "table", "device", "finding", "charts"])
def test_text_of_a_user_is_never_markup(tmp_path, where):
    evil = "<script>alert(1)</script>\"'&"
    config = {"model": {"path": evil if where == "config" else "base"}, "data": {"train": [evil]}}
    tables = (
        {"tables": [{"columns": [evil], "rows": [[evil]], "caption": evil}]}
        if where == "table"
        else {}
    )
    if where in ("finding", "charts"):
        lines = {
            "kind": "curves",
            "title": evil,
            "log": False,
            "lengths": [512, 1024],
            "lines": {evil: [1.0, 2.0]},
        }
        grid = {
            "kind": "heatmap",
            "title": evil,
            "lengths": [512],
            "rows": [evil],
            "values": [[1.0]],
            "samples": [1],
        }
        tables = {
            "finding": [dict.fromkeys(("what", "before", "after", "note", "between"), evil)],
            "charts": [lines, grid],
        }
    run = {
        "parameters": 10,
        "trainable": 1,
        "devices": 1,
        "device": evil if where == "device" else "cpu",
    }
    evaluation = {"step": 1, "eval": {evil if where == "eval" else "loss@512": 1.0}}
    text = page(tmp_path, [record(1), evaluation], config=config, run=run, evaluation=tables)
    assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(1)],
        [record(1), record(2)],
        [
            record(s, loss="nan", grad_norm="nan", nonfinite=True, skipped=True, bad=s)
            for s in range(1, 6)
        ],
        [
            record(s, grad_norm="inf" if s == 3 else 1.0, nonfinite=s == 3, skipped=s == 3)
            for s in range(1, 6)
        ],
        [
            record(s, loss=0.0, grad_norm=0.0, learning_rate=0.0, tokens_per_second=0.0)
            for s in range(1, 6)
        ],
        [record(s, loss=10.0 ** (s % 9), grad_norm=10.0 ** (s % 30 - 15)) for s in range(1, 41)],
        [record(s, loss=2.0001) for s in range(30, 34)],
        [record(3), {"step": 3, "eval": {"loss@512": "nan", "perplexity@512": "inf"}}],
    ],
    ids=["none", "one", "two", "all nan", "inf", "zero", "huge", "resumed", "nan evaluation"],
)
def test_any_run_gives_a_page_without_odd_coordinates(tmp_path, records):
    text = page(tmp_path, records)
    assert all(math.isfinite(number) for number in coordinates(text))


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    page(tmp_path, [record(1)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    write_report(tmp_path)


def test_a_step_that_was_not_finite_is_marked_among_the_alarms(tmp_path):
    def marks(text):
        return len(re.findall(r'<g class="(?:skipped|warned)"', text))

    calm = [record(s) for s in range(1, 11)]
    bad = calm[:4] + [record(5, grad_norm="inf", nonfinite=True, skipped=True)] + calm[5:]
    assert marks(page(tmp_path / "calm", calm)) == 0 and marks(page(tmp_path / "bad", bad)) == 1


def test_a_rollback_is_counted_and_marked_at_the_next_step(tmp_path):
    back = {"to": 4, "from": 8, "loss": 90.0, "loss_z": 70.0, "grad_norm": 3.0, "z": 1.0}
    text = page(
        tmp_path, [record(s) for s in range(1, 5)] + [record(5, rollbacks=[back])] + [record(6)]
    )
    assert (
        "1 rolled back" in text
        and "back to step 4 from step 8: loss 90" in text
        and text.count('<g class="back"') == 1
    )


def test_a_long_run_still_gives_a_small_page_in_seconds(tmp_path):
    page(tmp_path, [record(1)])
    every_alarm = [
        record(40, spike=True, rollbacks=[{"to": 1, "from": 2, "loss": 1.0, "grad_norm": 1.0}])
        | {"step": s, "loss": 3.0 + math.sin(s)}
        for s in range(1, 100_001)
    ]
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in every_alarm)
    start = time.process_time()
    text = write_report(tmp_path).read_text()
    assert time.process_time() - start < 10  # about 2 on an idle machine
    assert len(text) < 500_000 and "Only 200 of the marked steps are drawn" in text


def evaluated(**changes):
    finding = {
        "what": "Perplexity at 4,096 tokens",
        "before": "111.21",
        "after": "18.90",
        "note": "n=5",
    }
    chart = {
        "kind": "curves",
        "title": "By length",
        "log": True,
        "lengths": [512, 1024],
        "lines": {"base": [20.0, None]},
    }
    grid = {
        "kind": "heatmap",
        "title": "Needles",
        "lengths": [512],
        "rows": ["0%"],
        "values": [[50.0]],
        "samples": [3],
    }
    return {
        "finding": [finding],
        "charts": [chart, grid],
        "tables": [
            {"columns": ["task", "512"], "rows": [["vt", "90.0 (n=5)"]], "caption": "Scores"}
        ],
    } | changes


def test_the_finding_comes_first_from_an_evaluation_or_from_evaluations_during_training(tmp_path):
    records = [
        record(1),
        *(
            {"step": step, "eval": {"perplexity@512": 9.0, "perplexity@4096": value}}
            for step, value in ((10, 30.0), (20, 25.0), (40, 20.5))
        ),
    ]
    text = page(tmp_path / "a", records, evaluation=evaluated())
    assert 0 < text.index("111.21 <span>→</span> <b>18.90</b>") < text.index("<dt>steps</dt>")
    assert "base → trained, n=5" in text and "step 10 to" not in text
    text = page(tmp_path / "b", records)
    assert "30.00 <span>→</span> <b>20.50</b>" in text and "at 4,096 tokens" in text
    assert "step 10 to step 40, during training" in text
    assert not finding(page(tmp_path / "c", [record(1)]))
    single = finding(page(tmp_path / "d", [record(1), records[-1]]))
    assert "<b>20.50</b>" in single and "<span>" not in single
    assert '<dd class="note">step 40, during training</dd>' in single


def finding(text):
    return "".join(re.findall('<section class="finding">.*?</section>', text, re.S))


def test_the_finding_has_the_context_before_and_after_and_the_retrieval(tmp_path):
    evaluations = [
        {"step": step, "eval": {"needle@32768": score, "loss@32768": 2.0, "perplexity@8192": 9.0}}
        for step, score in ((10, 12.0), (40, 96.0))
    ]
    text = finding(page(tmp_path, [record(1), *evaluations], run={"base_length": 8192}))
    assert "8,192 <span>→</span> <b>32,768</b>" in text
    assert "needle at 32,768 tokens" in text and "12.00 <span>→</span> <b>96.00</b>" in text
    assert "loss" not in text


def test_a_metric_of_any_objective_has_a_curve_under_its_title(tmp_path):
    records = [record(s, reward=s / 9, margin=1.0) for s in range(1, 9)]
    titles = {"loss": "Loss per answer", "reward": "Mean reward <"}
    text = page(tmp_path, records, run={"metrics": titles})
    names = re.findall(r'aria-label="([^"]*)"', text)
    assert names == [
        "Loss per answer",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Mean reward &lt;",
        "margin",
    ]


def test_held_out_perplexity_has_a_curve_for_each_length(tmp_path):
    evaluations = [
        {"step": s, "eval": {"perplexity@512": 9.0 - s, "perplexity@1024": 8.0 - s}} for s in (1, 2)
    ]
    text = page(tmp_path, [record(1), record(2), *evaluations])
    assert 'aria-label="Held-out perplexity"' in text
    assert '<i class="series1"></i>1,024 tokens' in text


def test_charts_have_the_colors_of_the_page_and_every_cell_its_column(
    tmp_path,
):
    lines = {name: [50.0, 60.0] for name in ("one", "two", "three")}
    text = page(
        tmp_path,
        [],
        evaluation=evaluated(
            charts=[
                {
                    "kind": "curves",
                    "title": "Equal",
                    "log": False,
                    "lengths": [512, 1024],
                    "lines": lines,
                },
                evaluated()["charts"][1],
            ]
        ),
    )
    assert all(text.count(f'<g class="series{i}"><title>') == 2 for i in range(3))
    assert all(f'<i class="series{i}"></i>{name}' in text for i, name in enumerate(lines))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "n=3" in drawn and "var(--series2)" in drawn and not re.search("#[0-9a-f]{6}", drawn)
    assert (
        '<td data-column="task">vt</td><td class="number" data-column="512">90.0 (n=5)</td>' in text
    )


def test_the_page_shows_the_newest_results_of_the_lm_evaluation_harness(tmp_path):
    def left(name, accuracy, **more):
        path = tmp_path / "run" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "results": {
                        "arc_easy": {
                            "alias": "arc_easy",
                            "acc,none": accuracy,
                            "acc_stderr,none": 0.04,
                            "acc_norm,none": 0.25,
                            "acc_norm_stderr,none": "N/A",
                        }
                    },
                    "n-shot": {"arc_easy": 5},
                    "n-samples": {"arc_easy": {"original": 2376, "effective": 50}},
                    "config": {"model": "lljax", "model_args": "workdir=runs/x"},
                }
                | more
            )
        )

    left("results_2026-01-02T10.json", 0.375)
    left("sub/results_2026-01-01T10.json", 0.125)
    left("results_2026-01-03T10.json", 0.5, config=[], results=5)
    text = page(tmp_path / "run", [record(1)])
    cells = re.findall(r'<tr>(<td data-column="task">arc_easy.*?)</tr>', text)
    told = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in cells]
    assert told == [
        ["arc_easy", "workdir=runs/x", "5", "acc", "0.3750", "0.04000", "50"],
        ["arc_easy", "workdir=runs/x", "5", "acc_norm", "0.2500", "–", "50"],
    ]


ODD = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    1e308,
    "",
    "x" * 100_000,
    [],
    {},
    [[]],
    {"a": {"b": []}},
    "\ud800",
    "<script>",
]


def mutated(rng, value):
    if rng.random() < 0.12:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {name: mutated(rng, each) for name, each in value.items() if rng.random() > 0.04}
    return [mutated(rng, each) for each in value] if isinstance(value, list) else value


def test_files_that_hold_anything_give_a_page_of_the_rest(tmp_path):
    rng = random.Random(0)
    part = {
        "documents": 5,
        "tokens": 50,
        "trained_tokens": 40,
        "lengths": {"p50": 4},
        "histogram": {"edges": [1, 2], "counts": [5]},
    }
    profile = {
        "steps": [2, 3],
        "devices": 8,
        "seconds": 2.0,
        "computing": 1.2,
        "collectives": 0.5,
        "data": 0.1,
        "hidden": 0.3,
    }
    files = {
        "config": {"model": {"path": "base"}, "context": {"length": 32768, "schedule": SCHEDULE}},
        "profile": profile,
        "run": {"parameters": 10, "trainable": 1, "devices": 1, "device": "cpu"},
        "evaluation": evaluated(),
        "data_statistics": {"train": part},
        "results_1": {"results": {"arc": {"acc,none": 0.5}}, "config": {}},
    }
    records = [record(step) for step in range(1, 12)] + [
        {"step": 11, "eval": {"perplexity@512": 9.0}}
    ]
    for _ in range(25):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(mutated(rng, content)))
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(mutated(rng, each)) + "\n" for each in records)
        )
        text = write_report(tmp_path).read_text()
        check_nesting(text)
        assert "<script" not in text and len(text) < 200_000


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b"5", b"1" * 5000, b"{}", b'{"tables": 1e999}']
)
def test_a_damaged_evaluation_costs_its_part_of_the_page(tmp_path, content, caplog):
    page(tmp_path, [record(1)])
    (tmp_path / "evaluation.json").write_bytes(content)
    assert "trained tokens" in write_report(tmp_path).read_text()
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "evaluation.json").symlink_to("/dev/zero")  # which never ends
    assert "trained tokens" in write_report(tmp_path).read_text()


def test_a_picture_that_is_a_link_or_no_png_is_not_shown(tmp_path):
    (tmp_path / "secret").write_bytes(b"\x89PNG" + b"s" * 40)
    run = tmp_path / "run"
    run.mkdir()
    (run / "link.png").symlink_to(tmp_path / "secret")
    (run / "text.png").write_text("text")
    (run / "good.png").write_bytes(b"\x89PNG" + b"g" * 40)
    text = page(
        run,
        [],
        evaluation={
            "images": [
                {"file": name, "title": "a"}
                for name in ("link.png", "text.png", "../secret", "good.png", "gone.png")
            ]
        },
    )
    assert text.count("<img") == 1


def test_two_may_write_the_report_at_the_same_time(tmp_path):
    page(tmp_path, [record(s) for s in range(1, 41)])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_report(tmp_path), range(8)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
    ]


def test_a_trace_shows_as_a_bar_of_parts_that_make_up_the_step(tmp_path):
    profile = {
        "steps": [20, 21, 22],
        "devices": 8,
        "seconds": 2.0,
        "computing": 1.2,
        "collectives": 0.5,
        "data": 0.1,
        "hidden": 0.3,
    }
    text = page(tmp_path, [record(1)], profile=profile)
    shares = re.findall(r'<g class="part\d"><title>([^<]*)</title>', text)
    assert shares == [
        "computing: 60.0%",
        "collectives: 25.0%",
        "waiting for data: 5.0%",
        "rest: 10.0%",
    ]
    for told in (
        "steps 20 to 22",
        "8 devices",
        "A step of 2.0 s",
        "waiting for data",
        "overlapped collectives",
    ):
        assert told in text, told
