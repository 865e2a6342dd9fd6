import json

import pytest

from lljax.build import load_base
from lljax.errors import ConfigError, Stopped
from lljax.evaluation import answer as module
from lljax.evaluation.during import examiner
from lljax.generation.generate import Completion
from lljax.interop.base import open_base
from lljax.models import spec
from lljax.training import loop

TASKS = (("passkey/tokens", 512), ("passkey/tokens", 600))


@pytest.fixture
def base(tiny):
    return open_base(tiny)


def test_a_run_that_was_stopped_among_its_examples_goes_on_from_there(run_config, base, tokenizer, tmp_path, monkeypatch):
    """The answers before are not asked for again, unless the model is another."""
    asked = []

    def right(model, prompts, *, rows, **_):
        asked.extend(prompts)
        keys = [tokenizer.decode(prompt).split("The pass key is ")[1].split(".")[0] for prompt in prompts]
        return [Completion(tokenizer(f" {key}")["input_ids"], None, False) for key in keys]
    monkeypatch.setattr(module, "generate", right)
    run_config.training.eval_tasks, run_config.training.eval_rows = TASKS, 6
    examine = examiner(run_config, base, tokenizer, tmp_path)
    model, looks = load_base(base, spec.from_hf(base.config), "float32"), []

    def look():
        looks.append(1)
        if len(looks) == 5:
            raise Stopped("now")
    with pytest.raises(Stopped):
        examine(model, 3, None, look)
    assert len(asked) == 4                   # a batch of them
    assert examine(model, 3, None, look) == {"passkey/tokens@512": 100.0, "passkey/tokens@600": 100.0}
    assert len(asked) == 12
    examine(model, 4, None, look)
    assert len(asked) == 24


def test_mistakes_come_before_the_run(run_config, base, tokenizer, tmp_path):
    for tasks, message in (((("pass", 512),), "training.eval_tasks: there is no task 'pass'"),
                           ((("passkey/tokens", 16),), "training.eval_tasks: passkey/tokens: .* of 16 tokens"),
                           ((("longbench2", 512),), "name it with --longbench2")):
        run_config.training.eval_tasks = tasks
        with pytest.raises(ConfigError, match=message):
            examiner(run_config, base, tokenizer, tmp_path)


@pytest.mark.slow
def test_a_run_records_what_its_tasks_say(run_config, tmp_path):
    run_config.training.eval_tasks, run_config.training.eval_rows, run_config.training.eval_every = TASKS[:1], 2, 4
    loop.train(run_config, tmp_path, examiner=examiner)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {each["step"]: each["eval"] for each in told if "eval" in each}
    assert sorted(told) == [4, 8] and all("passkey/tokens@512" in each for each in told.values())
    assert "passkey/tokens" in (tmp_path / "report.html").read_text()
