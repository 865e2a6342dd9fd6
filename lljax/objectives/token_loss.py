"""Log-probabilities of next tokens, and their cross-entropy, in chunks of tokens: the logits of one
chunk and one slice of the head exist at a time.
"""

import dataclasses
import functools
import operator
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lljax.attention.softcap import apply_softcap, softcap_gradient
from lljax.data.batch import IGNORED
from lljax.models.decoder import Decoder
from lljax.models.probe import ProbedWeight, product_terms
from lljax.parallel.sharded_embedding import fold_slices, pad_rows, send_next, slice_count
from lljax.parallel.sharding import ROWS, TOKENS, VOCABULARY, Layout

Update = tuple[Float[Array, "B T R"], Float[Array, "V R"]]
Parts = tuple[Array, ...]  # of hidden states, or of the head; their products add up to the logits
Statistics = tuple[Float[Array, "chunks C"], Float[Array, "chunks C"]]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | ProbedWeight,
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    softcap: float | None = None,
    layout: Layout | None = None,
    update: Update | None = None,
) -> Float[Array, ""]:
    """Sum of the cross-entropies of `targets`, float32.

    Ignored targets (-100) add nothing to the value or to the gradients. Memory is O(chunk x V).
    The gradient is formed together with the value; the gradient of the head only if the head
    trains. Logits are computed once on a single device. A head that is spread over devices sends
    its slices around twice: for the log-sum-exp and for the gradient. Logits, their softmax and
    sums over chunks are float32.

    chunk: tokens whose logits exist at one time on a device.
    softcap: the cap of the logits, see lljax.attention.softcap.
    update: arrays whose product is added to the logits before the cap (LoRA on the head); the sum
      of the two heads is never formed.
    """
    static = _Head(V=head.shape[0], slices=1, softcap=softcap, chunk=chunk, output="loss")
    return _over_devices(hidden, head, targets, static, layout, update)


def token_log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | ProbedWeight,
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    softcap: float | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
    update: Update | None = None,
) -> Float[Array, "B T"]:
    """The log-probability of every target, float32; 0 for ignored targets.

    temperature: divides the logits, after the cap. Other arguments as of `cross_entropy`. The
    gradient computes the logits again, a chunk at a time, because the weight of a token is not
    known before the backward pass.
    """
    static = _Head(
        V=head.shape[0],
        slices=1,
        softcap=softcap,
        chunk=chunk,
        output="log_probs",
        temperature=temperature,
    )
    return _over_devices(hidden, head, targets, static, layout, update)


def token_entropies(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | ProbedWeight,
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    softcap: float | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
    update: Update | None = None,
) -> Float[Array, "B T"]:
    """The entropy in nats of the distribution that every target is drawn from, float32; 0 for
    ignored targets. Without gradient. Arguments as of `token_log_probs`.
    """
    static = _Head(
        V=head.shape[0],
        slices=1,
        softcap=softcap,
        chunk=chunk,
        output="entropies",
        temperature=temperature,
    )
    hidden, head, update = jax.lax.stop_gradient((hidden, head, update))
    return _over_devices(hidden, head, targets, static, layout, update)


def loss_of(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    layout: Layout | None = None,
    key: Array | None = None,
) -> Float[Array, ""]:
    """`cross_entropy` under a model's head, its adapter and its cap of the logits. key: the
    random key of the adapter's dropout.
    """
    return cross_entropy(hidden, targets=targets, chunk=chunk, **_head(model, hidden, layout, key))


def log_probs_of(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    temperature: float = 1.0,
    layout: Layout | None = None,
    key: Array | None = None,
) -> Float[Array, "B T"]:
    """`token_log_probs` under a model's head, its adapter and its cap of the logits."""
    head = _head(model, hidden, layout, key)
    return token_log_probs(hidden, targets=targets, chunk=chunk, temperature=temperature, **head)


def entropies_of(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    temperature: float = 1.0,
    layout: Layout | None = None,
) -> Float[Array, "B T"]:
    """`token_entropies` under a model's head, its adapter and its cap of the logits."""
    head = _head(model, hidden, layout, None)
    return token_entropies(hidden, targets=targets, chunk=chunk, temperature=temperature, **head)


def _head(model: Decoder, hidden: Array, layout: Layout | None, key: Array | None) -> dict:
    return {
        "head": model.head,
        "softcap": model.spec.logit_softcap,
        "layout": layout,
        "update": model.head_update(hidden, key),
    }


@dataclasses.dataclass(frozen=True)
class _Head:
    """The static part of the computation.

    V: rows of the whole head. slices: into how many the devices cut it. chunk: tokens whose logits
    exist at one time. output: "loss", the sum of the losses, or "log_probs" or "entropies" of the
    tokens. temperature: divides the logits.
    """

    V: int
    slices: int
    softcap: float | None
    chunk: int
    output: str
    temperature: float = 1.0

    @property
    def per_token(self) -> bool:
        return self.output != "loss"


