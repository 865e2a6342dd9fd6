"""Properties of the whole model: causality, isolation of packed documents, remat, the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.attention.pattern import AttentionPattern
from lljax.models.cache import empty_cache
from lljax.models.decoder import Decoder, neftune_noise
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.memory import Memory
from lljax.models.spec import repeats

BASE = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "head_dim": 8,
}
CHUNKED = {
    "model_type": "llama4_text",
    "attention_chunk_size": 12,
    "floor_scale": 4,
    "attn_scale": 1.0,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 40,
    "no_rope_layer_interval": 2,
    "interleave_moe_layer_step": 2,
}
HEADS = [(8, 8), (8, 2), (9, 3), (6, 1)]
PATTERNS = [
    AttentionPattern(),
    AttentionPattern("shifted", group=24),
    AttentionPattern("window", window=10, anchors=3, markers=(5, 7)),
]


def build(N=6, K=2, **changes):
    model = Decoder(
        spec_from_hf(BASE | {"num_attention_heads": N, "num_key_value_heads": K} | changes)
    )
    initialize(model, 0, deviation=0.2)
    return model


def row(T, B=1, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, size=(B, T)), jnp.int32)


def run(model, tokens, pattern, segments=None, positions=None):
    positions = (
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if positions is None
        else positions
    )
    return _logits(*nnx.split(model), tokens, positions, segments, pattern)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _logits(graphdef, state, tokens, positions, segments, pattern):
    model = nnx.merge(graphdef, state)
    return model.logits(model(tokens, positions=positions, segments=segments, pattern=pattern))


@pytest.mark.sample(4)
@pytest.mark.parametrize("N,K", HEADS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.kind)
def test_a_token_changes_no_logit_before_it(N, K, pattern):
    model, tokens = build(N, K), row(90, B=3)
    before = run(model, tokens, pattern)
    for t in (1, 24, 47, 89):
        after = run(model, tokens.at[:, t].set((tokens[:, t] + 1) % 97), pattern)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert np.abs(before[:, t] - after[:, t]).max() > 0


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "pattern,changes",
    [(PATTERNS[0], {}), (PATTERNS[2], {}), (PATTERNS[0], CHUNKED)],
    ids=["full", "window", "chunks"],
)
def test_packed_documents_are_as_if_alone(pattern, changes):
    model = build(**changes)
    a, b = row(40, seed=1), row(27, seed=2)
    tokens = jnp.concatenate([a, b, jnp.zeros((1, 5), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 40 + [2] * 27 + [0] * 5])
    positions = jnp.asarray([[*range(40), *range(27), *[0] * 5]])
    packed = run(model, tokens, pattern, segments, positions)
    np.testing.assert_allclose(packed[:, :40], run(model, a, pattern), atol=2e-5)
    np.testing.assert_allclose(packed[:, 40:67], run(model, b, pattern), atol=2e-5)


def test_a_packed_neighbor_is_invisible_to_shifted_attention():
    model, tokens = build(), row(64)
    segments = jnp.asarray([[1] * 30 + [2] * 34])
    other = tokens.at[:, :30].set(0)
    pattern = PATTERNS[1]
    np.testing.assert_array_equal(
        run(model, tokens, pattern, segments)[:, 30:], run(model, other, pattern, segments)[:, 30:]
    )


def test_anchors_are_seen_from_beyond_the_window_and_no_other_token():
    model, pattern = (
        build(num_hidden_layers=1),
        AttentionPattern("window", window=4, anchors=2, markers=(5,)),
    )
    tokens = jnp.where(row(60) == 5, 6, row(60)).at[0, 20].set(5)
    before = run(model, tokens, pattern)

    def changed(t):
        return np.abs(run(model, tokens.at[0, t].set(8), pattern) - before)[0, 40:].max()

    assert changed(1) > 0 and changed(20) > 0 and changed(10) == 0 and changed(2) == 0


def test_a_model_whose_window_is_narrower_keeps_it():
    """Mistral under full attention still sees no further than its own window."""
    # positions 5 to 12 see 5
    model = build(model_type="mistral", sliding_window=8, num_hidden_layers=1)
    tokens = row(40)
    before, after = (run(model, x, AttentionPattern()) for x in (tokens, tokens.at[0, 5].set(0)))
    assert np.abs(before - after)[0, 13:].max() < 1e-6 < np.abs(before - after)[0, 12].max()


def test_a_chunk_is_not_seen_from_the_next():
    model = build(**CHUNKED | {"num_hidden_layers": 1})  # positions 5 to 11 see 5
    tokens = row(40)
    before, after = (run(model, x, AttentionPattern()) for x in (tokens, tokens.at[0, 5].set(0)))
    assert np.abs(before - after)[0, 12:].max() == 0 < np.abs(before - after)[0, 11].max()


def test_what_is_kept_changes_no_gradient():
    model, tokens = build(num_hidden_layers=4), row(40)
    graphdef, state = nnx.split(model)

    def gradient(memory):
        def loss(state):
            out = nnx.merge(graphdef, state)(tokens, positions=jnp.arange(40)[None], memory=memory)
            return jnp.sum(out**2)

        return jax.jit(jax.grad(loss))(state)

    wanted = gradient(Memory("none"))
    for memory in (
        Memory("full"),
        Memory("attention"),
        Memory("full", tile=12),
        Memory("full", offload=True),
        Memory("attention", offload=True, layers_per_residual=2),
    ):
        for x, y in zip(jax.tree.leaves(gradient(memory)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4, err_msg=str(memory))


@pytest.mark.parametrize(
    "kinds,patterns",
    [
        ("AAAA", "A4"),
        ("AB", "A1 B1"),
        ("DDDMMMMM", "D3 M5"),
        ("AAAAAB" * 4 + "AA", "AAAAAB4 A2"),
        ("ABABABA", "AB3 A1"),
        ("AABB" * 3, "AABB3"),
        ("ABCD", "A1 B1 C1 D1"),
    ],
)
def test_layers_are_cut_into_patterns_that_repeat(kinds, patterns):
    found = repeats(tuple(kinds))
    assert " ".join(f"{''.join(pattern)}{times}" for _, pattern, times in found) == patterns
    assert "".join("".join(pattern) * times for _, pattern, times in found) == kinds
    assert [first for first, *_ in found] == [
        sum(len(p) * n for _, p, n in found[:i]) for i in range(len(found))
    ]


ALTERNATING = {
    "model_type": "gemma3_text",
    "sliding_window": 10,
    "sliding_window_pattern": 4,
    "query_pre_attn_scalar": 8,
}


def test_the_program_of_layers_that_alternate_does_not_grow_with_their_number():
    def lines(L):
        graphdef, state = nnx.split(
            Decoder(
                spec_from_hf(
                    BASE
                    | ALTERNATING
                    | {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": L}
                )
            )
        )
        run = lambda state: nnx.merge(graphdef, state)(row(16), positions=jnp.arange(16)[None])
        return len(str(jax.make_jaxpr(run)(state)).splitlines())

    assert lines(8) == lines(32) < lines(9)


@pytest.mark.slow
def test_layers_that_alternate_may_share_a_residual():
    """Within a pattern of four, and across two of them."""
    graphdef, state = nnx.split(build(**ALTERNATING, num_hidden_layers=8))

    def gradient(memory):
        def loss(state):
            return jnp.sum(
                nnx.merge(graphdef, state)(row(24), positions=jnp.arange(24)[None], memory=memory)
                ** 2
            )

        return jax.jit(jax.grad(loss))(state)

    wanted = gradient(Memory("none"))
    for each in (2, 8):
        got = gradient(Memory("full", layers_per_residual=each))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "pattern,N,K,memory,changes",
    [
        (AttentionPattern("shifted", group=16), 5, 1, Memory("full", True, 2, tile=12), {}),
        (AttentionPattern("window", window=10), 6, 2, Memory("attention", tile=17), {}),
        pytest.param(
            AttentionPattern("shifted", group=16),
            6,
            2,
            Memory("full", tile=13),
            CHUNKED,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            AttentionPattern("shifted", group=16),
            6,
            2,
            Memory("full", tile=13),
            {"model_type": "olmo2"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shifted", "window", "chunks", "norms after"],
)
def test_layers_streamed_in_tiles_change_nothing(pattern, N, K, memory, changes):
    """Tiles that do not divide the row or the group; packed and padded rows."""
    graphdef, state = nnx.split(build(N, K, **changes))
    tokens = row(40, B=2)
    segments = jnp.asarray([[1] * 7 + [2] * 33, [1] * 25 + [0] * 15])
    weights = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 36)), jnp.float32)
        * (segments > 0)[..., None]
    )

    def gradient(memory):
        def loss(state):
            model = nnx.merge(graphdef, state)
            out = model(
                tokens,
                positions=jnp.arange(40)[None].repeat(2, 0),
                segments=segments,
                pattern=pattern,
                memory=memory,
            )
            return jnp.sum(out * weights)

        return jax.jit(jax.value_and_grad(loss))(state)

    for x, y in zip(
        jax.tree.leaves(gradient(memory)), jax.tree.leaves(gradient(Memory("none"))), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": 8},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ],
)
def test_reading_through_the_cache_equals_the_whole_row(changes):
    model, tokens = build(**changes), row(30, B=2)
    whole = run(model, tokens, AttentionPattern())
    cache, parts = empty_cache(model.spec, 2, 40), []
    for start, stop in ((0, 13), (13, 14), (14, 30)):
        hidden, cache = model.continued(cache, tokens[:, start:stop])
        parts.append(model.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
    assert cache.used.tolist() == [30, 30]


def test_noise_is_uniform_within_its_bound_and_follows_the_key():
    x, bound = jnp.ones((2, 50, 32)), 5 / np.sqrt(50 * 32)
    noise = np.asarray(neftune_noise(x, 5.0, jax.random.key(0)) - x)
    assert (
        0.99 * bound < np.abs(noise).max() <= bound * 1.001
        and abs(noise.std() * np.sqrt(3) / bound - 1) < 0.03
    )
    assert np.any(noise != np.asarray(neftune_noise(x, 5.0, jax.random.key(1)) - x))


def test_a_forward_pass_has_noise_only_with_a_key():
    model, tokens = build(), row(12)
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=1)
    def hidden(state, alpha, key):
        return nnx.merge(graphdef, state)(
            tokens, positions=jnp.arange(12)[None], neftune_alpha=alpha, dropout_key=key
        )

    without = hidden(state, 0.0, None)
    np.testing.assert_array_equal(hidden(state, 5.0, None), without)
    assert np.abs(hidden(state, 5.0, jax.random.key(0)) - without).max() > 0.01
