import json

import pytest
from generation.cases import scripted

from lljax.build import load_base, move
from lljax.errors import ConfigError, DataError, Stopped
from lljax.evaluation import batched_generation as module
from lljax.evaluation.eval_hook import make_eval_hook
from lljax.interop.open import open_base
from lljax.models.families import spec_from_hf
from lljax.parallel.sharding import Layout, make_mesh
from lljax.run import loop

TASKS = (("passkey/tokens", 512), ("passkey/tokens", 600))


@pytest.fixture
def base(tiny):
    return open_base(tiny)


def test_a_run_that_was_stopped_among_its_examples_goes_on_from_there(
    run_config, base, tokenizer, tmp_path, monkeypatch
):
    """The answers before are not asked for again, unless the model is another."""
    asked = []

    def right(request):
        asked.append(request.prompt)
        key = tokenizer.decode(request.prompt).split("The pass key is ")[1].split(".")[0]
        return tokenizer(f" {key}")["input_ids"]

    monkeypatch.setattr(module, "Engine", scripted(right))
    run_config.training.eval_tasks, run_config.training.eval_rows = TASKS, 6
    hook = make_eval_hook(run_config, base, tokenizer, tmp_path)
    model, looks = load_base(base, spec_from_hf(base.config), "float32"), []

    def look():
        looks.append(1)
        if len(looks) == 5:
            raise Stopped("now")

    with pytest.raises(Stopped):
        hook(model, 3, None, look)
    assert len(asked) == 4  # a batch of them
    assert hook(model, 3, None, look) == {
        "passkey/tokens@512": 100.0,
        "passkey/tokens@600": 100.0,
    }
    assert len(asked) == 12
    hook(model, 4, None, look)
    assert len(asked) == 24


def test_mistakes_come_before_the_run(run_config, base, tokenizer, tmp_path):
    for tasks, message in (
        ((("pass", 512),), "training.eval_tasks: there is no task 'pass'"),
        ((("passkey/tokens", 16),), "training.eval_tasks: passkey/tokens: .* of 16 tokens"),
        (
            (("needle", 10**12),),
            "training.eval_tasks: 1,000,000,000,000 tokens are more than 16 times",
        ),
        ((("longbench2", 512),), "name it with --longbench2 .*training.eval_files"),
        ((("perplexity", 64),), "a run reports 'perplexity' anyway"),
    ):
        run_config.training.eval_tasks = tasks
        with pytest.raises(ConfigError, match=message):
            make_eval_hook(run_config, base, tokenizer, tmp_path)


def test_benchmark_files_and_the_protocols_of_perplexity_are_asked_for_within_a_run(
    run_config, base, tmp_path, monkeypatch
):
    row = {
        "_id": "1",
        "domain": "d",
        "sub_domain": "s",
        "difficulty": "easy",
        "length": "short",
        "question": "first",
        **{f"choice_{letter}": "second" for letter in "ABCD"},
        "answer": "B",
        "context": "return " * 9,
    }
    (tmp_path / "v2.json").write_text(json.dumps([row]))
    monkeypatch.setattr(module, "Engine", scripted(lambda request: [5]))
    run_config.training.eval_tasks = (
        ("longbench2", 900),
        ("perplexity/longlora", 32),
        ("perplexity/new_tokens", 300),
    )
    run_config.training.eval_files.longbench2, run_config.training.eval_rows = (
        str(tmp_path / "v2.json"),
        2,
    )
    run_config.data.valid_fraction = 0.5
    hook, looks = make_eval_hook(run_config, base, base.tokenizer(), tmp_path), []
    whole, meshed = (load_base(base, spec_from_hf(base.config), "float32") for _ in range(2))
    found = hook(whole, 3, None, lambda: looks.append(1))
    assert (
        list(found) == ["perplexity/longlora@32", "perplexity/new_tokens@300", "longbench2@900"]
        and len(looks) == 5
    )
    move(meshed, mesh := make_mesh(fsdp=2, data=2, tensor=2))
    assert hook(meshed, 4, Layout(mesh), lambda: None) == pytest.approx(found)


def test_a_run_without_held_out_documents_answers_its_tasks(
    run_config, train_on_one_device, tmp_path
):
    def make_hook(*_):
        return lambda model, step, layout, look: {"passkey/tokens@64": float(step)}

    run_config.context.schedule, run_config.data.valid_fraction = ((2, 32, "full"),), 0.0
    run_config.training.eval_tasks, run_config.training.eval_every = (("passkey/tokens", 64),), 1
    train_on_one_device(run_config, tmp_path, make_eval_hook=make_hook)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval"] for line in lines if "eval" in line] == [
        {"passkey/tokens@64": 1.0},
        {"passkey/tokens@64": 2.0},
    ]


def test_perplexity_without_held_out_documents_is_refused(run_config, base, tmp_path):
    run_config.data.valid_fraction = 0.0
    run_config.training.eval_tasks = (("perplexity/longlora", 32),)
    with pytest.raises(DataError, match="perplexity/longlora: no document is held out"):
        make_eval_hook(run_config, base, base.tokenizer(), tmp_path)


@pytest.mark.slow
def test_a_run_records_what_its_tasks_say(run_config, tmp_path):
    (
        run_config.training.eval_tasks,
        run_config.training.eval_rows,
        run_config.training.eval_every,
    ) = TASKS[:1], 2, 4
    run_config.context.length = 512
    loop.train(run_config, tmp_path, make_eval_hook=make_eval_hook)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {each["step"]: each["eval"] for each in told if "eval" in each}
    assert sorted(told) == [4, 8] and all("passkey/tokens@512" in each for each in told.values())
    assert "passkey/tokens" in (tmp_path / "report.html").read_text()
