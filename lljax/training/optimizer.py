"""AdamW by role: each group of trainable leaves has its own learning rate and weight decay; nothing else has state."""

import jax
import optax
from flax import nnx


def learning_rate(optimizer, steps: int, ratio: float = 1.0) -> optax.Schedule:
    """Linear warm-up to `optimizer.learning_rate` * ratio, then linear | cosine to zero at `steps`, or constant."""
    peak, warmup = optimizer.learning_rate * ratio, optimizer.warmup_steps
    rest = max(1, steps - warmup)
    after = {"linear": optax.linear_schedule(peak, 0.0, rest),
             "cosine": optax.cosine_decay_schedule(peak, rest),
             "constant": optax.constant_schedule(peak)}[optimizer.schedule]
    if warmup == 0:
        return after
    # The first step already moves: warm-up step i runs at (i + 1) / warmup of the peak.
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, after], [warmup])


def make_optimizer(optimizer, steps: int, roles: nnx.State) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) for each role.

    roles: a pytree like the trainable state with the role of each leaf (`roles_of`).
    """
    def adamw(role):
        return optax.adamw(learning_rate(optimizer, steps, optimizer.learning_rate_ratio[role]),
                           b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.eps,
                           weight_decay=optimizer.weight_decay[role])
    present = sorted(set(jax.tree.leaves(roles)))
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm),
                       optax.partition({role: adamw(role) for role in present}, roles))


def roles_of(trainable: nnx.State) -> nnx.State:
    """The role of each leaf, as a pytree like `trainable` (of Variables)."""
    return jax.tree.map(lambda variable: variable.get_metadata("role"), trainable,
                        is_leaf=lambda x: isinstance(x, nnx.Variable))
