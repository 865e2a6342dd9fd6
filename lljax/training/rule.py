"""The interface of an update rule, the rule of an optax optimizer, and the learning rate."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lljax.config import Config, warmup_steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepGradients:
    """The gradients of a step, in float32, with their global norm.

    ok: bool, whether to apply them.
    key: the random key of the rule.
    """

    values: Any
    norm: jax.Array
    ok: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a step turns losses into new weights.

    init(trainable) -> state.
    gradients(gradient, trainable, state) -> (loss, gradients, state), where gradient(bind, x) ->
      (loss, its gradient by x) puts bind(x) in the place of the trainable leaves.
    apply(trainable, before, state, gradients) -> (trainable, state, applied), where `before` is the
      state before `gradients`. Weights and state stay as they were unless `gradients.ok` and every
      new value is finite.
    """

    init: Callable
    gradients: Callable
    apply: Callable


def by_optax(optimizer: optax.GradientTransformation) -> Rule:
    """The rule of an optax optimizer over the trainable leaves themselves."""

    def gradients(gradient: Callable, trainable: nnx.State, state: Any):
        return *gradient(lambda x: x, trainable), state

    def step(trainable: nnx.State, state: Any, grads: Any):
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    def apply(trainable: nnx.State, before: Any, state: Any, gradients: StepGradients):
        grads = gradients.values
        ok = gradients.ok & finite(step(trainable, state, grads))
        # Computed again behind the barrier: otherwise all new values wait for the last to be known
        # finite, beside the old ones.
        trainable, before, state, grads, ok = jax.lax.optimization_barrier(
            (trainable, before, state, grads, ok)
        )
        return *select(ok, step(trainable, state, grads), (trainable, before)), ok

    return Rule(optimizer.init, gradients, apply)


def select(ok: jax.Array, new: Any, old: Any):
    """`new` if `ok`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def finite(tree: Any) -> jax.Array:
    """bool, whether every floating-point value of a pytree is finite."""
    return jnp.array(
        [
            jnp.isfinite(x).all()
            for x in jax.tree.leaves(tree)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
    ).all()


def learning_rate(optimizer: Config, steps: int, ratio: float = 1.0) -> optax.Schedule:
    """Linear warm-up to `optimizer.learning_rate` * ratio, then linear | cosine to zero at `steps`,
    or constant.
    """
    peak, warmup = optimizer.learning_rate * ratio, warmup_steps(optimizer, steps)
    rest = max(1, steps - warmup)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[optimizer.schedule]
    if warmup == 0:
        return after
    # The first step already moves: warm-up step i runs at (i + 1) / warmup of the peak.
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, after], [warmup])