def _over_devices(
    hidden: Array,
    head: Array | ProbedWeight,
    targets: Array,
    static: _Head,
    layout: Layout | None,
    update: Update | None,
) -> Array:
    hidden_parts, head_parts = product_terms(hidden, head)
    if update is not None:
        hidden_parts, head_parts = (*hidden_parts, update[0]), (*head_parts, update[1])
    if layout is None:
        return _in_chunks(hidden_parts, head_parts, targets, static)
    mesh = layout.mesh
    static = dataclasses.replace(static, slices=slice_count(mesh))
    # The tensor axis cuts the tokens of the loss, as it cuts the heads of attention.
    tokens = PartitionSpec(ROWS, (TOKENS, "tensor"))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        check_vma=False,
        out_specs=tokens if static.per_token else PartitionSpec(),
        in_specs=(tokens, PartitionSpec(VOCABULARY), tokens),
    )
    def local(hidden: Parts, head: Parts, targets: Array) -> Array:
        out = _in_chunks(hidden, head, targets, static)
        return out if static.per_token else jax.lax.psum(out, mesh.axis_names)

    return local(hidden_parts, pad_rows(head_parts, mesh), targets)


def _in_chunks(hidden: Parts, head: Parts, targets: Array, static: _Head) -> Array:
    shape, tokens = targets.shape, targets.size
    chunk = min(static.chunk, tokens)
    padding = -tokens % chunk
    hidden = tuple(
        jnp.pad(x.reshape(tokens, -1), ((0, padding), (0, 0))).reshape(-1, chunk, x.shape[-1])
        for x in hidden
    )
    targets = jnp.pad(targets.reshape(tokens), (0, padding), constant_values=IGNORED)
    compute = _entropies if static.output == "entropies" else _chunked
    out = cast(Array, compute(hidden, head, targets.reshape(-1, chunk), static))
    return out.reshape(-1)[:tokens].reshape(shape) if static.per_token else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(hidden: Parts, head: Parts, targets: Array, static: _Head) -> Array:
    """The summed loss, or log-probabilities [chunks, C], of hidden ([chunks, C, D], ...), this
    device's slices of the head ([V / n, D], ...) and targets [chunks, C].
    """
    lse, of_target = _statistics(hidden, head, targets, static)
    if static.per_token:
        return jnp.where(targets == IGNORED, 0.0, of_target - lse)
    return _loss(targets, lse, of_target)


def _loss(targets: Array, lse: Array, of_target: Array) -> Array:
    return jnp.sum(jnp.where(targets == IGNORED, 0.0, lse - of_target))


_wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(h: Parts, part: Parts, first: Array | int, static: _Head) -> Array:
    """float32 [C, V / n] of h ([C, D], ...) and slices of the head that begin with row `first`."""
    products = [_wide("CD,VD->CV", x, w.astype(x.dtype)) for x, w in zip(h, part, strict=True)]
    logits = functools.reduce(operator.add, products)
    rows = first + jnp.arange(len(part[0]))
    logits = apply_softcap(logits, static.softcap) / static.temperature
    return jnp.where(rows < static.V, logits, -jnp.inf)


def _slice_statistics(logits: Array, t: Array, first: Array | int) -> tuple[Array, Array]:
    """The log-sum-exp of a slice for tokens t [C], and the logit of the target, 0 if it is in
    another slice.
    """
    column = jnp.clip(t - first, 0, logits.shape[1] - 1)[:, None]
    at = jnp.take_along_axis(logits, column, axis=-1)[:, 0]
    inside = (t >= first) & (t < first + logits.shape[1])
    return jax.nn.logsumexp(logits, axis=-1), jnp.where(inside, at, 0.0)


def _statistics(hidden: Parts, head: Parts, targets: Array, static: _Head) -> Statistics:
    """The log-sum-exp of the logits and the logit of the target, float32 [chunks, C] each."""

    def of_slice(statistics: Statistics, part: Parts, first: Array | int):
        def of_chunk(_: None, xs: Any):
            h, t, lse, of_target = xs
            more_lse, more = _slice_statistics(_logits(h, part, first, static), t, first)
            return None, (jnp.logaddexp(lse, more_lse), of_target + more)

        return jax.lax.scan(of_chunk, None, (hidden, targets, *statistics))[1]

    nothing = jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape, jnp.float32)
    return fold_slices(of_slice, nothing, head, static.slices)


