"""The update of every group of trainable leaves: each role has its own learning rate and weight
decay; nothing else has state.

An optimizer is a row of `DIRECTIONS`; clipping before it, decay and learning rate after it are the
same for all.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from lljax.config import warmup_steps
from lljax.training.eight_bit import scale_by_adam_8bit


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a step turns losses into new weights.

    init(trainable) -> state.
    gradients(gradient, trainable, state) -> (loss, gradients, state), where gradient(bind, x) ->
      (loss, its gradient by x) puts bind(x) in the place of the trainable leaves.
    apply(trainable, before, state, gradients, norm, ok, key) -> (trainable, state, applied): the
      step, or with ok = False what was before it (`before`: the state before `gradients`), and so
      where a value of the step would not be finite. norm: of
      the gradients. key: of random numbers.
    """

    init: Callable
    gradients: Callable
    apply: Callable


def by_optax(optimizer: optax.GradientTransformation) -> Rule:
    def gradients(gradient, trainable, state):
        return *gradient(lambda x: x, trainable), state

    def step(trainable, state, grads):
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    def apply(trainable, before, state, grads, norm, ok, key):
        ok &= finite(step(trainable, state, grads))
        # Computed again behind the barrier: otherwise all new values wait for the last to be known
        # finite, beside the old ones.
        trainable, before, state, grads, ok = jax.lax.optimization_barrier(
            (trainable, before, state, grads, ok)
        )
        return *chosen(ok, step(trainable, state, grads), (trainable, before)), ok

    return Rule(optimizer.init, gradients, apply)


def chosen(ok, new, old):
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def finite(tree) -> jax.Array:
    """bool: whether every floating-point value of a pytree is finite."""
    return jnp.array(
        [
            jnp.isfinite(x).all()
            for x in jax.tree.leaves(tree)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
    ).all()


# roles of what multiplies an activation: [in, out], or a stack of them
MATRICES = ("kernel", "lora_a", "lora_b")


def learning_rate(optimizer, steps: int, ratio: float = 1.0) -> optax.Schedule:
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


def make_optimizer(optimizer, steps: int, groups: nnx.State) -> optax.GradientTransformation:
    """Global-norm clipping (none where `optimizer.clip_norm` is 0), then for each group the
    direction of `optimizer.name`, decoupled weight decay (Loshchilov & Hutter 2017, arXiv
    1711.05101) and the learning rate.

    groups: a pytree like the trainable state with the group of each leaf (`groups_of`).
    """

    def of_group(group):
        role, _, stacked = group.partition("/")
        return optax.chain(
            DIRECTIONS[optimizer.name](optimizer, role, per_layer if stacked else lambda x: x),
            optax.add_decayed_weights(optimizer.weight_decay[role]),
            optax.scale_by_learning_rate(
                learning_rate(optimizer, steps, optimizer.learning_rate_ratio[role])
            ),
        )

    present = sorted(set(jax.tree.leaves(groups)))
    clip = (
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    )
    return optax.chain(clip, optax.partition({group: of_group(group) for group in present}, groups))


def groups_of(trainable: nnx.State) -> nnx.State:
    """The group of each leaf, as a pytree like `trainable` (of Variables): its role, and "/L"
    behind it where the leaf is a stack of L layers.
    """

    def group(variable):
        role = variable.get_metadata("role")
        return (
            f"{role}/{variable.get_value().shape[0]}"
            if variable.get_metadata("axes")[0] == "layers"
            else role
        )

    return jax.tree.map(group, trainable, is_leaf=lambda x: isinstance(x, nnx.Variable))


def per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transformation` on each layer of leaves [L, ...] alone, one after the other. Scalars of its
    state are those of all layers, arrays [L, ...].
    """

    def init(params):
        like = jax.eval_shape(transformation.init, jax.tree.map(lambda x: x[0], params))
        stacked = jax.vmap(transformation.init)(params)
        return jax.tree.map(lambda one, all: all if one.ndim else all[0], like, stacked)

    def update(updates, state, params):
        L = len(jax.tree.leaves(updates)[0])
        spread = jax.tree.map(lambda x: x if x.ndim else jnp.broadcast_to(x, L), state)
        updates, new = jax.lax.map(lambda xs: transformation.update(*xs), (updates, spread, params))
        return updates, jax.tree.map(lambda old, x: x if old.ndim else x[0], state, new)

    return optax.GradientTransformation(init, update)


def _adamw(o, role, each):
    """Kingma & Ba 2014, arXiv 1412.6980."""
    return optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.eps)


def _adafactor(o, role, each):
    """Shazeer & Stern 2018, arXiv 1804.04235: second moments of a matrix as a row and a column, no
    first ones. Without its scaling by the size of the weight, so that a learning rate means what it
    means elsewhere.
    """
    return each(
        optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0)
        )
    )


def _lion(o, role, each):
    """Chen et al. 2023, arXiv 2302.06675: the sign of a momentum."""
    return optax.scale_by_lion(b1=o.beta1, b2=o.beta2)


def _muon(o, role, each):
    """Jordan 2024, github.com/KellerJordan/Muon: the momentum of a matrix, made orthogonal; AdamW
    for the other leaves. An update has the root mean square 0.2 of AdamW's, as Liu et al. 2025,
    arXiv 2502.16982, eq. 4.
    """
    if role not in MATRICES:
        return _adamw(o, role, each)

    def numbers(params):
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    def like_adamw(updates, params):
        return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=o.beta1, weight_dimension_numbers=numbers),
        optax.stateless(like_adamw),
    )


def _adamw8bit(o, role, each):
    return scale_by_adam_8bit(b1=o.beta1, b2=o.beta2, eps=o.eps)


def _galore(o, role, each):
    """Zhao et al. 2024, arXiv 2403.03507: Adam in the leading subspace of the gradient of each
    matrix, taken anew every so many steps; AdamW for the other leaves. The subspace is of the
    longer axis, which leaves the shorter one to the moments.
    """
    if role != "kernel":
        return _adamw(o, role, each)
    return each(
        optax.contrib.scale_by_galore(
            o.galore.rank, o.galore.update_every, o.galore.scale, _adamw(o, role, each)
        )
    )


# Of the fields of `optimizer`, the role and `per_layer` (or nothing, for leaves that are no stack):
# what comes before decay.
DIRECTIONS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "adamw8bit": _adamw8bit,
    "galore": _galore,
}
