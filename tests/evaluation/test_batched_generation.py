import math

import pytest
from generation.cases import build, scripted

from lljax.data.template import PLAIN_TEMPLATE
from lljax.errors import DataError, ModelError
from lljax.evaluation import batched_generation as module
from lljax.evaluation.batched_generation import (
    EvalModel,
    EvalSettings,
    score_tasks,
    too_short,
)
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.task import Example, Task, TooShort, mean


def capitals(tokenizer, length, samples, seed):
    if length < 16:
        raise TooShort(f"capitals: {length} tokens are few")
    for i, (country, capital) in enumerate(
        (("France", "Paris"), ("Peru", "Lima"), ("Chad", "Oslo"))[:samples]
    ):
        yield Example(
            str(i), f"Of {country}?", (capital,), 4 + i, " It is", chat=i > 0, groups=(country[0],)
        )


TASK = Task(
    "capitals", capitals, mean(lambda text, example: float(text.strip() in example.answers))
)


class Stub:
    """Answers by what it reads, at more length than asked for, and notes what that was."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read = tokenizer, []

    def __call__(self, request):
        assert request.stop == {0}
        self.read.append(self.tokenizer.decode(request.prompt))
        return self.tokenizer(" Paris" if "France" in self.read[-1] else " Lima")["input_ids"]


@pytest.fixture
def asked(tokenizer, monkeypatch):
    stub = Stub(tokenizer)
    monkeypatch.setattr(module, "Engine", scripted(stub))
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN_TEMPLATE)
    return lambda **changes: (
        stub,
        EvalSettings(tokenizer, **({"stop": frozenset({0}), "rows": 2} | changes)),
    )


def test_a_models_answers_are_scored_kept_and_found_again(asked, tokenizer, tmp_path):
    stub, settings = asked()
    with Predictions(tmp_path / "made.jsonl") as made:
        score, short = score_tasks(
            EvalModel(build(), "base", "base 1"), [TASK], [64, 8], settings, made
        )
    assert stub.read == ["Of France? It is", "Of Peru? It is", "Of Chad? It is"]
    assert (score.model, score.task, score.length, score.samples) == ("base", "capitals", 64, 3)
    cut = tokenizer.decode(tokenizer(" Paris")["input_ids"][:4])
    right = [float(cut.strip() == "Paris"), 1.0, 0.0]
    assert score.score == pytest.approx(100 * sum(right) / 3)
    assert score.groups == {"F": 100 * right[0], "P": 100.0, "C": 0.0}
    assert math.isnan(short.score) and (short.length, short.samples) == (8, 0)
    with Predictions(tmp_path / "made.jsonl") as made:
        (again,) = score_tasks(EvalModel(build(), "base", "base 1"), [TASK], [64], settings, made)
        assert again == score and len(stub.read) == 3
        assert made.of("base 1", "capitals", 64) == {"0": cut, "1": " Lima", "2": " Lima"}
        list(score_tasks(EvalModel(build(), "base", "base 2"), [TASK], [64], settings, made))
        assert len(stub.read) == 6


def test_a_template_that_raises_is_reported_before_a_model_is_loaded(asked, tokenizer, monkeypatch):
    _, settings = asked(chat=True)
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ raise_exception('roles\nmust alternate') }}"
    )
    with pytest.raises(
        ModelError, match=r"^the chat template refuses the conversation \(.*roles\)$"
    ):
        too_short([TASK], [64], settings)


def test_a_chat_model_is_asked_through_its_template_where_the_example_allows_it(asked, tmp_path):
    stub, settings = asked(chat=True)
    with Predictions(tmp_path / "made.jsonl") as made:
        list(score_tasks(EvalModel(build(), "base", "base 1"), [TASK], [64], settings, made))
    assert stub.read[:2] == ["Of France? It is", "### User:\nOf Peru?\n### Assistant:\n It is"]
    lengths = []
    noted = Task(
        "noted", lambda tokenizer, length, samples, seed: iter([lengths.append(length)]), TASK.score
    )
    next(settings.examples(noted, 64))
    assert lengths == [64 - len(settings.tokens(Example("", "x", (), 0))) + 1]


def test_mistakes_come_first_and_short_lengths_are_named(asked):
    _, settings = asked()
    assert too_short([TASK], [8, 64], settings) == {("capitals", 8): "capitals: 8 tokens are few"}

    def broken(*_):
        raise DataError("no file")
        yield

    with pytest.raises(DataError):
        too_short([TASK, Task("broken", broken, TASK.score)], [64], settings)
