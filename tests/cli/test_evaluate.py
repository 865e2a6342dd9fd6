"""`lljax evaluate`, from a run to its report, and again."""

import csv
import json
import os
import shutil

import pytest
from generation.cases import scripted

from lljax.cli.evaluate import main
from lljax.cli.measure import check_writable, submit
from lljax.errors import ConfigError
from lljax.evaluation import batched_generation as asking
from lljax.evaluation import perplexity, zeroscrolls
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.scores import Score
from lljax.evaluation.task import Example
from lljax.report.page import write_report
from lljax.run import loop


def test_flags_that_do_not_go_together_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--workdir=runs/x", "--adapter=y"])
    assert (
        capsys.readouterr().err
        == "ConfigError: --adapter and --workdir: a run has its own; use --model with --adapter\n"
    )


@pytest.fixture
def command(tiny, documents, tmp_path):
    """Runs the command on a copy of the base, and returns the rows of its tables: (task, model) and
    a cell a length.
    """
    shutil.copytree(tiny, tmp_path / "base")

    def run(*flags):
        main(
            [
                f"--model={tmp_path / 'base'}",
                f"--out={tmp_path / 'out'}",
                f"--held_out={documents}",
                "--documents=3",
                "--samples=1",
                *flags,
            ]
        )
        made = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tables"]
        return {tuple(row[:2]): row[2:] for table in made for row in table["rows"]}

    return run


