"""The training step and the evaluation: pure functions of pytrees. A step differentiates the
trainable leaves and nothing else.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from lljax.attention.pattern import AttentionPattern
from lljax.config import LEAST_HISTORY, Config
from lljax.data.batch import Batch
from lljax.hardware.compiler_flags import compiler_options
from lljax.models.memory import Memory
from lljax.objectives.objective import SUM, Metric, Objective, Pass, PassSettings
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.sharding import Layout, batch_sharding
from lljax.training.rule import Rule, StepGradients
from lljax.training.state import Split, TrainState

# The metrics of every step, whatever its objective.
STEP_METRICS = (
    Metric("grad_norm", "Gradient norm", SUM),
    Metric("z", "Gradient norm, in deviations above its median", SUM),
    Metric("loss_z", "Loss, in deviations above its median", SUM),
    Metric("nonfinite", "Loss, gradient or update not finite", SUM),
    Metric("spike", "Loss or gradient norm far above its median", SUM),
    Metric("skipped", "Update not applied", SUM),
    Metric("bad", "Unusable steps in a row", SUM),
)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static part of a step. skip_spikes: whether a spike is not applied."""

    objective: Objective
    forward: PassSettings
    skip_spikes: bool
    spike_z: float


def step_settings(config: Config) -> StepSettings:
    memory, objective = config.memory, OBJECTIVES[config.objective.name]
    return StepSettings(
        objective=objective,
        forward=PassSettings(
            memory=Memory(
                remat=memory.remat,
                offload=memory.offload,
                layers_per_residual=memory.layers_per_residual,
                tile=memory.tile,
            ),
            loss_chunk=memory.loss_chunk,
            dtype=config.model.dtype,
            packed=config.data.packing,
            neftune_alpha=config.training.neftune_alpha,
            options=objective.options(config),
            temperature=config.rollout.temperature if objective.samples else 1.0,
        ),
        skip_spikes=config.alarm.spike != "warn",
        spike_z=config.alarm.spike_z,
    )


def metrics_of(objective: Objective) -> tuple[Metric, ...]:
    """Every metric that the steps of a run may report, the objective's first."""
    return (*objective.metrics, objective.counted, *STEP_METRICS)


