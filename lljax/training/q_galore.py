"""Q-GaLore, Zhang et al. 2024, arXiv 2407.08296: weights in int8, rounded at random; projections in
int4, renewed less and less often where they agree; Adam of eight bits in the subspace.

No gradient of a matrix ever exists: `Probed` tells it in the subspace. The subspace itself comes
  from subspace iteration, which
asks for nothing but products with the gradient G: from the present one, P, to an orthonormal basis
  of G orth(G^T P), two backward passes more at a step that renews.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.models.probe import Probed
from lljax.models.quantize import Quantised, dense, integers, quantise
from lljax.training import eight_bit
from lljax.training.eight_bit import Moment
from lljax.training.rule import Rule, finite, learning_rate, select

AGREE = 0.4  # cosine of two successive subspaces from which they agree
PATIENCE = 5  # agreements in a row from which a subspace is kept twice as long
PIECE = 1 << 24  # weights of an embedding that are float32 at one time


class State(NamedTuple):
    """mu, nu: moments in the subspaces, and of the leaves that are no matrices. projection: int4
    [..., n, R] of every matrix.
    due: int32, one a layer: the step that renews it. gap: steps from one renewal to the next.
      agreed: renewals in a row that found what was there.
    """

    count: jax.Array
    mu: Moment
    nu: Moment
    projection: nnx.State
    due: nnx.State
    gap: nnx.State
    agreed: nnx.State


def q_galore(optimizer, steps: int, groups: nnx.State, dtype) -> Rule:
    """The rule of `optimizer.name` "q_galore", for trainable leaves whose matrices are `Quantised`.
    groups: as of `make_optimizer`. dtype: of the compute.

    What a step calls the norm of the gradient, and clips, is that of the gradient in the subspaces.
    """
    o, roles = optimizer, jax.tree.map(lambda group: group.partition("/")[0], groups)

    def over(f, trainable, *rest):
        """f(leaf, role, ...) of every leaf, a matrix taken as one."""
        return jax.tree.map(f, trainable, roles, *rest, is_leaf=_is_matrix)

    def matrices(f, trainable, *rest):
        """f(matrix, whether its subspace is of the inputs, ...) of every matrix, None of other
        leaves.
        """
        return over(
            lambda w, role, *xs: f(w, _of_inputs(w, role), *xs) if _is_matrix(w) else None,
            trainable,
            *rest,
        )

    def probes(trainable, flipped=False):
        """What the gradient is asked of: zeros beside the matrices, and the other leaves."""
        return over(
            lambda w, role: (
                jnp.zeros(_probe_shape(w, _of_inputs(w, role) != flipped, o.galore.rank), dtype)
                if _is_matrix(w)
                else w
            ),
            trainable,
        )

    def init(trainable):
        def number(value):
            return matrices(lambda w, _: jnp.full(w.shape[:-2], value, jnp.int32), trainable)

        def sketch(w, inputs):  # random, for the first step renews it
            shape = (*w.shape[:-2], w.shape[-2 if inputs else -1], _rank(w, o.galore.rank))
            return _projection(jax.random.normal(jax.random.key(math.prod(shape)), shape))

        like = probes(trainable)
        return State(
            jnp.int32(0),
            eight_bit.zeros(like, jnp.int8),
            eight_bit.zeros(like, jnp.uint8),
            matrices(sketch, trainable),
            number(0),
            number(o.galore.update_every),
            number(0),
        )

    def gradients(gradient, trainable, state):
        def of(projection, flipped=False):
            def bind(x):
                return over(
                    lambda w, role, p, x: (
                        Probed(w, p, x, _of_inputs(w, role) != flipped) if _is_matrix(w) else x
                    ),
                    trainable,
                    projection,
                    x,
                )

            return gradient(bind, probes(trainable, flipped))

        def renewed(state):
            _, inside = of(state.projection)
            across = matrices(
                lambda w, inputs, g: _basis(g, inputs).astype(dtype), trainable, inside
            )
            _, across = of(across, flipped=True)
            each = matrices(
                lambda w, inputs, g, *old: _renewed(_basis(g, not inputs), state.count, *old),
                trainable,
                across,
                *state[3:],
            )
            return State(
                *state[:3],
                *(matrices(lambda w, inputs, new, i=i: new[i], trainable, each) for i in range(4)),
            )

        is_due = jnp.any(
            jnp.concatenate([jnp.ravel(due) for due in jax.tree.leaves(state.due)]) <= state.count
        )
        state = jax.lax.cond(is_due, renewed, lambda state: state, state)
        return *of(state.projection), state

    def apply(trainable, before, state, grads, norm, ok, key):
        count, clip = state.count + 1, jnp.minimum(1.0, (o.clip_norm or jnp.inf) / norm)
        keys = iter(jax.random.split(key, len(jax.tree.leaves(grads))))

        def stepped(w, role, g, projection, mu, nu):
            """A leaf, or some layers or rows of it, as float32, and its moments after the step."""
            update, mu, nu = eight_bit.adam(
                g.astype(jnp.float32) * clip, mu, nu, count, b1=o.beta1, b2=o.beta2, eps=o.eps
            )
            if projection is not None:
                p = dense(projection)
                update = o.galore.scale * (p @ update if _of_inputs(w, role) else update @ p.T)
            w, rate = (
                dense(w, jnp.float32),
                learning_rate(o, steps, o.learning_rate_ratio[role])(state.count),
            )
            return w - rate * (update + o.weight_decay[role] * w), mu, nu

        def one(w, role, g, projection, *codes):
            moments = Moment(*codes[:2]), Moment(*codes[2:])
            if _is_matrix(w):
                return _by_pieces(stepped, w, role, g, projection, *moments, ok, next(keys))
            new = stepped(w, role, g, None, *moments)
            fine = finite(new)
            return *select(ok & fine, new, (w, *moments)), fine

        each = over(one, trainable, grads, state.projection, *state.mu, *state.nu)
        trainable, mu, nu, fine = (
            over(lambda w, role, new, i=i: new[i], trainable, each) for i in range(4)
        )
        mu, nu = (
            Moment(*(over(lambda w, role, x, i=i: x[i], trainable, moment) for i in range(2)))
            for moment in (mu, nu)
        )
        # A piece is applied or not before the next is computed: what is not finite stays out of it,
        # though of such a step (which none of the settings that are let in takes) other pieces may
        # be applied.
        applied = ok & jnp.array(jax.tree.leaves(fine)).all()
        return (
            trainable,
            State(select(applied, count, before.count), mu, nu, *select(ok, state[3:], before[3:])),
            applied,
        )

    return Rule(init, gradients, apply)


def _is_matrix(x) -> bool:
    return isinstance(x, Quantised)


def _of_inputs(w: Quantised, role: str) -> bool:
    """Whether the subspace is one of the inputs: of the longer axis, which leaves the shorter one
    to the moments. That of an
    embedding or a head is of the residual: of tokens, it would not hold those that a renewal did
      not see.
    """
    return role == "kernel" and w.shape[-2] >= w.shape[-1]


def _rank(w: Quantised, wanted: int) -> int:
    return min(wanted, *w.shape[-2:])


def _probe_shape(w: Quantised, inputs: bool, wanted: int) -> tuple[int, ...]:
    *layers, D, F = w.shape
    R = _rank(w, wanted)
    return (*layers, R, F) if inputs else (*layers, D, R)


def _projection(basis: jax.Array) -> Quantised:
    return quantise(basis, integers(4, basis.shape[-2]), jnp.float32)


def _basis(g: jax.Array, inputs: bool) -> jax.Array:
    """An orthonormal basis [..., n, R] of the other axis, from a gradient in a subspace of the
    inputs [..., R, n] or of the outputs [..., n, R]. QR is float32.
    """
    g = g.astype(jnp.float32)
    return jnp.linalg.qr(jnp.swapaxes(g, -1, -2) if inputs else g)[0]


def _renewed(basis, count, projection: Quantised, due, gap, agreed):
    """The projection, due, gap and agreed of a matrix [L, ...] after a renewal, for those of its
    layers that are due.
    """
    n, R = basis.shape[-2:]
    old = dense(projection)
    shared = jnp.sum(jnp.einsum("...nR,...nS->...RS", old, basis) ** 2, axis=(-2, -1)) / jnp.sum(
        old**2, axis=(-2, -1)
    )
    # The mean squared cosine of the angles between the two, of which two random subspaces have R /
    # n.
    now, agree = due <= count, shared - R / n >= AGREE**2 * (1 - R / n)
    new_agreed = jnp.where(agree, agreed + 1, 0)
    new_gap = jnp.where(new_agreed >= PATIENCE, 2 * gap, gap)
    projection = jax.tree.map(
        lambda new, old: jnp.where(jnp.expand_dims(now, range(now.ndim, new.ndim)), new, old),
        _projection(basis),
        projection,
    )
    return projection, *select(now, (count + new_gap, new_gap, new_agreed), (due, gap, agreed))


def _by_pieces(
    f, w: Quantised, role: str, g, projection: Quantised, mu: Moment, nu: Moment, ok, key
):
    """f(w, role, g, projection, mu, nu) -> (w, mu, nu) of a layer (of an expert, or of some rows of
    an embedding) at a time and in place, so that little of it is float32 at one time; what comes
    back as w is rounded at random. A piece that would not be finite stays as it is. Returns (w, mu,
    nu, whether all were).
    """
    *layers, D, F = w.shape
    like, state = (w, mu, nu), (w, g, mu, nu)
    if layers:
        state, projection = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[len(layers) :]), (state, projection)
        )
    else:
        blocks, block, _ = w.codes.shape
        pieces = next(n for n in range(-(-D * F // PIECE), blocks + 1) if blocks % n == 0)
        # The weight is filled up to whole blocks; so is what goes with its rows.
        g, mu, nu = jax.tree.map(
            lambda x: jnp.pad(x, ((0, blocks * block - D), (0, 0))), (g, mu, nu)
        )
        w = dataclasses.replace(w, rows=blocks // pieces * block)
        state = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), (w, g, mu, nu))
    w, g, mu, nu = state

    def piece(i, carry):
        state, fine = carry

        def at(tree):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

        w, mu, nu = old = at(state)
        new, mu, nu = f(w, role, at(g), at(projection) if layers else projection, mu, nu)
        here = finite((new, mu, nu))
        new = select(
            ok & here, (quantise(new, w.form, w.dtype, jax.random.fold_in(key, i)), mu, nu), old
        )
        return jax.tree.map(
            lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, axis=0), state, new
        ), fine & here

    (w, mu, nu), fine = jax.lax.fori_loop(0, len(w.codes), piece, ((w, mu, nu), jnp.bool_(True)))
    w = dataclasses.replace(w, rows=D)
    return *jax.tree.map(
        lambda x, like: x.reshape(-1, *like.shape[1:])[: len(like)], (w, mu, nu), like
    ), fine
