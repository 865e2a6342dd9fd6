"""The counted arithmetic against the products in the program of a step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.attention import causal
from lljax.attention.mask import chunked, visible
from lljax.attention.pattern import AttentionPattern
from lljax.build import mesh_of, placed_model
from lljax.config import default_config
from lljax.planning.flops import of_step, visible_pairs
from lljax.training.curriculum import stages
from lljax.training.placement import abstract_batch
from lljax.training.state import split
from lljax.training.step import make_step, step_settings

T = 64  # a single block of the attention's loops
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def products(jaxpr, of_loop: float) -> float:
    """FLOPs of a program. The body of a scan counts as often as it runs, that of another loop
    `of_loop` times.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                2
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
        times = {"scan": eqn.params.get("length"), "while": of_loop}.get(eqn.primitive.name, 1)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner, of_loop)
    return total


@pytest.mark.parametrize(
    "kind,changes",
    [
        ("full", {"memory.remat": "full"}),
        ("full", {"memory.remat": "attention"}),
        ("full", {"memory.remat": "none"}),
        ("full", {"memory.layers_per_residual": 2}),
        ("full", {"memory.layers_per_residual": 4, "memory.offload": True}),
        ("full", {"memory.tile": 16}),
        ("full", {"memory.tile": 16, "memory.remat": "none"}),
        ("full", {"lora.also_train": ("embed", "norm", "head")}),
        ("full", {"train_type": "full"}),
        ("full", {"training.accumulate": 2, "training.rows": 3}),
        ("shifted", {"memory.tile": 16}),
        ("shifted", {"memory.tile": 16, "memory.remat": "none"}),
        ("shifted", {"memory.tile": 16, "memory.remat": "attention"}),
        ("shifted", {"memory.tile": 16, "memory.layers_per_residual": 2}),
    ],
)
def test_hardware_flops_are_those_of_the_program(kind, changes):
    c = default_config()
    c.context.length, c.context.schedule, c.context.rope.type, c.context.group = (
        T,
        ((1, T, kind),),
        "keep",
        16,
    )
    c.lora.rank, c.lora.also_train, c.model.dtype, c.mesh.fsdp = 4, (), "float32", 1
    c.update_from_flattened_dict(changes)
    mesh, stage = mesh_of(c.mesh, jax.devices()[:1]), stages(c.context)[0]
    model = placed_model(c, LLAMA, mesh)
    parts = split(c, model, mesh)
    batch = abstract_batch(c.training.accumulate, c.training.rows, T, mesh)
    program = jax.make_jaxpr(make_step(parts, step_settings(c)), static_argnums=(3, 4))(
        parts.state, parts.frozen, batch, stage.pattern, None
    ).jaxpr
    # Attention computes whole blocks, in one of two loops; the count is of the pairs that are
    # visible in them. A tile of a shifted row has 16 queries and the 8 keys before them.
    block = T * T if kind == "full" else T * 24
    counted = products(program, 0.5 * visible_pairs(stage.pattern, T) / block)
    assert abs(of_step(model, c, stage).hardware / counted - 1) < 0.05


def test_visible_pairs_of_chunks_are_those_of_the_mask():
    places = jnp.arange(96)[None]
    for chunk, window in ((20, None), (32, 10), (200, None)):
        mask = chunked(causal(1, 96).replace(window=window), places, places, chunk)
        pattern = (
            AttentionPattern() if window is None else AttentionPattern("window", window=window)
        )
        assert visible_pairs(pattern, 96, chunk, chunked=True) == int(
            np.asarray(visible(mask)).sum()
        )


@pytest.mark.parametrize(
    "pattern,window",
    [
        (AttentionPattern(), None),
        (AttentionPattern(), 20),
        (AttentionPattern("window", window=24, anchors=3), None),
    ],
)
def test_visible_pairs_are_those_of_the_mask(pattern, window):
    T = 96
    limit = min((w for w in (window, pattern.window or None) if w), default=None)
    anchors = jnp.arange(T)[None] < pattern.anchors if pattern.anchors else None
    mask = causal(1, T).replace(window=limit, anchors=anchors)
    counted = int(np.asarray(visible(mask)).sum())
    assert abs(visible_pairs(pattern, T, window) - counted) <= 0.02 * counted


def test_groups_count_the_average_of_both_halves_of_the_heads():
    T, G = 96, 16
    halves = [
        int(jax.device_get(visible(causal(1, T).replace(group=G, shift=shift)).sum()))
        for shift in (0, G // 2)
    ]
    assert abs(
        visible_pairs(AttentionPattern("shifted", group=G), T) - np.mean(halves)
    ) <= 0.05 * np.mean(halves)
