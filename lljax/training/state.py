"""The state of a training run, and the split of a model into state and frozen weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lljax.config import Config
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import put, replicated, sharding_for_shape
from lljax.training.optimizer import make_rule
from lljax.training.rule import Rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and everything of the model that a checkpoint holds.

    trainable: nnx.State of float32 arrays (of quantized ones with q_galore).
    optimizer: the state of its rule.
    step: int32, steps taken.
    key: jax.random key data, the run's randomness.
    losses, norms: float32 [history], logs of the loss and of the gradient norm in recent good steps
      of the stage, NaN for steps that are not there yet.
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
class Split:
    """A model split for training. State and frozen weights are abstract if the model is.

    rule: how gradients become new trainable leaves.
    """

    graphdef: nnx.GraphDef
    state: TrainState
    frozen: nnx.State
    rule: Rule


def split(config: Config, model: Decoder, mesh: Mesh) -> Split:
    """Splits a model into the state before the first step and the frozen weights."""
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    rule = make_rule(config, trainable)
    trainable, frozen = nnx.as_pure(trainable), nnx.as_pure(frozen)
    state = _first_state(trainable, rule, mesh, config.seed, config.alarm.history)
    return Split(graphdef=graphdef, state=state, frozen=frozen, rule=rule)


def _first_state(
    trainable: nnx.State, rule: Rule, mesh: Mesh, seed: int, history: int
) -> TrainState:
    """Moments of the optimizer are laid out like their leaves; the rest is on every device."""

    def first(trainable: nnx.State):
        return TrainState(
            trainable=trainable,
            optimizer=rule.init(trainable),
            step=jnp.int32(0),
            key=jax.random.key_data(jax.random.key(seed)),
            losses=jnp.full(history, jnp.nan),
            norms=jnp.full(history, jnp.nan),
            bad=jnp.int32(0),
        )

    sharding = _shardings(trainable, mesh)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainable)):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(path, x)),
            jax.eval_shape(first, trainable),
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, x: put(x, sharding(path, x)), first(trainable)
    )


def _shardings(trainable: nnx.State, mesh: Mesh) -> Callable:
    """(path, array) -> sharding of a leaf of the state.

    The path of a moment ends in the path of its leaf. A moment is cut as its leaf is (the moment of
    a quantized leaf as its scales), along the axes that divide; a moment of another rank is whole
    on every device.
    """
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    leaves |= {name.removesuffix(".scale"): leaf for name, leaf in leaves.items()}

    def sharding(path: Any, x: Any):
        path = jax.tree_util.keystr(path)
        leaf = next((leaf for name, leaf in leaves.items() if path.endswith(name)), None)
        if leaf is None or leaf.ndim != x.ndim:
            return replicated(mesh)
        return (
            leaf.sharding if leaf.shape == x.shape else sharding_for_shape(leaf.sharding, x.shape)
        )

    return sharding


def without_history(state: TrainState) -> TrainState:
    """The state at the start of a stage: rows of another length have other losses and gradients."""

    def nothing(x: jax.Array):
        return put(np.full(x.shape, np.nan, x.dtype), x.sharding)

    return dataclasses.replace(state, losses=nothing(state.losses), norms=nothing(state.norms))


def to_items(state: TrainState) -> dict:
    """The state as the named items of a checkpoint: `trainable` can be read without the rest."""
    return {"trainable": state.trainable, "rest": dataclasses.replace(state, trainable=None)}


def from_items(items: dict) -> TrainState:
    return dataclasses.replace(items["rest"], trainable=items["trainable"])
