"""What the linear layers of a decoder layer read: sums over the calibration tokens."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lljax.models.context import LayerContext
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.linear import Linear
from lljax.models.memory import EVERYTHING, fold_tiles
from lljax.models.moe import ExpertLinear, Experts, MoE


class Sums(NamedTuple):
    """Over the tokens x that linear layers read: gram, the sum of x x^T, float32 [I, I]; size, the
    sum of |x|, float32 [I]. Both with a leading axis [E] for inputs that differ between experts.
    """

    gram: jax.Array
    size: jax.Array


# By the names, within their decoder layer, of the linear layers that share an input.
Observed = dict[tuple[str, ...], Sums]


def linear_layers(layer: DecoderLayer) -> dict[str, Linear]:
    """The linear layers of a decoder layer, those of experts too, by their path in it."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(layer)
        if isinstance(node, Linear)
    }


def observed(
    layer: DecoderLayer,
    x: Float[Array, "B T D"],
    context: LayerContext,
    real: Bool[Array, "B T"],
    before: Observed | None,
) -> Observed:
    """`before` (None for none) and the sums over these tokens, a tile at a time
    (`context.memory.tile`).

    Every expert reads every token, so that the sums of a rare one are not empty.

    real: the tokens that are no padding.
    """
    memory, layout = context.memory, context.layout
    if before is None:
        whole = context.replace(memory=EVERYTHING)
        shapes = jax.eval_shape(lambda: observed(layer, x, whole, real, {}))
        before = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def project(sums: Observed, xs: tuple, key: None) -> tuple[Observed, Any]:
        x, positions, real = xs
        with _recording(layer, real) as seen:
            operands = layer.project((x, positions), key)
        return _plus(sums, seen), operands

    def rest(sums: Observed, xs: tuple, key: None) -> tuple[Observed, jax.Array]:
        x, mixed, real = xs
        with _recording(layer, real) as seen:
            _, x = layer.rest(None, (x, mixed, None), key, layout)
        return _plus(sums, seen), x

    sums, operands = fold_tiles(project, before, (x, context.positions, real), None, memory, layout)
    mixed, _ = layer.self_attn.mix(operands, context, None)
    return fold_tiles(rest, sums, (x, mixed, real), None, memory, layout)[0]


def _plus(sums: Observed, seen: Observed) -> Observed:
    return sums | {
        names: jax.tree.map(jnp.add, sums[names], more) if names in sums else more
        for names, more in seen.items()
    }


@contextlib.contextmanager
def _recording(layer: DecoderLayer, real: Bool[Array, "B T"]) -> Iterator[Observed]:
    """The sums over what the linear layers read inside the block, complete after it."""
    seen: Observed = {}
    inputs: dict[int, tuple[jax.Array, list[str]]] = {}

    def record(x: jax.Array, *names: str) -> None:
        inputs.setdefault(id(x), (x, []))[1].extend(names)

    def recorded(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
            record(x, name)
            return jnp.matmul(x, kernel)

        return dot

    plain = {n: x for n, x in linear_layers(layer).items() if not isinstance(x, ExpertLinear)}
    dots, mlp = {name: linear.dot for name, linear in plain.items()}, layer.mlp
    # Not by assignment, which nnx allows neither within a scan nor of anything but a module.
    for name, linear in plain.items():
        object.__setattr__(linear, "dot", recorded(name))
    if isinstance(mlp, MoE):

        def experts(x: jax.Array, *arguments: Any) -> Any:
            read = x if mlp.norm is None else mlp.norm(x)
            record(read, "mlp.experts.gate_proj", "mlp.experts.up_proj")
            seen["mlp.experts.down_proj",] = _sums_of_experts(mlp.experts, read, real)
            return mlp(x, *arguments)

        object.__setattr__(layer, "mlp", experts)
    try:
        yield seen
    finally:
        object.__setattr__(layer, "mlp", mlp)
        for name, linear in plain.items():
            object.__setattr__(linear, "dot", dots[name])
    seen |= {tuple(names): _sums(x, real) for x, names in inputs.values()}


def _sums(x: Float[Array, "B T I"], real: Bool[Array, "B T"]) -> Sums:
    x = jnp.where(real[..., None], x, 0).reshape(-1, x.shape[-1])
    gram = jnp.matmul(x.T, x, precision="highest", preferred_element_type=jnp.float32)
    return Sums(gram, jnp.sum(jnp.abs(x), axis=0, dtype=jnp.float32))


def _sums_of_experts(experts: Experts, x: Float[Array, "B T D"], real: Bool[Array, "B T"]) -> Sums:
    """The sums over what the down projection of each expert reads, if every token goes to it."""
    graphdef, weights = nnx.split(experts)

    def one(weights: Any) -> Sums:
        hidden = nnx.merge(graphdef, weights).hidden(
            x.reshape(-1, x.shape[-1]), None, lambda x, kernels: jnp.matmul(x, kernels[0])
        )
        return _sums(hidden.reshape(*x.shape[:2], -1), real)

    # each expert keeps an axis of its own, [1, ...]
    return jax.lax.map(one, jax.tree.map(lambda x: x[:, None], weights))
