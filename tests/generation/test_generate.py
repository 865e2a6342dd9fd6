import jax.numpy as jnp
import numpy as np
import pytest
from generation.cases import PROMPTS, build

from lljax.generation.generate import generate
from lljax.generation.sample import Sampling


def test_completions_stand_in_the_order_of_their_prompts_and_differ_by_their_number():
    prompts = [PROMPTS[1], PROMPTS[1], PROMPTS[2]]
    sampling = Sampling(temperature=1.5, seed=3)
    completions = generate(build(), prompts, tokens=9, sampling=sampling, rows=2)
    alone = generate(build(), prompts[:1], tokens=9, sampling=sampling)
    assert completions[0].tokens == alone[0].tokens != completions[1].tokens
    assert {c.reason for c in completions} == {"length"} and completions[0].text is None


def test_ends_at_a_stop_token_or_string(tokenizer):
    model = build(vocab_size=300)
    whole = generate(model, PROMPTS[:2], tokens=8, tokenizer=tokenizer)
    assert not whole[0].ended and whole[0].text == tokenizer.decode(whole[0].tokens)
    token = whole[0].tokens[3]
    at = whole[0].tokens.index(token)
    cut = generate(model, PROMPTS[:2], tokens=8, stop=frozenset({token}))
    assert cut[0].ended and cut[0].tokens == whole[0].tokens[:at] and cut[0].text is None
    string = whole[0].text[3:5]
    cut = generate(
        model, PROMPTS[:2], tokens=8, stop_strings=("not there", string), tokenizer=tokenizer
    )
    assert cut[0].ended and cut[0].text == whole[0].text[: whole[0].text.index(string)]


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_a_narrow_cache_is_close(dtype):
    exact, rounded = (
        np.stack([c.tokens for c in generate(build(), PROMPTS, tokens=8, cache_dtype=kept)])
        for kept in (None, dtype)
    )
    assert (exact == rounded).mean() > 0.7
