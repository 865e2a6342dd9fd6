"""Answers that share one copy of their prompt's cache are the engine's answers."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from generation.cases import CHUNK, HF, LOCAL, PROMPTS, RNG, build, by_layer

from lljax.attention import forked as attention
from lljax.build import move
from lljax.generation import programs
from lljax.generation.completion import Request
from lljax.generation.engine import Engine
from lljax.generation.forked import lower_programs, write_answers
from lljax.generation.sample import Sampling
from lljax.models.cache import cache_bytes
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.linear import Linear
from lljax.models.mixers import MIXERS
from lljax.models.spec import LayerSpec
from lljax.parallel.sharding import Layout, make_mesh

TOKENS = 20  # more than the slots of a row of 16
LATENT = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
}
FAMILIES = {
    "grouped": {},
    "odd heads": {"num_attention_heads": 9, "num_key_value_heads": 3},
    "one head of keys": {"num_attention_heads": 5, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3"},
    "window": {"model_type": "mistral", "sliding_window": 9},
    "dynamic": {
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "chunked": LOCAL,
    "latent": LATENT,
    "sinks": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
    },
    "soft cap": {"model_type": "gemma2", "sliding_window": 40, "query_pre_attn_scalar": 4},
}


def requests_of(prompt=PROMPTS[0], answers=3, tokens=TOKENS, **changes):
    """The first is greedy; the others draw with numbers of their own."""
    sampled = Sampling(temperature=1.0, seed=3, repetition=1.1)
    return [
        Request(prompt, tokens, sampled if i else Sampling(), numbers=(i,), **changes)
        for i in range(answers)
    ]


def engine_answers(model, requests, **settings):
    return Engine(model, chunk=CHUNK, rows=len(requests), **settings).run(requests)


def forked_answers(model, requests, **settings):
    return write_answers(model, requests, **{"dtype": jnp.float32, "chunk": CHUNK} | settings)


@pytest.fixture
def small_blocks(monkeypatch):
    """The trunk in blocks of few slots. Programs that are compiled know nothing of it."""

    def blocks_of(slots, queries):
        jax.clear_caches()
        monkeypatch.setattr(attention, "SCORE_BYTES", 4 * slots * queries)
        monkeypatch.setitem(attention.SCORE_BYTES_IN_PLACE, "cpu", 4 * slots * queries)

    yield blocks_of
    jax.clear_caches()


FAST = ("grouped", "window", "chunked", "latent")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, changes in FAMILIES.items()
    ],
)
def test_answers_are_those_of_the_engine(changes):
    model, requests = build(**changes), requests_of()
    answers = forked_answers(model, requests)
    assert answers == engine_answers(model, requests)
    assert len({tuple(answer.tokens) for answer in answers}) == len(requests)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name",
    [
        *("grouped", "window"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sinks", "soft cap")),
    ],
)
def test_a_prompt_that_is_attended_to_in_blocks_gives_the_same_answers(name, small_blocks):
    """Windows shorter and longer than a block, and blocks behind the end of the prompt."""
    small_blocks(8, queries=4 * 6)
    model, requests = build(**FAMILIES[name]), requests_of()
    assert forked_answers(model, requests) == engine_answers(model, requests)


@pytest.mark.sample(2)
@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK, 2 * CHUNK + 1])
def test_prompts_of_any_length(length):
    requests = requests_of(RNG.integers(0, 61, length))
    assert forked_answers(build(), requests) == engine_answers(build(), requests)


@pytest.mark.parametrize("tokens", [1, 2, 17, 18])
def test_answers_of_any_length(tokens):
    """17 tokens fill the 16 slots of a row: the last is not read."""
    requests = requests_of(PROMPTS[2], answers=5, tokens=tokens)
    assert forked_answers(build(), requests) == engine_answers(build(), requests)


def test_layers_that_are_not_stacked():
    model, requests = by_layer(build()), requests_of()
    assert forked_answers(model, requests) == engine_answers(build(), requests)


def test_keys_and_values_in_eight_bits():
    requests = requests_of()
    (answers, wanted) = (
        write(build(), requests, cache_dtype=jnp.int8) for write in (forked_answers, engine_answers)
    )
    assert answers == wanted


def test_rows_that_have_ended_are_given_up(monkeypatch):
    """Five answers in eight rows; stop tokens end them one after the other, and the order of those
    that go on is kept."""
    free = engine_answers(build(), requests_of(answers=5))
    ends = [3, 9, 0, 14, TOKENS]
    requests = [
        dataclasses.replace(request, stop=frozenset(answer.tokens[end : end + 1]))
        for request, answer, end in zip(requests_of(answers=5), free, ends, strict=True)
    ]
    rows, step = [], programs.read_drawn

    def recorded(program, weights, cache, *operands):
        rows.append(len(cache.used))
        return step(program, weights, cache, *operands)

    monkeypatch.setattr(programs, "read_drawn", recorded)
    answers = forked_answers(build(), requests)
    monkeypatch.undo()
    assert answers == engine_answers(build(), requests)
    assert rows == sorted(rows, reverse=True) and set(rows) == {8, 4, 2, 1}
    assert len(rows) < TOKENS
    for answer, request in zip(answers, requests, strict=True):
        stopped = answer.reason == "stop"
        assert answer.stop_token == (next(iter(request.stop)) if stopped else None)
    assert [answer.reason for answer in answers].count("length") == 1


def test_nothing_is_computed_once_all_have_ended(monkeypatch):
    (answer,) = engine_answers(build(), requests_of(answers=1))
    requests = requests_of(answers=1, stop=frozenset(answer.tokens[:1]))
    steps, step = [], programs.read_drawn
    monkeypatch.setattr(programs, "read_drawn", lambda *args: steps.append(0) or step(*args))
    (stopped,) = forked_answers(build(), requests)
    assert (stopped.tokens, stopped.stop_token) == ([], answer.tokens[0]) and len(steps) <= 1


def test_what_look_raises_ends_the_writing():
    calls = []

    def look():
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forked_answers(build(), requests_of(), look=look)  # three chunks of the prompt before


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": PROMPTS[1]},
        {"tokens": 3},
        {"logprobs": True},
        {"adapter": "a"},
        {"stop_strings": ("a",)},
    ],
    ids=str,
)
def test_what_only_the_engine_serves_is_refused(change):
    first, *others = requests_of()
    with pytest.raises(AssertionError):
        forked_answers(build(), [first, *others[:-1], dataclasses.replace(others[-1], **change)])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "axes,heads", [({"tensor": 2, "data": 2}, 1), ({"fsdp": 4}, 2)], ids=["tensor", "fsdp"]
)
def test_over_a_mesh_as_on_one_device(axes, heads, monkeypatch):
    """Each device holds one row of the prompt, with its share of the heads."""
    mesh, held, step = make_mesh(**axes, devices=jax.devices()[:4]), set(), programs.read_drawn
    model, requests = nnx.clone(build()), requests_of(answers=5, tokens=6)
    move(model, mesh)

    def recorded(*operands):
        for x in jax.tree.leaves(operands[-1].states):
            held.add(x.sharding.shard_shape(x.shape)[:2])
        return step(*operands)

    monkeypatch.setattr(programs, "read_drawn", recorded)
    answers = forked_answers(model, requests, layout=Layout(mesh))
    monkeypatch.undo()
    assert answers == engine_answers(build(), requests) and held == {(1, heads)}


# ---------------------------------------------------------------- a recurrent mixer
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumState:
    """The decayed sum [B, D] of the tokens so far."""

    total: jax.Array

    def write(self, update, start):
        return update

    def part(self, start, T):
        return self

    def grow(self, slots):
        return self

    def fork(self, B, S):
        return SumState(jnp.repeat(self.total[:1], B, axis=0))


class DecayedSum(nnx.Module):
    """y_t = y_(t-1) / 2 + v_t."""

    hf_name: ClassVar[str] = "decayed"
    refused_modes: ClassVar[Mapping[str, str]] = {}
    ordered: ClassVar[bool] = True

    def __init__(self, spec, layer, hf):
        self.in_proj = Linear((spec.D, spec.D), axes=("embed", None), hf=f"{hf}.in_proj")

    def project(self, x, positions, dropout_key):
        return self.in_proj(x, dropout_key)

    def mix(self, operands, context, state):
        T = operands.shape[1]
        real = jnp.ones(T, bool)[None]
        if context.count is not None:
            real = jnp.arange(T) < context.count[:, None]

        def step(total, xs):
            value, real = xs
            total = jnp.where(real[:, None], total / 2 + value, total)
            return total, total

        xs = (jnp.moveaxis(operands, 1, 0), jnp.broadcast_to(real, operands.shape[:2]).T)
        total, mixed = jax.lax.scan(step, state.total, xs)
        return jnp.moveaxis(mixed, 0, 1), SumState(total)

    def output(self, mixed, dropout_key):
        return mixed

    @staticmethod
    def abstract_state(spec, layer, B, S, dtype):
        return SumState(jax.ShapeDtypeStruct((B, spec.D), jnp.float32))


def test_a_recurrent_state_is_taken_along(monkeypatch):
    monkeypatch.setitem(MIXERS, "decayed", DecayedSum)
    layers = (LayerSpec(mixer="decayed"), LayerSpec())
    model = Decoder(dataclasses.replace(spec_from_hf(HF), layers=layers))
    initialize(model, 0, deviation=0.3)
    requests = requests_of()
    answers = forked_answers(model, requests)
    assert answers == engine_answers(model, requests)
    assert len({tuple(answer.tokens) for answer in answers}) == len(requests)


# ---------------------------------------------------------------- memory
PROMPT, ANSWERS, N = 8192, 8, 4
WIDE = {"num_attention_heads": N, "head_dim": 64, "hidden_size": 64, "num_hidden_layers": 4}


def abstract_model():
    return Decoder(spec_from_hf(HF | WIDE))  # float32, which a CPU does not convert


def lowered_programs(layout=None, **changes):
    settings = {"prompt": PROMPT, "answers": ANSWERS, "tokens": 16, "dtype": jnp.float32}
    return lower_programs(abstract_model(), **settings | changes, layout=layout)


@pytest.mark.sample(2)
@pytest.mark.parametrize("cache_dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_the_prompt_is_in_memory_once(cache_dtype, small_blocks):
    """Beside it there are blocks of it, and no copy of all of it in any dtype."""
    small_blocks(512, queries=ANSWERS * N)
    spec = abstract_model().spec
    trunk, own = (cache_bytes(spec, tokens, cache_dtype) for tokens in (PROMPT, 16))
    weights = sum(4 * x.size for x in jax.tree.leaves(nnx.state(abstract_model())))
    lowered = lowered_programs(cache_dtype=cache_dtype)
    assert set(lowered) == {"read", "write"}
    read, write = (lowered[name].compile().memory_analysis() for name in ("read", "write"))
    assert read.argument_size_in_bytes == pytest.approx(weights + trunk, rel=0.01)
    assert write.argument_size_in_bytes == pytest.approx(weights + trunk + ANSWERS * own, rel=0.01)
    assert write.temp_size_in_bytes < trunk / 4


def test_a_prompt_that_is_one_block_is_read_where_it_lies():
    write = lowered_programs()["write"].compile().memory_analysis()
    assert write.temp_size_in_bytes < cache_bytes(abstract_model().spec, PROMPT, jnp.float32) / 4


def test_a_mesh_shares_the_prompt_that_a_plan_counts():
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    whole, half = (
        lowered_programs(layout)["write"].compile().memory_analysis().argument_size_in_bytes
        for layout in (None, Layout(mesh))
    )
    assert half < 0.6 * whole
