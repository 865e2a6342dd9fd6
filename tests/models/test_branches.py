"""Answers that share a prompt, in the whole model: a packed row against a row for each answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.test_branches import ROWS, layout_of_rows, sequences_of
from attention.test_context_parallel import reorder
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from models.test_decoder import BASE, CHUNKED
from models.test_mixers import HF, MovingAverage, hybrid

from lljax.attention.pattern import FULL, AttentionPattern
from lljax.config import default_config
from lljax.data.batch import Field
from lljax.errors import ConfigError
from lljax.models import lora
from lljax.models.declare import LoraWeight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.memory import EVERYTHING, Memory
from lljax.models.mixers import MIXERS
from lljax.objectives.objective import Pass, PassSettings
from lljax.objectives.sft import SFT
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.sharding import ROWS as ROW_AXES
from lljax.parallel.sharding import TOKENS, Layout, make_mesh
from lljax.run.programs import prepare_programs
from lljax.training import curriculum

V, T = 97, 150
FAMILIES = {
    "llama": {"num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 2},
    "llama4": CHUNKED | {"num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "full_attention_interval": 2,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
PATTERNS = [
    AttentionPattern(),
    AttentionPattern("shifted", group=24),
    AttentionPattern("window", window=10, anchors=3, markers=(5, 7)),
]


def build(family):
    model = Decoder(spec_from_hf(BASE | {"max_position_embeddings": 128} | FAMILIES[family]))
    lora.attach(model, rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
    initialize(model, 0, deviation=0.2)
    for number, (_, variable) in enumerate(declared(model)):
        if isinstance(variable, LoraWeight):
            shape = variable.get_value().shape
            variable.set_value(jax.random.normal(jax.random.key(number), shape) * 0.1)
    return model


def packed_batch():
    rng, shape = np.random.default_rng(0), (len(ROWS), T)
    segments, branches, positions = layout_of_rows(ROWS, T)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, shape), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, V, shape), jnp.int32),
        "weights": jnp.asarray(rng.random(shape) * (segments != 0), jnp.float32),
        "segments": segments,
        "branches": branches,
        "positions": positions,
    }


def separate_batch(packed):
    """Every answer after its prompt in a row of its own. The loss of a prompt counts once."""
    sequences = list(sequences_of(ROWS))
    longest = max(len(places) for _, places in sequences)
    arrays = {
        name: np.zeros((len(sequences), longest), packed[name].dtype)
        for name in ("tokens", "targets", "weights")
    }
    counted = np.zeros((len(ROWS), T), bool)
    for number, (row, places) in enumerate(sequences):
        for name, x in arrays.items():
            x[number, : len(places)] = np.asarray(packed[name])[row, places]
        arrays["weights"][number, : len(places)][counted[row, places]] = 0
        counted[row, places] = True
    positions = np.broadcast_to(np.arange(longest, dtype=np.int32), (len(sequences), longest))
    return {name: jnp.asarray(x) for name, x in (arrays | {"positions": positions}).items()}


def loss_and_gradients(model, batch, pattern, memory):
    """The weighted cross-entropy, and its gradients for the adapters."""
    graphdef, trainable, frozen = nnx.split(model, LoraWeight, ...)

    @jax.jit
    def run(trainable):
        model = nnx.merge(graphdef, trainable, frozen)
        hidden = model(
            batch["tokens"],
            positions=batch["positions"],
            segments=batch.get("segments"),
            branches=batch.get("branches"),
            pattern=pattern,
            memory=memory,
            rope_length=128,
        )
        logits = jax.nn.log_softmax(model.logits(hidden))
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch["weights"]) / 100

    return jax.value_and_grad(run)(trainable)


FAST = [("llama", "shifted"), ("qwen3", "full"), ("llama4", "window"), ("qwen3_5", "shifted")]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "family,pattern",
    [
        pytest.param(
            family,
            pattern,
            id=f"{family}-{pattern.kind}",
            marks=() if (family, pattern.kind) in FAST else pytest.mark.slow,
        )
        for family in FAMILIES
        for pattern in PATTERNS
    ],
)
def test_loss_and_gradients_equal_those_of_a_row_for_each_answer(family, pattern):
    model, batch = build(family), packed_batch()
    # A tile bounds projections and MLP: with branches the layer does not go tile by tile.
    memory = Memory(remat="full", tile=32) if family == "qwen3" else EVERYTHING
    got = loss_and_gradients(model, batch, pattern, memory)
    wanted = loss_and_gradients(model, separate_batch(batch), pattern, EVERYTHING)
    leaves = [jax.tree.leaves(x) for x in (got, wanted)]
    assert len(leaves[0]) > 6 and all(np.any(x) for x in leaves[0])
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_branch_changes_no_other_branch_and_not_the_trunk():
    model, batch = build("llama"), packed_batch()
    places = {name: batch[name] for name in ("positions", "segments", "branches")}
    run = jax.jit(lambda tokens: model(tokens, **places))
    changed = slice(40, 53)  # the first answer of the first row
    tokens = batch["tokens"].at[0, changed].set((batch["tokens"][0, changed] + 1) % V)
    difference = np.asarray((run(batch["tokens"]) != run(tokens)).any(-1))
    assert difference[0, changed].all()
    assert difference.sum() == difference[0, changed].sum()


@pytest.mark.sample(3)
@pytest.mark.parametrize("mode,zigzag", [("allgather", True), ("ring", True), ("ulysses", False)])
def test_devices_change_nothing(mode, zigzag):
    model, batch = build("qwen3"), packed_batch()
    fields = ("tokens", "positions", "segments", "branches")
    batch = {name: jnp.pad(batch[name][:2], ((0, 0), (0, 2))) for name in fields}
    mesh = make_mesh(fsdp=2, sequence=4)

    def run(batch, layout):
        tokens, places = batch["tokens"], {name: batch[name] for name in fields[1:]}
        index = jnp.zeros_like(tokens)  # not read: the positions take its place
        return jax.jit(lambda: model(tokens, **places, index=index, layout=layout))()

    def order(x):
        return reorder(x, 4) if zigzag else x

    where = NamedSharding(mesh, PartitionSpec(ROW_AXES, TOKENS))
    placed = jax.device_put(order(batch), where)
    got = run(placed, Layout(mesh, mode, zigzag))
    np.testing.assert_allclose(got, order(run(batch, None)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trains", [True, False])
def test_a_pass_reads_the_branches_of_its_batch(trains):
    model, batch = build("llama"), packed_batch()
    settings = PassSettings(
        memory=EVERYTHING,
        loss_chunk=0,
        dtype="float32",
        packed=False,
        neftune_alpha=0.0,
        options=None,
    )
    key = jax.random.key(0) if trains else None
    run = jax.jit(Pass(model, settings, FULL, layout=None, key=key).hidden)
    places = {name: batch[name] for name in ("positions", "segments", "branches")}
    np.testing.assert_allclose(run(batch), model(batch["tokens"], **places), rtol=1e-5, atol=1e-5)


def test_the_log_says_what_rows_with_branches_fall_back_to(monkeypatch, caplog):
    branching = dataclasses.replace(SFT, fields=(*SFT.fields, Field("branches")))
    monkeypatch.setitem(OBJECTIVES, "sft", branching)
    c = default_config()
    c.context.schedule, c.context.window, c.training.rows = ((1, 512, "window"),), 16, 2
    c.model.dtype, c.memory.tile = "float32", 32
    caplog.set_level("INFO")
    stages = curriculum.stages(c.context)
    prepared = prepare_programs(c, {}, make_mesh(fsdp=2, sequence=4), build("llama"), stages)
    assert prepared.steps[0].layout.context_parallel == "allgather"
    assert "no halo: an answer looks back to the end of its prompt" in caplog.text
    assert "memory.tile=32, attention by whole rows: an answer looks back" in caplog.text


def test_a_gated_delta_network_reads_branches_on_a_device_that_holds_whole_rows():
    model, batch = build("qwen3_5"), packed_batch()
    fields = {name: batch[name] for name in ("positions", "segments", "branches")}
    layout = Layout(make_mesh(data=4, sequence=2), "allgather")
    with pytest.raises(ConfigError, match="mesh.sequence=2 spreads their tokens: use"):
        model(batch["tokens"], **fields, layout=layout)


def test_a_mixer_that_reads_tokens_in_order_refuses_branches(monkeypatch):
    monkeypatch.setitem(MIXERS, "average", MovingAverage)
    model, batch = Decoder(hybrid(spec_from_hf(HF))), packed_batch()
    places = {name: batch[name] for name in ("positions", "segments", "branches")}
    with pytest.raises(ConfigError, match="mixer 'average' cannot read several answers") as error:
        model(batch["tokens"], **places)
    assert "\n" not in str(error.value)
