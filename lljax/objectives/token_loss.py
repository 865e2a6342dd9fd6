"""Next-token cross-entropy that never holds the logits of more than a chunk of tokens, nor more of
the head than its slices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lljax.attention.softcap import capped, through_cap
from lljax.data.packing import IGNORED
from lljax.models.probe import side_by_side
from lljax.parallel.sharded_embedding import around, passed_on, slices, spread
from lljax.parallel.sharding import ROWS, TOKENS, VOCABULARY, Layout


def cross_entropy(
    hidden,
    head,
    targets,
    *,
    chunk: int,
    softcap: float | None = None,
    layout: Layout | None = None,
    update=None,
) -> jax.Array:
    """Sum of the cross-entropies of `targets` [B, T] under hidden [B, T, D] and head [V, D] (or a
    `Probed`); float32 scalar.

    Ignored targets (-100) count for nothing, in the value and in both gradients. Memory is O(chunk
    x V). Where a gradient is asked for it is formed together with the value; that of the head is
    formed only if the head trains. On one device logits are computed once; where the head is spread
    over devices its slices go round twice, for the log-sum-exp and for the gradient. softcap: of
    the logits, see lljax.attention.softcap. Logits, their softmax and the sums over chunks are
    float32.

    update: arrays [B, T, R] and [V, R] whose product is added to the logits, before the cap (LoRA
      on the head); the sum of the two heads is never formed.
    """
    V, (hidden, head) = head.shape[0], side_by_side(hidden, head)
    if update is not None:
        hidden, head = (*hidden, update[0]), (*head, update[1])
    if layout is None:
        return _in_chunks(hidden, head, targets, chunk, V, 1, softcap)
    tokens = (TOKENS, "tensor")  # where heads are cut, the tokens of the loss are

    @functools.partial(
        jax.shard_map,
        mesh=layout.mesh,
        check_vma=False,
        out_specs=PartitionSpec(),
        in_specs=(
            PartitionSpec(ROWS, tokens),
            PartitionSpec(VOCABULARY),
            PartitionSpec(ROWS, tokens),
        ),
    )
    def of_all(hidden, part, targets):
        total = _in_chunks(hidden, part, targets, chunk, V, slices(layout.mesh), softcap)
        return jax.lax.psum(total, layout.mesh.axis_names)

    return of_all(hidden, spread(head, layout.mesh), targets)


def balance_of(load, tokens) -> jax.Array:
    """The load-balancing loss E * sum_e f_e P_e of experts, float32 scalar; k where they share the
    `tokens` evenly.

    load: see lljax.models.decoder, counted over `tokens`. Fedus et al. 2021, arXiv 2101.03961, eq.
      4 to 6, as transformers' `load_balancing_loss_func` has it: f_e is how many times a token
      chose the e-th expert, P_e its probability, each the mean over tokens and layers. Of a sigmoid
      router P_e is of scores that are made to sum to 1 first (DeepSeek-AI 2024, arXiv 2412.19437,
      eq. 19 and 20), and the mean goes over the rows at hand, not over each row.
    """
    f, P = jnp.sum(load, axis=0) / (len(load) * jnp.maximum(tokens, 1))
    return load.shape[2] * jnp.sum(f * P)


def busiest_of(load) -> jax.Array:
    """How many times its even share of a layer's tokens the busiest expert gets; 1 where all get
    the same, E / k at most.
    """
    chosen = load[:, 0]
    return chosen.shape[1] * jnp.max(
        chosen / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1)
    )


def _in_chunks(hidden, head, targets, chunk, V, n, softcap):
    tokens = targets.size
    chunk = min(chunk, tokens)
    padded = -(-tokens // chunk) * chunk
    hidden = tuple(
        jnp.pad(x.reshape(tokens, -1), ((0, padded - tokens), (0, 0))).reshape(
            -1, chunk, x.shape[-1]
        )
        for x in hidden
    )
    targets = jnp.pad(
        targets.reshape(tokens), (0, padded - tokens), constant_values=IGNORED
    ).reshape(-1, chunk)
    return _cross_entropy(hidden, head, targets, V, n, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(hidden, head, targets, V, n, softcap):
    """hidden ([chunks, C, D], ...), head ([V / n, D], ...) (the device's of n slices), targets
    [chunks, C].
    """
    return _loss(targets, *_statistics(hidden, head, targets, V, n, softcap))


def _loss(targets, lse, of_target):
    return jnp.sum(jnp.where(targets == IGNORED, 0.0, lse - of_target))


_wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(h, part, first, V, softcap):
    """float32 [C, V / n] of h ([C, D], ...) and slices of the head that begin with row `first`."""
    logits = sum(_wide("CD,VD->CV", x, w.astype(x.dtype)) for x, w in zip(h, part))
    return jnp.where(first + jnp.arange(len(part[0])) < V, capped(logits, softcap), -jnp.inf)


def _seen(logits, t, first):
    """What a slice tells of the tokens t [C]: their log-sum-exp, and the logit of the target, 0
    where it is in another.
    """
    at = jnp.take_along_axis(logits, jnp.clip(t - first, 0, logits.shape[1] - 1)[:, None], axis=-1)[
        :, 0
    ]
    inside = (t >= first) & (t < first + logits.shape[1])
    return jax.nn.logsumexp(logits, axis=-1), jnp.where(inside, at, 0.0)


def _statistics(hidden, head, targets, V, n, softcap):
    """The log-sum-exp of the logits and the logit of the target, float32 [chunks, C] each."""

    def of_slice(seen, part, first):
        def of_chunk(_, xs):
            h, t, lse, of_target = xs
            more_lse, more_of_target = _seen(_logits(h, part, first, V, softcap), t, first)
            return None, (jnp.logaddexp(lse, more_lse), of_target + more_of_target)

        return jax.lax.scan(of_chunk, None, (hidden, targets, *seen))[1]

    nothing = jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape, jnp.float32)
    return around(of_slice, nothing, head, n)


def _forward(hidden, head, targets, V, n, softcap):
    trained = tuple(w.perturbed for w in head)
    hidden, head, targets = jax.tree.map(lambda x: x.value, (hidden, head, targets))

    def of_slice(carry, part, first):
        d_hidden, d_head, seen, total = carry

        def of_chunk(carry, xs):
            (d_head, total), (h, t, d_h, seen) = carry, xs
            logits = _logits(h, part, first, V, softcap)
            lse, of_target = _seen(logits, t, first) if n == 1 else seen
            d_logits = jnp.exp(logits - lse[:, None]) - jax.nn.one_hot(
                t - first, len(part[0]), dtype=jnp.float32
            )
            d_logits = through_cap(
                jnp.where(t[:, None] == IGNORED, 0.0, d_logits), logits, softcap
            ).astype(h[0].dtype)
            more = tuple(
                _wide("CV,VD->CD", d_logits, w.astype(x.dtype)).astype(x.dtype)
                for x, w in zip(h, part)
            )
            d_head = tuple(
                d if d is None else d + _wide("CV,CD->VD", d_logits, x) for d, x in zip(d_head, h)
            )
            if n == 1:
                return (d_head, total + _loss(t, lse, of_target)), more
            return (d_head, total), jax.tree.map(jnp.add, d_h, more)

        (d_head, total), d_hidden = jax.lax.scan(
            of_chunk, (d_head, total), (hidden, targets, d_hidden, seen)
        )
        return d_hidden, passed_on(d_head, n), seen, total

    d_head = tuple(jnp.zeros(w.shape, jnp.float32) if of else None for w, of in zip(head, trained))
    # The sum is carried: collected chunk by chunk and summed afterwards, XLA on a GPU holds a third
    # of `hidden` more.
    d_hidden, seen, total = None, None, jnp.float32(0)
    if n > 1:
        d_hidden, seen = (
            jax.tree.map(jnp.zeros_like, hidden),
            _statistics(hidden, head, targets, V, n, softcap),
        )
        total = _loss(targets, *seen)
    d_hidden, d_head, _, total = around(of_slice, (d_hidden, d_head, seen, total), head, n)
    d_head = tuple(d if d is None else d.astype(w.dtype) for d, w in zip(d_head, head))
    return total, (d_hidden, d_head)


def _backward(V, n, softcap, saved, d_total):
    return *jax.tree.map(lambda d: d * d_total.astype(d.dtype), saved), None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
