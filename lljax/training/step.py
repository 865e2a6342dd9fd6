"""The training step: a pure function of pytrees that differentiates the trainable leaves and
nothing else.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lljax.attention.pattern import AttentionPattern
from lljax.config import LEAST_HISTORY, total_steps
from lljax.data.packing import IGNORED
from lljax.errors import ConfigError
from lljax.hardware.compiler_flags import compiler_options
from lljax.models import lora
from lljax.models.memory import Memory
from lljax.objectives.token_loss import balance_of, busiest_of, cross_entropy
from lljax.parallel.sharding import Layout, cut_alike, put, replicated
from lljax.training.optimizer import Rule, by_optax, groups_of, make_optimizer
from lljax.training.q_galore import q_galore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint holds of the model.

    trainable: nnx.State of float32 arrays (of quantised ones with q_galore). optimizer: state of
      its rule. step: int32, steps taken.
    key: jax.random key data, the run's randomness. losses, norms: float32 [history], logs of the
      loss and of the gradient norm in recent good steps of the stage, NaN where there is none yet.
      bad: int32, unusable steps in a row.
    """

    trainable: nnx.State
    optimizer: Any
    step: jax.Array
    key: jax.Array
    losses: jax.Array
    norms: jax.Array
    bad: jax.Array


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static part of a step."""

    memory: Memory
    loss_chunk: int
    dtype: str  # of the compute
    packed: bool  # rows may hold several documents
    noise: float  # on the embeddings, see Decoder
    skip_spikes: bool
    spike_z: float
    balance: float  # weight of the load-balancing loss of experts


def step_settings(config) -> StepSettings:
    """What a configuration says of the step."""
    m = config.memory
    return StepSettings(
        Memory(m.remat, m.offload, m.layers_per_residual, m.tile),
        m.loss_chunk,
        config.model.dtype,
        config.data.packing,
        config.training.neftune_alpha,
        config.alarm.spike != "warn",
        config.alarm.spike_z,
        config.training.router_aux_loss_coef,
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart for training. step: see make_step. State and frozen weights are abstract
    where the model is.
    """

    graphdef: nnx.GraphDef
    state: TrainState
    frozen: nnx.State
    step: Callable


def take_apart(config, model: nnx.Module, mesh) -> Parts:
    """What a run steps with: the state before its first step, the weights that stay, and the step.

    Raises:
      ConfigError: experts are to be balanced, and the model has none.
    """
    if config.training.router_aux_loss_coef and not model.spec.has_experts:
        raise ConfigError(
            f"training.router_aux_loss_coef={config.training.router_aux_loss_coef} balances experts, and "
            f"model.path={config.model.path!r} has none: set it to 0"
        )
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    steps, groups = total_steps(config), groups_of(trainable)
    if config.optimizer.name == "q_galore":
        rule = q_galore(config.optimizer, steps, groups, jnp.dtype(config.model.dtype))
    else:
        rule = by_optax(make_optimizer(config.optimizer, steps, groups))
    trainable, frozen = nnx.as_pure(trainable), nnx.as_pure(frozen)
    state = _first_state(trainable, rule, mesh, config.seed, config.alarm.history)
    return Parts(graphdef, state, frozen, make_step(graphdef, rule, step_settings(config), state))


def _first_state(trainable, rule: Rule, mesh, seed: int, history: int) -> TrainState:
    """The optimizer's moments lie where their leaves do, the rest on every device."""

    def first(trainable):
        return TrainState(
            trainable,
            rule.init(trainable),
            jnp.int32(0),
            jax.random.key_data(jax.random.key(seed)),
            jnp.full(history, jnp.nan),
            jnp.full(history, jnp.nan),
            jnp.int32(0),
        )

    where = _where(trainable, mesh)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainable)):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(path, x)),
            jax.eval_shape(first, trainable),
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, x: put(x, where(path, x)), first(trainable)
    )


