"""What a response_format allows is what its schema takes."""

import json
import sys

import numpy as np
import pytest

from lljax.serving.errors import ApiError
from lljax.serving.structured import constraint_for

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
SIZE = 320  # the tiny model's: more rows than the tokenizer has tokens


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def written(constraint, tokenizer, seed):
    """A text of random tokens, each allowed."""
    rng, tokens = np.random.default_rng(seed), []
    for _ in range(100):
        allowed = constraint.allowed()
        assert allowed.shape == (SIZE,) and allowed.any()
        token = int(rng.choice(np.flatnonzero(allowed)))
        constraint.accept(token)
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("seed", range(3))
def test_random_allowed_tokens_follow_the_schema(tokenizer, seed):
    pytest.importorskip("llguidance")
    constraint = constraint_for(form(SCHEMA), tokenizer, SIZE)
    value = json.loads(written(constraint, tokenizer, seed))
    assert value["name"] in ("a", "b") and type(value["ok"]) is bool
    assert constraint.allowed()[tokenizer.eos_token_id]  # nothing else is left, and one token is


def test_json_object_begins_with_a_brace(tokenizer):
    pytest.importorskip("llguidance")
    constraint = constraint_for({"type": "json_object"}, tokenizer, SIZE)
    allowed = np.flatnonzero(constraint.allowed())
    assert {tokenizer.decode([token])[:1] for token in allowed} <= {"{", " ", "\n", "\t", "\r"}


def test_free_text_has_no_constraint(tokenizer):
    assert constraint_for(None, tokenizer, SIZE) is None
    assert constraint_for({"type": "text"}, tokenizer, SIZE) is None


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"type": "xml"}, "'json_schema', not 'xml'"),
        ({}, "not None"),
        ({"type": "json_schema"}, "must be a JSON schema"),
        (form({"type": "nothing"}), "cannot be used"),
        (form({"$ref": "#/nowhere"}), "cannot be used"),
    ],
)
def test_another_format_is_refused(tokenizer, wrong, message):
    pytest.importorskip("llguidance")
    with pytest.raises(ApiError, match=message) as error:
        constraint_for(wrong, tokenizer, SIZE)
    assert error.value.status == 400 and error.value.param.startswith("response_format")


def test_without_llguidance_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ApiError, match=r"pip install 'lljax\[structured\]'"):
        constraint_for({"type": "json_object"}, tokenizer, SIZE)
