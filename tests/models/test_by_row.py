"""Rows under different models of one base equal each model alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.cases import HF, adapted, build, by_layer

from lljax.generation.programs import program_of, read_drawn, read_prompt
from lljax.models import lora
from lljax.models.by_row import CannotMix, mix
from lljax.models.cache import empty_cache, take_rows
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.fp8 import fp8_dot
from lljax.models.rope import RopeSpec

F32 = jnp.dtype("float32")
GRANITE = {
    "model_type": "granite",
    "residual_multiplier": 0.5,
    "logits_scaling": 0.25,
    "attention_multiplier": 0.2,
}


def bases(**changes) -> Decoder:
    return by_layer(build(**changes))


def variants(base: Decoder) -> list[Decoder]:
    stretched = RopeSpec(type="linear", theta=base.spec.rope.theta, factor=4.0)
    tables = ("embed", "norm") if base.spec.tied else ("embed", "head", "norm")
    return [
        base,
        adapted(base, 1, rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
        adapted(
            base, 2, tables, stretched, rank=3, alpha=2.0, targets=("all-linear",), rslora=True
        ),
        adapted(base, 3, ("norm",), rank=2, alpha=2.0, targets=("down_proj",)),
    ]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        pytest.param({"model_type": "qwen3", "tie_word_embeddings": False}, marks=pytest.mark.slow),
        {"model_type": "qwen2", "tie_word_embeddings": False},
        pytest.param({"model_type": "olmo2"}, marks=pytest.mark.slow),
        pytest.param(GRANITE, marks=pytest.mark.slow),
    ],
    ids=[
        "llama, odd heads, tied",
        "qwen3, norms of heads",
        "qwen2, biases",
        "olmo2, norms of whole projections",
        "granite, factors",
    ],
)
def test_every_row_is_its_model_alone(changes):
    models = variants(bases(num_hidden_layers=1, **changes))
    prompt = np.random.default_rng(0).integers(0, HF["vocab_size"], (1, 12)).astype(np.int32)
    count, none = np.full(1, 12, np.int32), np.zeros(1, np.int32)
    token, wanted, caches = np.asarray([7], np.int32), [], []
    for model in models:
        program, weights = program_of(model, F32, None)
        cache = empty_cache(model.spec, 1, 32)
        _, cache = read_prompt(program, weights, cache, prompt, count, none)
        caches.append(cache)
        wanted.append(read_drawn(program, weights, jax.tree.map(jnp.copy, cache), token, none)[0])
    order = np.asarray([2, 0, 3, 1, 2], np.int32)
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *caches)
    program, weights = program_of(
        mix(models, F32), F32, None, tuple(model.spec for model in models)
    )
    zeros = np.zeros(5, np.int32)
    logits, _ = read_drawn(
        program, weights, take_rows(rows, order), np.full(5, 7, np.int32), zeros, order
    )
    np.testing.assert_allclose(logits, jnp.concatenate(wanted)[order], atol=2e-4)
    spread = np.abs(np.concatenate(wanted)[0] - np.concatenate(wanted)[1:]).max(axis=1)
    assert spread.min() > 0.1, "the models differ"


def test_weights_of_the_base_are_not_copied():
    base = bases()
    kernels = {path: v.get_value() for path, v in declared(base)}
    mixed = mix([base, adapted(base, 1, rank=2, alpha=2.0, targets=("q_proj",))], F32)
    assert all(v.get_value() is kernels[path] for path, v in declared(base)), "base is as it was"
    for path, variable in declared(mixed):
        if path in kernels:
            assert variable.get_value() is kernels[path]


def in_fp8(base):
    """An adapter of a run with model.matmul=fp8."""
    model = adapted(base, 1, rank=2, alpha=2.0, targets=("q_proj",))
    for _, linear in lora.linear_layers(model):
        linear.dot = fp8_dot
    return model


@pytest.mark.parametrize(
    "other,reason",
    [
        (lambda base: build(), "stacked"),
        (lambda base: bases(intermediate_size=48), "another way"),
        (in_fp8, "another way"),
        (lambda base: bases(seed=1), "differs"),
        (
            lambda base: adapted(base, 1, rank=2, alpha=2.0, targets=("embed_tokens",)),
            "another way",
        ),
    ],
)
def test_models_that_cannot_share_a_batch_say_why(other, reason):
    base = bases(tie_word_embeddings=False)
    with pytest.raises(CannotMix, match=reason):
        mix([base, other(base)], F32)


def test_adapters_of_tables_with_another_scale_do_not_mix():
    base, settings = bases(tie_word_embeddings=False), {"rank": 2, "targets": ("embed_tokens",)}
    one, other = (adapted(base, 1, alpha=alpha, **settings) for alpha in (2.0, 16.0))
    for factor in ("a", "b"):  # the same arrays, as the server shares them
        getattr(other.embed_lora, factor).set_value(getattr(one.embed_lora, factor).get_value())
    with pytest.raises(CannotMix, match="another way"):
        mix([one, other], F32)
