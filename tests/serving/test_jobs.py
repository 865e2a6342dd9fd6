"""The fields of a request reach the engine."""

import pytest
from serving.cases import ScriptedEngine, a_model

from lljax.serving.errors import ApiError
from lljax.serving.fields import COMPLETION, read_fields
from lljax.serving.jobs import text_job


@pytest.fixture
def model(tokenizer):
    return a_model("toy", ScriptedEngine(tokenizer), tokenizer, adapter="mine")


def requests(model, **fields):
    return text_job(read_fields({"prompt": "a"} | fields, COMPLETION), model).requests


def test_every_field_has_its_place(model):
    (first, second) = requests(
        model,
        n=2,
        max_tokens=7,
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        seed=3,
        stop="x",
        stop_token_ids=[9],
        logprobs=2,
        echo=True,
    )
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 0, 0.9)
    assert (sampling.min_p, sampling.repetition, sampling.seed) == (0.1, 1.5, 3)
    assert first.stop == {9, model.tokenizer.eos_token_id} and first.stop_strings == ("x",)
    assert first.tokens == 7 and first.logprobs and first.prompt_logprobs
    assert first.adapter == "mine" and first.constraint is None
    assert (first.numbers, second.numbers) == ((0,), (1,))


def test_a_temperature_of_almost_nothing_is_greedy(model):
    assert requests(model, temperature=1e-7)[0].sampling.temperature == 0


def test_ends_do_not_end_a_text_that_ignores_them(model):
    assert requests(model, ignore_eos=True)[0].stop == frozenset()


def test_a_scored_last_token_is_written_whatever_it_is(model):
    """Otherwise the scores of lm-eval would lack an entry."""
    assert requests(model, max_tokens=1, logprobs=1, echo=True)[0].stop == frozenset()
    assert requests(model, max_tokens=0, echo=True)[0].tokens == 1


def test_each_choice_has_a_constraint_of_its_own(model):
    pytest.importorskip("llguidance")
    first, second = requests(model, n=2, response_format={"type": "json_object"})
    assert first.constraint is not None and first.constraint is not second.constraint


def test_a_prompt_may_fill_the_context_if_nothing_is_written(model):
    ids = [5] * model.longest
    assert requests(model, prompt=ids, max_tokens=0, echo=True)[0].prompt == ids
    with pytest.raises(ApiError, match="513"):
        requests(model, prompt=ids, max_tokens=1)


def test_a_text_is_refused_by_its_characters_before_it_is_tokenized(model):
    with pytest.raises(ApiError, match="at least") as error:
        requests(model, prompt="x" * 1_000_000)
    assert error.value.code == "context_length_exceeded"
