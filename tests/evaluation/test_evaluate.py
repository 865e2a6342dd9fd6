"""The script, from a run to its report, and again."""

import json
import subprocess
import sys

import pytest

from lljax.training import loop
from lljax.training.report import write_report


def evaluate(*flags):
    done = subprocess.run([sys.executable, "scripts/evaluate.py", *flags], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


def test_flags_that_do_not_go_together_are_refused():
    code, _, errors = evaluate("--workdir=runs/x", "--adapter=y")
    assert code == 2 and errors == ["ConfigError: --adapter and --workdir: a run has its own; use --model with --adapter"]


@pytest.mark.slow
def test_a_run_is_evaluated_and_nothing_is_asked_twice(run_config, tmp_path):
    loop.train(run_config, tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", "--tasks=perplexity/longlora,passkey/tokens,needle", "--lengths=32,512",
             "--samples=1", "--held_out=" + run_config.data.train[0], f"--out={tmp_path / 'out'}", "--documents=3"]
    code, said, errors = evaluate(*flags)
    assert code == 0, errors
    assert said.count("– passkey/tokens: task, key and question take") == 1
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    models = ["base", "base, RoPE stretched", "trained"]
    assert [row[:2] for row in found["tables"][0]["rows"]] == [["perplexity/longlora", model] for model in models]
    assert [row[:3] for row in found["tables"][1]["rows"][:3]] == [["passkey/tokens", model, "–"] for model in models]
    assert len(found["images"]) == 3 and "data:image/png" in write_report(tmp_path / "out").read_text()
    lines = (tmp_path / "out" / "predictions.jsonl").read_text()
    assert lines.count("\n") == 3 * (1 + 11)
    assert evaluate(*flags)[0] == 0 and (tmp_path / "out" / "predictions.jsonl").read_text() == lines
