"""What memory.remat = "attention" keeps of a layer: the results of attention, by name."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

SAVED = ("attention_out", "attention_lse")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kept(attend, q, k, v) -> jax.Array:
    """attend(q, k, v), where jax has its gradient, with the names on what that gradient needs
    besides q, k and v.

    A name outside of `attend` would not do: its own gradient holds the values from before the name.
    """
    return attend(q, k, v)


def _forward(attend, q, k, v):
    out, pullback = jax.vjp(attend, q, k, v)
    named = checkpoint_name(out, SAVED[0])

    def of(x):
        if any(x is operand for operand in (q, k, v)):
            return x
        return named if x is out else checkpoint_name(x, SAVED[1])

    return named, jax.tree.map(of, pullback)


def _backward(attend, pullback, d_out):
    return pullback(d_out)


kept.defvjp(_forward, _backward)
