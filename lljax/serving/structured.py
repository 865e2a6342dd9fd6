"""Answers of a given form: response_format -> a Constraint of the engine, through llguidance.

llguidance is an optional dependency; without it such requests are refused.
"""

import json
import logging
import weakref
from typing import Any

import numpy as np

from lljax.errors import first_line, short
from lljax.generation.completion import Constraint
from lljax.serving.errors import wrong

PARAM = "response_format"
ANY_OBJECT = {"type": "object"}
_TOKENIZERS = weakref.WeakKeyDictionary()  # building one takes about a second


class Guided:
    """A Constraint by a matcher of llguidance. size: of the vocabulary, padding included. end: the
    token to write when nothing else may come.
    """

    def __init__(self, matcher: Any, size: int, end: int):
        self._matcher, self._size, self._end = matcher, size, end

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self._size, bool)
        if not (self._matcher.is_stopped() or self._matcher.is_error()):
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[: self._size]
            mask[: len(bits)] = bits.astype(bool)
        if not mask.any():
            mask[self._end] = True
        return mask

    def accept(self, token: int) -> None:
        if not (self._matcher.is_stopped() or self._matcher.is_error()):
            self._matcher.consume_token(token)


def constraint_for(form: dict[str, Any] | None, tokenizer: Any, size: int) -> Constraint | None:
    """The constraint of a `response_format`; None for free text. It belongs to one completion.

    Raises:
      ApiError: the format is unknown, its schema cannot be used, or llguidance is missing.
    """
    schema = _schema(form)
    if schema is None:
        return None
    try:
        import llguidance
    except ImportError:
        raise wrong(
            PARAM, "the server lacks llguidance: pip install 'lljax[structured]'", "not_installed"
        ) from None
    if tokenizer.eos_token_id is None:
        raise wrong(PARAM, "the model's tokenizer has no token that ends a text")
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        wrapped = _wrapped(tokenizer, size)
        if fault := llguidance.LLMatcher.validate_grammar(grammar, wrapped):
            raise ValueError(fault)
        matcher = llguidance.LLMatcher(wrapped, grammar, log_level=0)
    except (ValueError, RuntimeError, TypeError) as error:
        logging.debug("response_format", exc_info=True)
        raise wrong(PARAM, f"the schema cannot be used: {first_line(error)[:200]}") from None
    return Guided(matcher, size, tokenizer.eos_token_id)


def _schema(form: dict[str, Any] | None) -> Any:
    """The JSON schema of a `response_format`; None for free text."""
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return ANY_OBJECT
    if form.get("type") != "json_schema":
        raise wrong(
            f"{PARAM}.type",
            f"must be 'text', 'json_object' or 'json_schema', not {short(form.get('type'))}",
        )
    described = form.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise wrong(f"{PARAM}.json_schema.schema", "must be a JSON schema")
    return schema


def _wrapped(tokenizer: Any, size: int) -> Any:
    from llguidance.hf import from_tokenizer

    if tokenizer not in _TOKENIZERS:
        _TOKENIZERS[tokenizer] = from_tokenizer(tokenizer, n_vocab=size)
    return _TOKENIZERS[tokenizer]
