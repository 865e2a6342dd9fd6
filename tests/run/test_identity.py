"""A run resumes under the same settings, files and weights, or is refused by name."""

import contextlib

import pytest

from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.run.identity import check_identity, check_weights, identity_of

IDENTITY = {"base": "b" * 64, "tokenizer": "t", "data": "d", "lora.rank": 8}


def test_an_identity_is_flat_and_has_the_interval_of_checkpoints_only_in_a_run_that_rolls_back():
    config = default_config()
    identity = identity_of(config, base="b")
    assert identity["base"] == "b" and identity["lora.rank"] == config.lora.rank
    assert identity["optimizer.weight_decay.norm"] == 0.0 and "lora" not in identity
    assert "checkpoint.every_steps" not in identity and "training.eval_every" not in identity
    config.alarm.spike = "rollback"
    assert identity_of(config)["checkpoint.every_steps"] == config.checkpoint.every_steps


@pytest.mark.parametrize(
    "field,value", [("base", "c" * 64), ("tokenizer", "u"), ("data", "e"), ("lora.rank", 16)]
)
def test_a_changed_run_is_refused_by_the_name_of_what_changed(field, value):
    check_identity(IDENTITY, dict(IDENTITY))
    with pytest.raises(ConfigError) as refusal:
        check_identity(IDENTITY, IDENTITY | {field: value})
    text = str(refusal.value)
    assert (
        field in text
        and str(IDENTITY[field])[:60] in text
        and str(value)[:60] in text
        and "\n" not in text
    )


@pytest.mark.parametrize(
    "old,new,message",
    [
        (8, 16, r"(8, now 16)"),
        ([[i, 64] for i in range(20)], [[i, 64] for i in range(19)] + [[19, 32]],
         "(at [19]: [19, 64], now [19, 32])"),
        ([1] * 40, [1] * 41, "(at [40]: nothing, now 1)"),
        ({"a": "x" * 90, "b": 1}, {"a": "x" * 90, "b": 2}, "(at ['b']: 1, now 2)"),
        ({"a": ["x" * 90 + "y"]}, {"a": ["x" * 90 + "z"]},
         f"(at ['a'][0]: ...{'x' * 30}y, now ...{'x' * 30}z)"),
    ],
)  # fmt: skip
def test_of_long_values_the_first_place_that_differs_is_shown(old, new, message):
    with pytest.raises(ConfigError) as refusal:
        check_identity({"f": old}, {"f": new})
    assert f"another f {message}" in str(refusal.value)


def test_tuples_and_lists_of_a_config_are_the_same_identity():
    check_identity(
        {"context.schedule": [[10, 64, "full"]]}, {"context.schedule": ((10, 64, "full"),)}
    )


OLD = [[4, 32, "shifted"], [8, 64, "full"]]


@pytest.mark.parametrize(
    "new,may",
    [
        ([[4, 32, "shifted"], [9, 64, "full"]], True),
        ([*OLD, [12, 64, "shifted"]], True),
        ([[4, 32, "shifted"], [9, 64, "full"], [12, 96, "full"]], True),
        (OLD, True),
        ([[4, 32, "shifted"], [6, 64, "full"], [12, 96, "full"]], False),
        ([[4, 32, "full"], [9, 64, "full"]], False),
        ([[5, 32, "shifted"], [9, 64, "full"]], False),
        ([[4, 32, "shifted"]], False),
        ([[12, 32, "shifted"]], False),
    ],
)
def test_a_schedule_may_become_longer_where_it_was_done_and_its_beginning_is_the_same(new, may):
    saved, now = {"context.schedule": OLD}, {"context.schedule": tuple(map(tuple, new))}
    with (
        contextlib.nullcontext()
        if may
        else pytest.raises(ConfigError, match="another context.schedule")
    ):
        check_identity(saved, now, step=8)
    if new != OLD:
        hint = "when step 8 is done it may be made longer" if may else "another context.schedule"
        with pytest.raises(ConfigError, match=hint):
            check_identity(saved, now, step=6)


def test_other_weights_are_refused_by_name_and_what_one_side_does_not_know_does_not_count():
    check_weights({}, {"a": 1})
    check_weights({"a": 1, "b": 2}, {"b": 2, "c": 3})
    with pytest.raises(ConfigError, match="other weights.*b differs"):
        check_weights({"a": 1, "b": 2}, {"a": 1, "b": 3})


def test_runs_without_special_tokens_resume_and_a_cause_is_named_before_its_consequence():
    check_identity({"base": "b"}, {"base": "b", "special_tokens": {"eos_token": "</s>"}})
    with pytest.raises(ConfigError, match="another special_tokens"):
        check_identity(
            {"data": 1, "special_tokens": {"eos_token": "</s>"}},
            {"data": 2, "special_tokens": {"eos_token": "<e>"}},
        )
