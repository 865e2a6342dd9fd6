"""Log-probabilities in OpenAI's shapes."""

import pytest

from lljax.generation.completion import Logprobs
from lljax.serving.logprobs import TokenTexts, chat_logprobs, text_logprobs


@pytest.fixture(scope="module")
def texts(tokenizer):
    return TokenTexts(tokenizer)


@pytest.mark.parametrize("text", ["def add", "naïve", "😀 ok"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(texts, tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert bytes(byte for token in tokens for byte in texts.bytes(token)) == text.encode()


def test_parts_of_a_character_have_different_keys(texts, tokenizer):
    tokens = tokenizer("😀")["input_ids"]
    keys = [texts.key(token) for token in tokens]
    assert len(set(keys)) == len(keys) == 4 and keys[0] == r"bytes:\xf0"


def test_a_row_without_a_token_has_no_bytes(texts):
    assert texts.bytes(310) == []


def test_the_token_is_among_the_likely_ones_of_a_text(texts):
    rows = [None, Logprobs(-3.0, ((1, -0.5), (2, -float("inf")), (3, -4.0)))]
    body = text_logprobs(texts, [5, 9], rows, [0, 1], top=2)
    assert body["token_logprobs"] == [None, -3.0] and body["top_logprobs"][0] is None
    assert body["top_logprobs"][1] == {
        texts.key(1): -0.5,
        texts.key(2): -9999.0,
        texts.key(9): -3.0,
    }
    assert body["text_offset"] == [0, 1]


def test_an_entry_of_a_chat(texts):
    entry = chat_logprobs(texts, 9, Logprobs(-3.0, ((1, -0.5), (2, -2.0))), top=1)
    assert entry["logprob"] == -3.0 and entry["bytes"] == texts.bytes(9)
    assert [likely["logprob"] for likely in entry["top_logprobs"]] == [-0.5]
