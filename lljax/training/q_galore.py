"""Q-GaLore, Zhang et al. 2024, arXiv 2407.08296: int8 weights with stochastic rounding, int4
projections that are renewed less often while they agree, 8-bit Adam in the subspace.

The full gradient of a matrix never exists: `Probed` gives the gradient in the subspace. Subspaces
come from subspace iteration, which needs only products with the gradient G: from the present basis
P to an orthonormal basis of G orth(G^T P), with two more backward passes at a step that renews.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.config import Config
from lljax.models.probe import ProbedWeight
from lljax.models.quantize import Quantized, dense, integer_form, quantize
from lljax.parallel.rounding import cdiv
from lljax.training import eight_bit
from lljax.training.eight_bit import Moment
from lljax.training.rule import Rule, StepGradients, finite, learning_rate, select

AGREE = 0.4  # cosine of two successive subspaces from which they agree
PATIENCE = 5  # agreements in a row after which a subspace is kept twice as long
PIECE = 1 << 24  # weights of an embedding that are float32 at one time


class State(NamedTuple):
    """mu, nu: moments, of matrices in their subspaces.

    projection: int4 [..., n, R] of every matrix.
    due: int32 per layer, the step that renews it. gap: steps between two renewals. agreed: renewals
      in a row that agreed with the basis before.
    """

    count: jax.Array
    mu: Moment
    nu: Moment
    projection: nnx.State
    due: nnx.State
    gap: nnx.State
    agreed: nnx.State


class Leaf(NamedTuple):
    """A trainable leaf at a step. g: its gradient, of a matrix in the subspace."""

    w: Any
    g: jax.Array
    mu: Moment
    nu: Moment


def q_galore(optimizer: Config, steps: int, groups: nnx.State, dtype: jnp.dtype) -> Rule:
    """The rule of `optimizer.name` "q_galore", for trainable leaves whose matrices are quantized.

    groups: the result of `lljax.training.optimizer.groups_of`.
    dtype: the dtype of the computation.

    The norm that a step reports and clips is the norm of the gradient in the subspaces.
    """
    roles = jax.tree.map(lambda group: group.partition("/")[0], groups)
    rule = _QGalore(optimizer=optimizer, steps=steps, roles=roles, dtype=dtype)
    return Rule(rule.init, rule.gradients, rule.apply)


@dataclasses.dataclass(frozen=True)
class _QGalore:
    """optimizer: `config.optimizer`. roles: the role of every trainable leaf, a pytree."""

    optimizer: Config
    steps: int
    roles: nnx.State
    dtype: jnp.dtype

    def over(self, f: Callable, trainable: nnx.State, *rest):
        """f(leaf, role, ...) of every leaf; a quantized matrix is one leaf."""
        return jax.tree.map(f, trainable, self.roles, *rest, is_leaf=_is_matrix)

    def over_matrices(self, f: Callable, trainable: nnx.State, *rest):
        """f(matrix, whether its subspace is of the inputs, ...) of every matrix, None of other
        leaves.
        """
        return self.over(
            lambda w, role, *xs: f(w, _of_inputs(w, role), *xs) if _is_matrix(w) else None,
            trainable,
            *rest,
        )

    def probes(self, trainable: nnx.State, flipped: bool = False):
        """The leaves to differentiate: a zero probe for every matrix, the leaf itself otherwise.

        flipped: probes in the other axis of every matrix.
        """
        rank = self.optimizer.galore.rank
        return self.over(
            lambda w, role: (
                jnp.zeros(_probe_shape(w, _of_inputs(w, role) != flipped, rank), self.dtype)
                if _is_matrix(w)
                else w
            ),
            trainable,
        )

    def init(self, trainable: nnx.State) -> State:
        rank, update_every = self.optimizer.galore.rank, self.optimizer.galore.update_every

        def number(value: int):
            return self.over_matrices(
                lambda w, _: jnp.full(w.shape[:-2], value, jnp.int32), trainable
            )

        def sketch(w: Quantized, inputs: bool):  # random, for the first step renews it
            shape = (*w.shape[:-2], w.shape[-2 if inputs else -1], _rank(w, rank))
            return _projection(jax.random.normal(jax.random.key(math.prod(shape)), shape))

        like = self.probes(trainable)
        return State(
            count=jnp.int32(0),
            mu=eight_bit.zeros(like, jnp.int8),
            nu=eight_bit.zeros(like, jnp.uint8),
            projection=self.over_matrices(sketch, trainable),
            due=number(0),
            gap=number(update_every),
            agreed=number(0),
        )

    def gradients(self, gradient: Callable, trainable: nnx.State, state: State):
        """(loss, gradients, state): the gradients in the subspaces, which are renewed if due."""
        due = [jnp.ravel(due) for due in jax.tree.leaves(state.due)]
        is_due = jnp.any(jnp.concatenate(due) <= state.count)
        renew = functools.partial(self._renew, gradient, trainable)
        state = jax.lax.cond(is_due, renew, lambda state: state, state)
        return *self._within(gradient, trainable, state.projection), state

    def _within(
        self, gradient: Callable, trainable: nnx.State, projection: nnx.State, flipped: bool = False
    ):
        """(loss, gradients) in the subspaces of `projection`."""

        def bind(x: Any):
            return self.over(
                lambda w, role, p, x: (
                    ProbedWeight(w, p, x, _of_inputs(w, role) != flipped) if _is_matrix(w) else x
                ),
                trainable,
                projection,
                x,
            )

        return gradient(bind, self.probes(trainable, flipped))

    def _renew(self, gradient: Callable, trainable: nnx.State, state: State) -> State:
        """The state with new projections of the layers that are due."""
        _, inside = self._within(gradient, trainable, state.projection)
        across = self.over_matrices(
            lambda w, inputs, g: _basis(g, inputs).astype(self.dtype), trainable, inside
        )
        _, across = self._within(gradient, trainable, across, flipped=True)
        new = self.over_matrices(
            lambda w, inputs, g, *old: _renewed(_basis(g, not inputs), state.count, *old),
            trainable,
            across,
            *state[3:],
        )
        return State(
            *state[:3],
            *(
                self.over_matrices(lambda w, inputs, new, i=i: new[i], trainable, new)
                for i in range(4)
            ),
        )

    def apply(self, trainable: nnx.State, before: State, state: State, gradients: StepGradients):
        clip = jnp.minimum(1.0, (self.optimizer.clip_norm or jnp.inf) / gradients.norm)
        keys = iter(jax.random.split(gradients.key, len(jax.tree.leaves(gradients.values))))

        def update(w: Any, role: str, g: jax.Array, projection: Quantized | None, *codes):
            leaf = Leaf(w, g, Moment(*codes[:2]), Moment(*codes[2:]))
            step = functools.partial(self._step_leaf, state.count, clip, role)
            if projection is not None:
                return _by_pieces(step, leaf, projection, gradients.ok, next(keys))
            new = step(leaf, None)
            fine = finite(new)
            return *select(gradients.ok & fine, new, (leaf.w, leaf.mu, leaf.nu)), fine

        new = self.over(update, trainable, gradients.values, state.projection, *state.mu, *state.nu)
        trainable, mu, nu, fine = (
            self.over(lambda w, role, new, i=i: new[i], trainable, new) for i in range(4)
        )
        mu, nu = (
            Moment(*(self.over(lambda w, role, x, i=i: x[i], trainable, moment) for i in range(2)))
            for moment in (mu, nu)
        )
        # A piece is applied or not before the next is computed, so that no value that is not finite
        # enters it. Other pieces of such a step may be applied; no legal settings lead to one.
        applied = gradients.ok & jnp.array(jax.tree.leaves(fine)).all()
        new_state = State(
            select(applied, state.count + 1, before.count),
            mu,
            nu,
            *select(gradients.ok, state[3:], before[3:]),
        )
        return trainable, new_state, applied

    def _step_leaf(
        self, count: jax.Array, clip: jax.Array, role: str, leaf: Leaf, projection: Quantized | None
    ):
        """(w, mu, nu) after the step of a leaf, or of some of its layers or rows; w is float32."""
        o = self.optimizer
        update, mu, nu = eight_bit.adam(
            leaf.g.astype(jnp.float32) * clip,
            leaf.mu,
            leaf.nu,
            count + 1,
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
        )
        if projection is not None:
            p = cast(jax.Array, dense(projection))
            update = o.galore.scale * (p @ update if _of_inputs(leaf.w, role) else update @ p.T)
        w = dense(leaf.w, jnp.float32)
        rate = learning_rate(o, self.steps, o.learning_rate_ratio[role])(count)
        return w - rate * (update + o.weight_decay[role] * w), mu, nu


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Quantized)


def _of_inputs(w: Quantized, role: str) -> bool:
    """Whether the subspace is of the inputs: it reduces the longer axis, so that the moments keep
    the shorter one. In an embedding or a head it reduces the residual: a subspace of the tokens
    would leave out tokens that a renewal did not see.
    """
    return role == "kernel" and w.shape[-2] >= w.shape[-1]


def _rank(w: Quantized, wanted: int) -> int:
    return min(wanted, *w.shape[-2:])


def _probe_shape(w: Quantized, inputs: bool, wanted: int) -> tuple[int, ...]:
    *layers, D, F = w.shape
    R = _rank(w, wanted)
    return (*layers, R, F) if inputs else (*layers, D, R)


def _projection(basis: jax.Array) -> Quantized:
    return quantize(basis, integer_form(4, basis.shape[-2]), jnp.float32)


def _basis(g: jax.Array, inputs: bool) -> jax.Array:
    """An orthonormal basis [..., n, R] of the other axis, from a gradient in a subspace of the
    inputs [..., R, n] or of the outputs [..., n, R]. QR is float32.
    """
    g = g.astype(jnp.float32)
    return jnp.linalg.qr(jnp.swapaxes(g, -1, -2) if inputs else g)[0]


def _renewed(
    basis: jax.Array,
    count: jax.Array,
    projection: Quantized,
    due: jax.Array,
    gap: jax.Array,
    agreed: jax.Array,
):
    """The projection, due, gap and agreed of a matrix [L, ...] after a renewal of the layers that
    are due.
    """
    n, R = basis.shape[-2:]
    old = cast(jax.Array, dense(projection))
    shared = jnp.sum(jnp.einsum("...nR,...nS->...RS", old, basis) ** 2, axis=(-2, -1)) / jnp.sum(
        old**2, axis=(-2, -1)
    )
    # The mean squared cosine of the angles between the two; R / n for two random subspaces.
    now, agree = due <= count, shared - R / n >= AGREE**2 * (1 - R / n)
    new_agreed = jnp.where(agree, agreed + 1, 0)
    new_gap = jnp.where(new_agreed >= PATIENCE, 2 * gap, gap)
    projection = jax.tree.map(
        lambda new, old: jnp.where(jnp.expand_dims(now, range(now.ndim, new.ndim)), new, old),
        _projection(basis),
        projection,
    )
    return projection, *select(now, (count + new_gap, new_gap, new_agreed), (due, gap, agreed))


def _by_pieces(step: Callable, leaf: Leaf, projection: Quantized, ok: jax.Array, key: jax.Array):
    """Steps a matrix by layers (or experts, or some rows of an embedding) and in place, so that
    little of it is float32 at one time; weights are rounded stochastically. A piece that would not
    be finite stays as it is.

    step(leaf, projection) -> (w, mu, nu).

    Returns: (w, mu, nu, whether all pieces were finite).
    """
    w, g, mu, nu = leaf
    *layers, D, F = w.shape
    like = w, mu, nu
    if layers:
        leaf, projection = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[len(layers) :]), (leaf, projection)
        )
    else:
        blocks, block, _ = w.codes.shape
        pieces = next(n for n in range(cdiv(D * F, PIECE), blocks + 1) if blocks % n == 0)
        # The weight is padded to whole blocks, and with it everything that goes with its rows.
        g, mu, nu = jax.tree.map(
            lambda x: jnp.pad(x, ((0, blocks * block - D), (0, 0))), (g, mu, nu)
        )
        w = dataclasses.replace(w, rows=blocks // pieces * block)
        leaf = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), Leaf(w, g, mu, nu))
    w, g, mu, nu = leaf

    def piece(i: jax.Array, carry: Any):
        state, fine = carry

        def at(tree: Any):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

        w, mu, nu = old = at(state)
        new, mu, nu = step(Leaf(w, at(g), mu, nu), at(projection) if layers else projection)
        here = finite((new, mu, nu))
        new = quantize(new, w.form, w.dtype, jax.random.fold_in(key, i))
        new = select(ok & here, (new, mu, nu), old)
        state = jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, i, axis=0), state, new
        )
        return state, fine & here

    (w, mu, nu), fine = jax.lax.fori_loop(0, len(w.codes), piece, ((w, mu, nu), jnp.bool_(True)))
    w = dataclasses.replace(w, rows=D)
    return *jax.tree.map(
        lambda x, like: x.reshape(-1, *like.shape[1:])[: len(like)], (w, mu, nu), like
    ), fine