@pytest.mark.slow
def test_a_base_is_measured_once_and_again_when_its_weights_are_others(
    command, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(asking, "Engine", scripted(lambda request: asked.append(request) or [9]))
    first = command("--tasks=perplexity,perplexity/longlora", "--lengths=16,32")
    assert list(first) == [("perplexity", "base"), ("perplexity/longlora", "base")]
    lines = (tmp_path / "out" / "predictions.jsonl").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(perplexity, "measure", None)  # nothing is measured again
        assert command("--tasks=perplexity,perplexity/longlora", "--lengths=16,32") == first
        assert (tmp_path / "out" / "predictions.jsonl").read_text() == lines
        both = command("--tasks=passkey/tokens", "--lengths=512")
        assert both == first | {("passkey/tokens", "base"): ["0.0"]} and len(asked) == 1
        assert all(
            name in (tmp_path / "out" / "report.html").read_text()
            for name in ("perplexity/longlora", "passkey/tokens")
        )
        chat = command("--tasks=passkey/tokens", "--lengths=512", "--chat")
        assert chat == both | {("passkey/tokens", "base, chat"): ["0.0"]} and len(asked) == 2
    # which are other texts
    other = command("--tasks=perplexity", "--lengths=16,32", "--documents=2")
    assert list(other) == list(chat) and other["perplexity", "base"] != first["perplexity", "base"]

    weights = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    weights[-600:] = bytes(600)  # exported again: the headers and sizes are the same
    (tmp_path / "base" / "model.safetensors").write_bytes(weights)
    assert (
        list(command("--tasks=passkey/tokens", "--lengths=512")) == [("passkey/tokens", "base")]
        and len(asked) == 3
    )
    again = command("--tasks=perplexity", "--lengths=16,32", "--documents=2")
    assert again["perplexity", "base"] != other["perplexity", "base"]


def test_mistakes_and_odd_files_are_one_line(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    for flags, told in (
        (["--tasks=pasky"], "known here: passkey, needle, keychain, ruler"),
        (["--tasks=pasky"], "perplexity/new_tokens"),
        (["--lengths=1000000000000"], "more than 16 times the model's context of 32"),
        (["--tasks=needle", "--lengths=512", "--haystack=/dev/zero"], "not a regular file"),
        ([f"--out={tmp_path / 'file' / 'below'}"], "(not a directory): name another folder"),
        ([f"--out={tmp_path / 'file'}"], "file (not a directory): name another folder with --out"),
        (["--model=/nope"], "ModelError: --model='/nope': no such folder"),
        (["--adapter=/nope"], "--adapter=/nope: there is no such folder"),
        (["--rows=0"], "--rows: '0' is not a whole number above 0"),
        (["--tasks=,"], "it names no task"),
        (["--lengths=" + "9" * 5000], "--lengths=999"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(*flags)
        shown = capsys.readouterr().err
        assert (
            ended.value.code in (2, 3)
            and told in shown
            and len(shown) < 400
            and shown.count("\n") == 1
        )


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root writes everywhere
    with pytest.raises(ConfigError, match="permission denied.: name another folder with --out"):
        check_writable(tmp_path)


def test_a_damaged_perplexity_among_the_predictions_is_measured_again(command, tmp_path):
    first = command("--lengths=16")
    path = tmp_path / "out" / "predictions.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"prediction": "much"}) + "\n{\n")
    assert command("--lengths=16") == first and len(path.read_text().splitlines()) == 3


def test_lengths_measured_before_stay_beside_new_ones(command):
    command("--lengths=16")
    longer = command("--lengths=32")
    assert list(longer) == [
        ("perplexity, 3 documents to 16", "base"),
        ("perplexity, 3 documents to 32", "base"),
    ]
    both = command("--lengths=16,32")
    assert list(both) == [("perplexity", "base")] and "–" not in both["perplexity", "base"]


def questions(n, prompt="What is it?"):
    return [Example(str(i), prompt, ("",), 8) for i in range(n)]


def test_a_submission_holds_the_examples_of_this_command_and_all_of_them(tmp_path, capsys):
    key, scores = (
        "base 1",
        [
            Score("base", f"zeroscrolls_test/{name}", 4096, float("nan"), 3)
            for name in zeroscrolls.TASKS
        ],
    )
    with Predictions(tmp_path / "predictions.jsonl") as made:
        for score in scores:  # of a file with another question and more examples
            for example in [*questions(5, "before"), *questions(2)]:
                made.add(key, score.task, 4096, example, "old")
    path = tmp_path / "zeroscrolls-base-4096.csv"
    with Predictions(tmp_path / "predictions.jsonl") as made:
        for score in scores:
            for example in questions(3):
                if made.find(key, score.task, 4096, example) is None:
                    made.add(key, score.task, 4096, example, "new")
        submit(tmp_path, "base", key, scores, 3, made)
        assert not path.exists() and "4096.csv is not written" in capsys.readouterr().out
        submit(
            tmp_path,
            "base",
            key,
            [*scores[1:], Score("base", scores[0].task, 4096, float("nan"), 0)],
            None,
            made,
        )
        submit(tmp_path, "base", key, scores[1:], None, made)
        # one is too short, or was not asked for
        assert not path.exists() and not capsys.readouterr().out
        submit(tmp_path, "base", key, scores, 4, made)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[1:] for row in rows[:3]] == [["0", "old"], ["1", "old"], ["2", "new"]] and len(
        rows
    ) == 30


@pytest.mark.slow
def test_a_run_is_evaluated_and_nothing_is_asked_twice(run_config, tmp_path, capsys):
    loop.train(run_config, tmp_path / "run")
    flags = [
        f"--workdir={tmp_path / 'run'}",
        "--tasks=perplexity/longlora,passkey/tokens,needle",
        "--lengths=32,512",
        "--samples=1",
        "--held_out=" + run_config.data.train[0],
        f"--out={tmp_path / 'out'}",
        "--documents=3",
    ]
    main(flags)
    assert capsys.readouterr().out.count("– passkey/tokens: task, key and question take") == 1
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    models = ["base", "base, RoPE stretched", "trained"]
    assert [row[:2] for row in found["tables"][0]["rows"]] == [
        ["perplexity/longlora", model] for model in models
    ]
    assert [row[:3] for row in found["tables"][1]["rows"][:3]] == [
        ["passkey/tokens", model, "–"] for model in models
    ]
    assert (
        len(found["charts"]) == 1 + 3
        and write_report(tmp_path / "out").read_text().count("<svg") == 4
    )
    lines = (tmp_path / "out" / "predictions.jsonl").read_text()
    assert lines.count("\n") == 3 * (2 + 1 + 11)
    main(flags)
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == lines
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    main([*flags, "--tasks=needle", "--lengths=512"])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
