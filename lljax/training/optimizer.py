"""The update of every group of trainable leaves: each role has its own learning rate and weight
decay; nothing else has state.

An optimizer is a row of `OPTIMIZERS`; clipping, decay and learning rate are the same for all.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from lljax.config import Config, total_steps
from lljax.training.eight_bit import scale_by_adam_8bit
from lljax.training.q_galore import q_galore
from lljax.training.rule import Rule, by_optax, learning_rate

# roles of leaves that multiply an activation: [in, out], or a stack of them
MATRICES = ("kernel", "lora_a", "lora_b")


def make_rule(config: Config, trainable: nnx.State) -> Rule:
    """The update rule of `config.optimizer` for trainable Variables."""
    steps, groups = total_steps(config), groups_of(trainable)
    row = OPTIMIZERS[config.optimizer.name]
    if row.rule:
        return row.rule(config.optimizer, steps, groups, jnp.dtype(config.model.dtype))
    return by_optax(make_optimizer(config.optimizer, steps, groups))


def make_optimizer(
    optimizer: Config, steps: int, groups: nnx.State
) -> optax.GradientTransformation:
    """Global-norm clipping (none if `optimizer.clip_norm` is 0), then for each group the direction
    of `optimizer.name`, decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101) and the
    learning rate.

    groups: a pytree like the trainable state with the group of each leaf (`groups_of`).
    """

    direction = OPTIMIZERS[optimizer.name].direction
    assert direction is not None, f"{optimizer.name} is a rule, not an optax optimizer"

    def of_group(group: str) -> optax.GradientTransformation:
        role, _, stacked = group.partition("/")
        ratio = optimizer.learning_rate_ratio[role]
        return optax.chain(
            direction(optimizer, role, per_layer if stacked else lambda x: x),
            optax.add_decayed_weights(optimizer.weight_decay[role]),
            optax.scale_by_learning_rate(learning_rate(optimizer, steps, ratio)),
        )

    present = sorted(set(jax.tree.leaves(groups)))
    clip = (
        optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    )
    return optax.chain(clip, optax.partition({group: of_group(group) for group in present}, groups))


def groups_of(trainable: nnx.State) -> nnx.State:
    """The group of each leaf, as a pytree like `trainable` (of Variables): its role, followed by
    "/L" if the leaf is a stack of L layers.
    """

    def group(variable: nnx.Variable):
        role = variable.get_metadata("role")
        if variable.get_metadata("axes")[0] != "layers":
            return role
        return f"{role}/{variable.get_value().shape[0]}"

    return jax.tree.map(group, trainable, is_leaf=lambda x: isinstance(x, nnx.Variable))


def per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `transformation` to each layer of leaves [L, ...] separately. Scalars of its state
    are shared by all layers, arrays are [L, ...].
    """

    def init(params: optax.Params):
        like = jax.eval_shape(transformation.init, jax.tree.map(lambda x: x[0], params))
        stacked = jax.vmap(transformation.init)(params)
        return jax.tree.map(lambda layer, stack: stack if layer.ndim else stack[0], like, stacked)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        L = len(jax.tree.leaves(updates)[0])
        spread = jax.tree.map(lambda x: x if x.ndim else jnp.broadcast_to(x, L), state)
        updates, new = jax.lax.map(lambda xs: transformation.update(*xs), (updates, spread, params))
        return updates, jax.tree.map(lambda old, x: x if old.ndim else x[0], state, new)

    return optax.GradientTransformation(init, update)


def _adamw(o: Config, role: str, layered: Callable) -> optax.GradientTransformation:
    """Kingma & Ba 2014, arXiv 1412.6980."""
    return optax.scale_by_adam(b1=o.beta1, b2=o.beta2, eps=o.eps)


def _adafactor(o: Config, role: str, layered: Callable) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, arXiv 1804.04235: second moments of a matrix as a row and a column, no
    first moments. Without the scaling by the size of the weight, so that learning rates compare
    with other optimizers.
    """
    return layered(
        optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0)
        )
    )


def _lion(o: Config, role: str, layered: Callable) -> optax.GradientTransformation:
    """Chen et al. 2023, arXiv 2302.06675: the sign of a momentum."""
    return optax.scale_by_lion(b1=o.beta1, b2=o.beta2)


def _muon(o: Config, role: str, layered: Callable) -> optax.GradientTransformation:
    """Jordan 2024, github.com/KellerJordan/Muon: the momentum of a matrix, made orthogonal; AdamW
    for the other leaves. An update has the root mean square 0.2 of AdamW's, as Liu et al. 2025,
    arXiv 2502.16982, eq. 4.
    """
    if role not in MATRICES:
        return _adamw(o, role, layered)

    def numbers(params: optax.Params):
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    def like_adamw(updates: optax.Updates, params: optax.Params | None):
        return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=o.beta1, weight_dimension_numbers=numbers),
        optax.stateless(like_adamw),
    )


def _adamw8bit(o: Config, role: str, layered: Callable) -> optax.GradientTransformation:
    return scale_by_adam_8bit(b1=o.beta1, b2=o.beta2, eps=o.eps)


def _galore(o: Config, role: str, layered: Callable) -> optax.GradientTransformation:
    """Zhao et al. 2024, arXiv 2403.03507: Adam in the leading subspace of each matrix's gradient,
    computed again every `galore.update_every` steps; AdamW for the other leaves. The subspace
    reduces the longer axis, so that the moments keep the shorter one.
    """
    if role != "kernel":
        return _adamw(o, role, layered)
    return layered(
        optax.contrib.scale_by_galore(
            o.galore.rank, o.galore.update_every, o.galore.scale, _adamw(o, role, layered)
        )
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of OPTIMIZERS.

    direction: (config.optimizer, role, per_layer or the identity) -> the transformation before
      decay and learning rate; None for an optimizer with a rule of its own.
    reads: fields of config.optimizer that not every optimizer reads.
    train_type: the only `train_type` that it serves; None for all.
    rule: (config.optimizer, steps, groups, dtype) -> Rule, in place of `direction`.
    """

    direction: Callable | None
    reads: tuple[str, ...] = ()
    train_type: str | None = None
    rule: Callable[..., Rule] | None = None


ADAM = ("beta1", "beta2", "eps")
GALORE = ("galore.rank", "galore.update_every", "galore.scale")
OPTIMIZERS = {
    "adamw": Optimizer(_adamw, ADAM),
    "adafactor": Optimizer(_adafactor),
    "lion": Optimizer(_lion, ("beta1", "beta2")),
    "muon": Optimizer(_muon, ADAM),
    "adamw8bit": Optimizer(_adamw8bit, ADAM),
    "galore": Optimizer(_galore, ADAM + GALORE, train_type="full"),
    "q_galore": Optimizer(None, ADAM + GALORE, train_type="full", rule=q_galore),
}
