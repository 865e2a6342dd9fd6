"""The results of attention that memory.remat = "attention" saves, by name."""

import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

SAVED = ("attention_out", "attention_lse")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def name_residuals(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """attend(q, k, v), differentiated by jax, with a name on every residual except q, k and v.

    A name on the result of `attend` would not do: its gradient holds the values from before the
    name.
    """
    return attend(q, k, v)


def _forward(attend, q: jax.Array, k: jax.Array, v: jax.Array):
    out, pullback = jax.vjp(attend, q, k, v)
    named = checkpoint_name(out, SAVED[0])

    def name(x):
        if any(x is operand for operand in (q, k, v)):
            return x
        return named if x is out else checkpoint_name(x, SAVED[1])

    return named, jax.tree.map(name, pullback)


def _backward(attend, pullback, d_out: jax.Array):
    return pullback(d_out)


name_residuals.defvjp(_forward, _backward)