def _where(trainable, mesh):
    """(path, array) -> sharding of a leaf of the state; the path of a moment ends in the path of
    its leaf. A moment is cut as its leaf is (of a quantised one, its scales), along the axes that
    divide; one of another rank is whole on every device.
    """
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    leaves |= {name.removesuffix(".scale"): leaf for name, leaf in leaves.items()}

    def where(path, x):
        path = jax.tree_util.keystr(path)
        leaf = next((leaf for name, leaf in leaves.items() if path.endswith(name)), None)
        if leaf is None or leaf.ndim != x.ndim:
            return replicated(mesh)
        return leaf.sharding if leaf.shape == x.shape else cut_alike(leaf.sharding, x.shape)

    return where


def without_history(state: TrainState) -> TrainState:
    """The state at the start of a stage: rows of another length have other losses and gradients."""

    def nothing(x):
        return put(np.full(x.shape, np.nan, x.dtype), x.sharding)

    return dataclasses.replace(state, losses=nothing(state.losses), norms=nothing(state.norms))


def to_items(state: TrainState) -> dict:
    """The state as named parts of a checkpoint, so that the trained values can be read without the
    rest.
    """
    return {"trainable": state.trainable, "rest": dataclasses.replace(state, trainable=None)}


def from_items(items: dict) -> TrainState:
    return dataclasses.replace(items["rest"], trainable=items["trainable"])


def make_step(graphdef, rule: Rule, settings: StepSettings, like: TrainState):
    """Returns step(state, frozen, batch, pattern, layout) -> (state, metrics), jitted; one
    compilation per batch shape.

    The state stays where the state `like` lies.

    The batch holds int32 arrays [A, B, T] (tokens, targets, segments, positions, index), A
    accumulated forward passes. The loss is the mean over all predicted tokens of all A x B rows, so
    that accumulation changes nothing. Where there are experts, `settings.balance` times their
    load-balancing loss is minimised beside it: that of each of the A passes over its tokens that
    are no padding, averaged by predicted tokens. It is a metric, not part of the metric `loss`. A
    gradient that is not finite is never applied, nor an update that would leave a value that is
    not; nor is a spike where settings say so. Metrics are float32 scalars.
    """

    def total_loss(trainable, frozen, micro, key, pattern, layout):
        model = nnx.merge(graphdef, trainable, frozen)
        counted = micro["segments"] != 0 if model.spec.has_experts else None
        # A row of one document has its padding behind, where causality hides it.
        hidden = model(
            micro["tokens"],
            positions=micro["positions"],
            segments=micro["segments"] if settings.packed else None,
            index=_index(micro, layout),
            pattern=pattern,
            layout=layout,
            memory=settings.memory,
            dtype=jnp.dtype(settings.dtype),
            dropout_key=key,
            neftune_alpha=settings.noise,
            counted=counted,
        )
        hidden, load = (hidden, None) if counted is None else hidden
        loss = cross_entropy(
            hidden,
            model.head,
            micro["targets"],
            chunk=settings.loss_chunk,
            softcap=model.spec.logit_softcap,
            layout=layout,
            update=model.head_update(hidden, key),
        )
        if counted is None:
            return loss, None
        balance = balance_of(load, jnp.sum(counted)) * jnp.sum(micro["targets"] != IGNORED)
        return loss + settings.balance * balance if settings.balance else loss, (
            loss,
            balance,
            load,
        )

    shardings = jax.tree.map(lambda x: x.sharding, like)
    options = compiler_options(like.step.sharding)
    if options:
        logging.info(
            "compiler options: %s", " ".join(f"{name}={value}" for name, value in options.items())
        )

    @functools.partial(
        jax.jit,
        static_argnums=(3, 4),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=options,
    )
    def step(
        state: TrainState, frozen, batch, pattern: AttentionPattern, layout: Layout | None = None
    ):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        tokens = jnp.maximum(jnp.sum(batch["targets"] != IGNORED), 1).astype(jnp.float32)

        def gradient(bind, x):
            (loss, routing), grads = accumulate(
                lambda x, *rest: total_loss(bind(x), *rest, pattern, layout), x, frozen, batch, key
            )
            return (loss / tokens, routing), jax.tree.map(
                lambda g: (g / tokens).astype(g.dtype), grads
            )

        (loss, routing), grads, optimizer = rule.gradients(
            gradient, state.trainable, state.optimizer
        )
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        loss_z, z = robust_z(jnp.log(loss), state.losses), robust_z(jnp.log(norm), state.norms)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        spike = finite & (jnp.maximum(loss_z, z) > settings.spike_z)
        apply = finite & ~spike if settings.skip_spikes else finite

        trainable, optimizer, applied = rule.apply(
            state.trainable, state.optimizer, optimizer, grads, norm, apply, key
        )
        losses, norms = (
            jnp.where(applied, jnp.roll(history, 1).at[0].set(jnp.log(x)), history)
            for history, x in ((state.losses, loss), (state.norms, norm))
        )
        bad = jnp.where(applied, 0, state.bad + 1)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "tokens": tokens,
            "z": z,
            "loss_z": loss_z,
            "nonfinite": ~finite | (apply & ~applied),
            "spike": spike,
            "skipped": ~applied,
            "bad": bad,
        }
        if routing is not None:
            of_tokens, balance, load = routing
            metrics |= {
                "loss": of_tokens / tokens,
                "load_balancing_loss": balance / tokens,
                "expert_load_max": busiest_of(load),
            }
        return TrainState(
            trainable, optimizer, state.step + 1, state.key, losses, norms, bad
        ), metrics

    return step


