"""The training step of the real objective over eight devices, in two accumulated passes, against
one device in one: the loss and the gradient of every trainable leaf.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lljax.attention.pattern import AttentionPattern
from lljax.build import move
from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.models import lora
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.memory import Memory
from lljax.objectives.token_loss import loss_of
from lljax.parallel.sharding import make_mesh
from lljax.training.curriculum import Stage
from lljax.training.optimizer import OPTIMIZERS, Optimizer
from lljax.training.placement import layout_of, place
from lljax.training.prepare import prepare_step
from lljax.training.rule import Rule

T = 128
HEADS = [(8, 8), (8, 2), (6, 2)]
PATTERNS = {
    "full": AttentionPattern(),
    "window": AttentionPattern("window", window=12, anchors=2, markers=(7,)),
    "shifted": AttentionPattern("shifted", group=16),
}
MESHES = {
    "sequence 8": {"sequence": 8},
    "expert 2, sequence 4": {"expert": 2, "sequence": 4},
    "data 2, sequence 2, tensor 2": {"data": 2, "sequence": 2, "tensor": 2},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
}


def config(N, K):
    return {
        "model_type": "qwen3",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": 8,
        "max_position_embeddings": T,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def rows(count):
    """Packed rows with restarting positions, the second ending in padding, a third of the targets
    ignored.
    """
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, size=(count, T)), axis=1)
    segments[1 % count, -T // 5 :] = 0
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    positions = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    targets = np.where(
        (rng.random((count, T)) < 0.3) | (segments == 0), -100, rng.integers(0, 61, (count, T))
    )
    batch = {
        "tokens": rng.integers(0, 61, (count, T)),
        "targets": targets,
        "segments": segments,
        "positions": positions,
    }
    return {name: np.asarray(x, np.int32) for name, x in batch.items()}


VARIANTS = {
    "dora": {"dora": True, "rank_pattern": (("q_proj", 3),)},
    "tables": {"targets": ("all-linear", "embed_tokens", "lm_head"), "also_train": ("norm",)},
}


def decoder(N, K, family, **variant):
    tied = {"tie_word_embeddings": "embed" in variant.get("also_train", ("embed",))}
    model = Decoder(spec_from_hf(config(N, K) | tied | family))
    lora.attach(
        model,
        **(
            dict(rank=2, alpha=4.0, targets=("all-linear",), also_train=("embed", "norm")) | variant
        ),
    )
    rng = np.random.default_rng(0)
    # B is zero at the start of a run, and A would have no gradient
    for _, variable in declared(model):
        variable.set_value(
            jnp.asarray(rng.normal(size=variable.get_value().shape) * 0.2, jnp.float32)
        )
    return model


TILED = Memory("attention", tile=24)
NO_CHANGE = {}
EXPERTS = {
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 24,
        "attention_chunk_size": 24,
        "floor_scale": 16,
        "no_rope_layer_interval": 2,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
    },
}


def keep_gradients(*_):
    """A rule that leaves the weights as they are and keeps the gradients as its state."""
    return Rule(
        init=lambda trainable: jax.tree.map(jnp.zeros_like, trainable),
        gradients=lambda gradient, trainable, state: (*gradient(lambda x: x, trainable), state),
        apply=lambda trainable, before, state, g: (trainable, g.values, g.ok),
    )


def loss_and_gradients(
    N, K, pattern, mesh, mode, count, *, passes=2, memory=TILED, family=NO_CHANGE, **variant
):
    """The metric `loss` of a training step, and the gradients that its optimizer receives."""
    model = decoder(N, K, family, **variant)
    move(model, mesh)
    c = default_config()
    c.context.schedule, c.model.dtype, c.optimizer.name = ((1, T, "full"),), "float32", "keep"
    c.training.rows, c.training.accumulate = 2 * count // passes, passes
    c.mesh.context_parallel, c.memory.loss_chunk = mode, 48
    c.memory.remat, c.memory.tile = memory.remat, memory.tile
    stage = Stage(number=0, start=0, stop=1, length=T, pattern=pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIMIZERS, "keep", Optimizer(None, rule=keep_gradients))
        prepared = prepare_step(c, {}, mesh, model=model, stages=[stage])
    program = prepared.steps[0]
    batch = place(rows(2 * count), passes, mesh, program.layout)
    state, metrics = program.compile()(prepared.state, prepared.frozen, batch)
    return jax.tree.map(np.asarray, (metrics["loss"], state.optimizer))


@pytest.fixture(scope="module")
def one_device():
    seen = {}

    def get(N, K, pattern, count):
        key = N, K, pattern, count
        if key not in seen:
            mesh = make_mesh(devices=jax.devices()[:1])
            seen[key] = loss_and_gradients(
                N, K, PATTERNS[pattern], mesh, "auto", count, passes=1, memory=Memory("full")
            )
        return seen[key]

    return get


def cases():
    for N, K in HEADS:
        for pattern in PATTERNS:
            for mesh in MESHES:
                for mode in (
                    ("auto", "allgather", "ulysses", "ring", "halo")
                    if "sequence" in mesh
                    else ("auto",)
                ):
                    three = mesh.startswith("data") and (
                        mode == "ring"
                        if pattern == "full"
                        else (pattern, mode) == ("shifted", "auto")
                    )
                    quick = (N, K) == (8, 2) and (
                        three or (mesh, pattern) == ("fsdp 2, expert 4", "full")
                    )
                    yield pytest.param(
                        N, K, pattern, mesh, mode, marks=() if quick else pytest.mark.slow
                    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("N,K,pattern,mesh,mode", list(cases()))
def test_loss_and_gradients_equal_one_device(one_device, N, K, pattern, mesh, mode):
    count = 8 if mesh == "fsdp 2, expert 4" else 2
    wanted_loss, wanted = one_device(N, K, pattern, count)
    try:
        loss, gradients = loss_and_gradients(
            N, K, PATTERNS[pattern], make_mesh(**MESHES[mesh]), mode, count
        )
    except ConfigError as refusal:
        assert mode in ("halo", "ulysses") and "use 'auto'" in str(refusal)
        return
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for got, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(got - leaf).max() <= 1e-5 * jnp.abs(leaf).max()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["full", "shifted"])
@pytest.mark.parametrize(
    "sizes", [{"expert": 2, "fsdp": 2, "sequence": 2}, {"expert": 4, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_equal_one_device(family, sizes, pattern):
    def run(mesh, **more):
        return loss_and_gradients(
            8, 2, PATTERNS[pattern], mesh, "auto", 4, family=EXPERTS[family], **more
        )

    wanted_loss, wanted = run(make_mesh(devices=jax.devices()[:1]), passes=1, memory=Memory("full"))
    loss, gradients = run(make_mesh(**sizes))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for got, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(got - leaf).max() <= 1e-5 * jnp.abs(leaf).max()


OLMO2 = {"model_type": "olmo2", "num_hidden_layers": 1}


def test_a_norm_over_all_heads_is_the_same_if_devices_share_the_heads():
    """The mean of squares is over the heads of all devices, and so is its gradient. Each device has
    the weights of its heads.
    """
    batch = {name: jnp.asarray(x) for name, x in rows(2).items()}

    def run(mesh):
        model = decoder(8, 4, OLMO2)
        layout = None
        if mesh is not None:
            move(model, mesh)
            layout, _ = layout_of(mesh, "auto", PATTERNS["full"], T, model.spec)
            for module, heads in (("q", 8), ("k", 4)):
                norm = getattr(model.layers[0].self_attn, f"{module}_norm").weight.get_value()
                assert norm.sharding.shard_shape(norm.shape)[-1] == heads * 8 // 4
        graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)

        def loss(trainable):
            model = nnx.merge(graphdef, trainable, frozen)
            names = ("positions", "segments")
            hidden = model(batch["tokens"], **{n: batch[n] for n in names}, layout=layout)
            return loss_of(model, hidden, batch["targets"], chunk=64, layout=layout)

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(trainable))

    (wanted_loss, wanted), (loss, gradients) = run(None), run(make_mesh(data=2, tensor=4))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for got, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(got - leaf).max() <= 1e-5 * jnp.abs(leaf).max()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"sequence": 4, "tensor": 2}], ids=str)
def test_a_step_with_norms_over_all_heads_equals_one_device(sizes):
    def run(mesh, **more):
        return loss_and_gradients(8, 4, PATTERNS["full"], mesh, "auto", 2, family=OLMO2, **more)

    wanted_loss, wanted = run(make_mesh(devices=jax.devices()[:1]), passes=1, memory=Memory("full"))
    loss, gradients = run(make_mesh(**sizes))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for got, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(got - leaf).max() <= 1e-5 * jnp.abs(leaf).max()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", ["data 2, sequence 2, tensor 2", "fsdp 2, expert 4"])
def test_variants_of_the_adapter_equal_one_device(variant, mesh):
    def of(mesh, **fields):
        return loss_and_gradients(
            8, 2, PATTERNS["full"], mesh, "auto", 8, **fields, **VARIANTS[variant]
        )

    wanted_loss, wanted = of(make_mesh(devices=jax.devices()[:1]), passes=1, memory=Memory("full"))
    loss, gradients = of(make_mesh(**MESHES[mesh]))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for got, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(got - leaf).max() <= 2e-5 * jnp.abs(leaf).max()


def test_refusals_name_the_field_and_the_way_out():
    model = spec_from_hf(config(6, 2))
    with pytest.raises(ConfigError, match="mesh.expert=8 does not divide the 6 experts.*use 2"):
        layout_of(
            make_mesh(expert=8),
            "auto",
            PATTERNS["full"],
            T,
            spec_from_hf(config(6, 2) | EXPERTS["qwen2_moe"] | {"num_experts": 6}),
        )
    with pytest.raises(ConfigError, match="mesh.tensor=4 does not divide.*use 2"):
        layout_of(make_mesh(sequence=2, tensor=4), "auto", PATTERNS["full"], T, model)
    with pytest.raises(ConfigError, match="rows of 129 tokens.*use a multiple such as 136"):
        layout_of(make_mesh(sequence=8), "auto", PATTERNS["full"], 129, model)
    with pytest.raises(ConfigError, match="3 do not divide 8"):
        make_mesh(data=3)