def _entropies(hidden: Parts, head: Parts, targets: Array, static: _Head) -> Array:
    """The entropies, float32 [chunks, C]: the log-sum-exp of the logits minus their mean."""

    def of_slice(carry: Statistics, part: Parts, first: Array | int):
        def of_chunk(_: None, xs: Any):
            h, lse, mean = xs
            logits = _logits(h, part, first, static)
            more_lse = jax.nn.logsumexp(logits, axis=-1)
            both = jnp.logaddexp(lse, more_lse)
            share = jnp.exp(logits - both[:, None])
            more = jnp.sum(jnp.where(share > 0, share * logits, 0), axis=-1)
            return None, (both, mean * jnp.exp(lse - both) + more)

        return jax.lax.scan(of_chunk, None, (hidden, *carry))[1]

    nothing = jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape, jnp.float32)
    lse, mean = fold_slices(of_slice, nothing, head, static.slices)
    return jnp.where(targets == IGNORED, 0.0, lse - mean)


def _gradients(
    hidden: Parts,
    head: Parts,
    targets: Array,
    trains: tuple[Array | None, ...],
    static: _Head,
    *,
    weights: Array | None = None,
    statistics: Statistics | None = None,
):
    """The summed loss and its gradients by `hidden` and by the parts of `head` that train.

    trains: for each part of the head, None if it does not train.
    weights: float32 [chunks, C] of the losses of the tokens; None for 1.
    statistics: as `_statistics` gives them; None on one device computes them on the way.
    """
    n = static.slices

    def of_slice(carry: Any, part: Parts, first: Array | int):
        d_hidden, d_head, statistics, total = carry

        def of_chunk(carry: Any, xs: Any):
            (d_head, total), (h, t, d_h, statistics, weight) = carry, xs
            logits = _logits(h, part, first, static)
            known = statistics or _slice_statistics(logits, t, first)
            one_hot = jax.nn.one_hot(t - first, len(part[0]), dtype=jnp.float32)
            d_logits = jnp.where(
                t[:, None] == IGNORED, 0.0, jnp.exp(logits - known[0][:, None]) - one_hot
            )
            if weight is not None:
                d_logits *= weight[:, None]
            capped, d_capped = logits * static.temperature, d_logits / static.temperature
            d_logits = softcap_gradient(d_capped, capped, static.softcap).astype(h[0].dtype)
            more = tuple(
                _wide("CV,VD->CD", d_logits, w.astype(x.dtype)).astype(x.dtype)
                for x, w in zip(h, part, strict=True)
            )
            d_head = tuple(
                d if d is None else d + _wide("CV,CD->VD", d_logits, x)
                for d, x in zip(d_head, h, strict=True)
            )
            if n == 1:
                return (d_head, total + _loss(t, *known)), more
            return (d_head, total), jax.tree.map(jnp.add, d_h, more)

        (d_head, total), d_hidden = jax.lax.scan(
            of_chunk, (d_head, total), (hidden, targets, d_hidden, statistics, weights)
        )
        return d_hidden, send_next(d_head, n), statistics, total

    # The sum is carried: collected chunk by chunk and summed afterwards, XLA on a GPU holds a third
    # of `hidden` more.
    d_hidden, total = None, jnp.float32(0)
    d_head = tuple(
        None if mark is None else jnp.zeros(w.shape, jnp.float32)
        for w, mark in zip(head, trains, strict=True)
    )
    if n > 1:
        d_hidden = jax.tree.map(jnp.zeros_like, hidden)
        if statistics is None:
            statistics = _statistics(hidden, head, targets, static)
        total = _loss(targets, *statistics)
    carry = d_hidden, d_head, statistics, total
    d_hidden, d_head, _, total = fold_slices(of_slice, carry, head, n)
    d_head = tuple(d if d is None else d.astype(w.dtype) for d, w in zip(d_head, head, strict=True))
    return total, (d_hidden, d_head)


def _forward(hidden: Any, head: Any, targets: Any, static: _Head):
    trains = tuple(jnp.zeros(()) if w.perturbed else None for w in head)
    hidden, head, targets = jax.tree.map(lambda x: x.value, (hidden, head, targets))
    if not static.per_token:
        return _gradients(hidden, head, targets, trains, static)
    statistics = _statistics(hidden, head, targets, static)
    lse, of_target = statistics
    log_probs = jnp.where(targets == IGNORED, 0.0, of_target - lse)
    return log_probs, (hidden, head, targets, trains, statistics)


def _backward(static: _Head, saved: Any, d_out: Array):
    if not static.per_token:
        return *jax.tree.map(lambda d: d * d_out.astype(d.dtype), saved), None
    hidden, head, targets, trains, statistics = saved
    _, gradients = _gradients(
        hidden, head, targets, trains, static, weights=-d_out, statistics=statistics
    )
    return *gradients, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