def _index(batch, layout: Layout | None):
    """The places of the tokens in their rows where they are not 0, 1, 2 ..., which kernels serve
    better unsaid.
    """
    return batch["index"] if layout is not None and layout.zigzag else None


def accumulate(loss_of, trainable, frozen, batch, key):
    """((loss, more), gradient) of loss_of(...) -> (loss, more), summed over the leading axis of the
    batch in float32.
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    A = batch["tokens"].shape[0]
    if A == 1:
        return value_and_grad(trainable, frozen, jax.tree.map(lambda x: x[0], batch), key)

    def one(total, xs):
        micro, key = xs
        (loss, more), grads = value_and_grad(trainable, frozen, micro, key)
        return jax.tree.map(jnp.add, total, (loss, grads)), more

    zero = (jnp.float32(0), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
    (loss, grads), more = jax.lax.scan(one, zero, (batch, jax.random.split(key, A)))
    return (loss, jax.tree.map(lambda x: x.sum(0), more)), grads


def robust_z(x: jax.Array, history: jax.Array, least: int = LEAST_HISTORY) -> jax.Array:
    """How many robust standard deviations (1.4826 x median absolute deviation) x lies above the
    history's median.

    x and history: logs. NaNs of `history` do not count; 0 while fewer than `least` values do. A
      deviation counts as 5% of the median at least.
    """
    median = jnp.nanmedian(history)
    spread = jnp.maximum(1.4826 * jnp.nanmedian(jnp.abs(history - median)), 0.05)
    return jnp.where(jnp.sum(~jnp.isnan(history)) >= least, (x - median) / spread, 0.0)


def make_evaluate(graphdef, settings: StepSettings):
    """Returns evaluate(trainable, frozen, batch, pattern, layout) -> (summed loss, predicted
    tokens) of a batch [1, B, T], as `place` makes it, whose rows hold one document each. Tiled as
    the step is.
    """

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def evaluate(trainable, frozen, batch, pattern: AttentionPattern, layout: Layout | None = None):
        batch = jax.tree.map(lambda x: x[0], batch)
        model = nnx.merge(graphdef, trainable, frozen)
        hidden = model(
            batch["tokens"],
            positions=batch["positions"],
            index=_index(batch, layout),
            pattern=pattern,
            layout=layout,
            memory=settings.memory,
            dtype=jnp.dtype(settings.dtype),
        )
        return (
            cross_entropy(
                hidden,
                model.head,
                batch["targets"],
                chunk=settings.loss_chunk,
                softcap=model.spec.logit_softcap,
                layout=layout,
                update=model.head_update(hidden),
            ),
            jnp.sum(batch["targets"] != IGNORED),
        )

    return evaluate