def make_step(parts: Split, settings: StepSettings) -> Callable:
    """Returns step(state, frozen, batch, pattern, layout) -> (state, metrics), jitted; compiled
    once per batch shape.

    The state is donated, and the new one is laid out as `parts.state` is.

    The batch holds arrays [A, B, T] for A accumulated passes (lljax.data.batch). The loss is the
    objective's sum over all of them divided by its weight, so that accumulation changes nothing. A
    gradient that is not finite is never applied, nor an update that would leave a value that is
    not; nor is a spike if `settings.skip_spikes`. Metrics are scalars (`metrics_of`).
    """
    options = compiler_options(parts.state.step.sharding)
    if options:
        logging.info(
            "compiler options: %s", " ".join(f"{name}={value}" for name, value in options.items())
        )
    return jax.jit(
        _Step(graphdef=parts.graphdef, rule=parts.rule, settings=settings).step,
        static_argnums=(3, 4),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, parts.state), None),
        compiler_options=options,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    graphdef: nnx.GraphDef
    rule: Rule
    settings: StepSettings

    def step(
        self,
        state: TrainState,
        frozen: nnx.State,
        batch: Batch,
        pattern: AttentionPattern,
        layout: Layout | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        objective, settings = self.settings.objective, self.settings
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        weight = jnp.maximum(objective.weight(batch), 1).astype(jnp.float32)

        def loss_of(trainable: nnx.State, frozen: nnx.State, micro: Batch, key: jax.Array):
            model = nnx.merge(self.graphdef, trainable, frozen)
            return objective.loss(Pass(model, settings.forward, pattern, layout, key), micro)

        def gradient(bind: Callable, x: Any):
            (loss, sums), grads = accumulate(
                lambda x, *rest: loss_of(bind(x), *rest),
                x,
                frozen,
                batch,
                key,
                objective.reduce_passes,
            )
            return (loss / weight, sums), jax.tree.map(
                lambda g: (g / weight).astype(g.dtype), grads
            )

        (loss, sums), grads, optimizer = self.rule.gradients(
            gradient, state.trainable, state.optimizer
        )
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        alarm = _alarm(state, loss, norm, settings)
        ok = alarm["finite"] & ~alarm["spike"] if settings.skip_spikes else alarm["finite"]
        gradients = StepGradients(values=grads, norm=norm, ok=ok, key=key)
        trainable, optimizer, applied = self.rule.apply(
            state.trainable, state.optimizer, optimizer, gradients
        )
        new = TrainState(
            trainable=trainable,
            optimizer=optimizer,
            step=state.step + 1,
            key=state.key,
            losses=_pushed(state.losses, loss, applied),
            norms=_pushed(state.norms, norm, applied),
            bad=jnp.where(applied, 0, state.bad + 1),
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            objective.counted.name: weight,
            "z": alarm["z"],
            "loss_z": alarm["loss_z"],
            "nonfinite": ~alarm["finite"] | (ok & ~applied),
            "spike": alarm["spike"],
            "skipped": ~applied,
            "bad": new.bad,
        }
        return new, metrics | objective.finish(sums, weight)


def _alarm(
    state: TrainState, loss: jax.Array, norm: jax.Array, settings: StepSettings
) -> dict[str, jax.Array]:
    """Whether loss and gradient are finite, and whether they are a spike, with their deviations."""
    loss_z, z = robust_z(_log(loss), state.losses), robust_z(_log(norm), state.norms)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    spike = finite & (jnp.maximum(loss_z, z) > settings.spike_z)
    return {"loss_z": loss_z, "z": z, "finite": finite, "spike": spike}


def _pushed(history: jax.Array, value: jax.Array, applied: jax.Array) -> jax.Array:
    """The history with the logarithm of `value` in front, if the step was applied."""
    return jnp.where(applied, jnp.roll(history, 1).at[0].set(_log(value)), history)


def _log(value: jax.Array) -> jax.Array:
    """The logarithm; NaN, which does not count, at 0 and below: a policy's loss may be there."""
    return jnp.where(value > 0, jnp.log(value), jnp.nan)


def accumulate(
    loss_of: Callable,
    trainable: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    key: jax.Array,
    reduce: Callable,
):
    """((loss, sums), gradient) of loss_of(trainable, frozen, micro, key) -> (loss, sums), over the
    leading axis of the batch; loss and gradient are summed in float32, sums by `reduce`.
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    A = batch["tokens"].shape[0]
    if A == 1:
        return value_and_grad(trainable, frozen, jax.tree.map(lambda x: x[0], batch), key)

    def add(total: Any, xs: Any):
        micro, key = xs
        (loss, sums), grads = value_and_grad(trainable, frozen, micro, key)
        return jax.tree.map(jnp.add, total, (loss, grads)), sums

    zero = (jnp.float32(0), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
    (loss, grads), sums = jax.lax.scan(add, zero, (batch, jax.random.split(key, A)))
    return (loss, reduce(sums)), grads


def robust_z(x: jax.Array, history: jax.Array, least: int = LEAST_HISTORY) -> jax.Array:
    """How many robust standard deviations (1.4826 x median absolute deviation) x lies above the
    history's median.

    x and history: logs. NaNs of `history` do not count; 0 while fewer than `least` values do, and
      for an x of NaN. A deviation counts as 5% of the median at least.
    """
    median = jnp.nanmedian(history)
    spread = jnp.maximum(1.4826 * jnp.nanmedian(jnp.abs(history - median)), 0.05)
    known = (jnp.sum(~jnp.isnan(history)) >= least) & ~jnp.isnan(x)
    return jnp.where(known, (x - median) / spread, 0.0)


def make_scorer(graphdef: nnx.GraphDef, settings: StepSettings, mesh: Mesh) -> Callable:
    """Returns score(trainable, frozen, batch, pattern, layout) -> float32 [A, B, T], jitted: the
    log-probability of every target of a batch [A, B, T], without dropout; 0 for no target. They
    are laid out on the mesh as the batch is.
    """
    options = {"static_argnums": (3, 4), "out_shardings": batch_sharding(mesh, 3)}

    @functools.partial(jax.jit, **options)
    def score(
        trainable: nnx.State,
        frozen: nnx.State,
        batch: Batch,
        pattern: AttentionPattern,
        layout: Layout | None = None,
    ):
        model = nnx.merge(graphdef, trainable, frozen)
        pass_ = Pass(model, settings.forward, pattern, layout)
        return jax.lax.map(lambda micro: pass_.log_probs(micro, pass_.hidden(micro)), batch)

    return score


def make_evaluate(graphdef: nnx.GraphDef, settings: StepSettings) -> Callable:
    """Returns evaluate(trainable, frozen, batch, pattern, layout) -> (sums by name, weight),
    jitted: the objective's evaluation of a batch [1, B, T] whose rows hold one document each.
    """

    compute = settings.objective.evaluate
    assert compute is not None, "the objective is not evaluated by tokens"

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def evaluate(
        trainable: nnx.State,
        frozen: nnx.State,
        batch: Batch,
        pattern: AttentionPattern,
        layout: Layout | None = None,
    ):
        model = nnx.merge(graphdef, trainable, frozen)
        pass_ = Pass(model, settings.forward, pattern, layout)
        return compute(pass_, jax.tree.map(lambda x: x[0], batch))

    return evaluate
