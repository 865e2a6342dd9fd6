"""A gated delta network over tokens that lie on several devices in their order.

A device computes the transition of its tokens (lljax.models.mixers.delta_rule.identity), and a
prefix scan over the devices gives each the state before its first token. The bytes sent do not
depend on the number of tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lljax.attention.shard import CUT, CUT_HEADS, HEADS, PER_HEAD, kernel_platform, pass_on
from lljax.models.memory import Memory, scan_tiles
from lljax.models.mixers import delta_rule, delta_scan
from lljax.models.mixers.causal_conv import ConvTail
from lljax.models.mixers.delta_rule import DeltaCarry
from lljax.models.mixers.delta_scan import Carry, Channels, Projected
from lljax.parallel.sharding import ROWS, TOKENS, Layout, token_parts

# How the parts of a carry of each device lie on the mesh: tails, the state [B, devices, M, R, k, v]
# and the last segments.
_TAIL: Any = (CUT_HEADS, CUT)
_STATE: Any = (PartitionSpec(ROWS, TOKENS, HEADS), CUT)
CARRY = Carry(Channels(*[ConvTail(*_TAIL)] * 3), DeltaCarry(*_STATE))


def mix(
    x: Projected,
    weights: Channels,
    segments: Int[Array, "B T"],
    layout: Layout | None,
    trunks: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T M R v"]:
    """The outputs of whole rows, float32. trunks: with branches; then a device holds whole rows."""
    size, platform = token_parts(layout), kernel_platform(layout)
    assert trunks is None or size == 1, "lljax.models.mixers.refuses_branches refuses this"

    def run(x: Projected, weights: Channels, segments: jax.Array, trunks: jax.Array | None):
        carry = delta_scan.empty_carry(x, segments, weights.q.shape[-1])
        if size > 1:
            past = weights.q.shape[-1] - 1
            last = jax.tree.map(lambda a: a[:, -past:], x.channels)
            carry = _tails_before(carry, last, segments[:, -past:], size)
            ins = delta_scan.inputs(x, weights, segments, carry.tails)
            before = carry.delta._replace(state=delta_rule.identity(ins))
            carry = _state_before(carry, delta_rule.extended(ins, before).state, size)
        return delta_scan.run(x, weights, segments, carry, trunks, platform=platform)[0]

    specs = (CUT_HEADS, PER_HEAD, CUT, CUT)
    return _on_devices(run, layout, specs, CUT_HEADS)(x, weights, segments, trunks)


def mix_tile(
    x: Projected,
    weights: Channels,
    segments: Int[Array, "B T"],
    carry: Carry,
    layout: Layout | None,
) -> tuple[Float[Array, "B t M R v"], Carry]:
    """The outputs of a tile of every device, float32, and the carry into the next tile."""
    platform = kernel_platform(layout)

    def run(x: Projected, weights: Channels, segments: jax.Array, carry: Carry):
        out, carry = delta_scan.run(x, weights, segments, _unboxed(carry), platform=platform)
        return out, _boxed(carry)

    specs = (CUT_HEADS, PER_HEAD, CUT, CARRY)
    return _on_devices(run, layout, specs, (CUT_HEADS, CARRY))(x, weights, segments, carry)


def first_carry(
    project: Callable[[tuple], Projected],
    xs: tuple,
    weights: Channels,
    segments: Int[Array, "B T"],
    memory: Memory,
    layout: Layout | None,
) -> Carry:
    """The carry into the first tile of every device.

    With several devices their tokens are projected once for it, a tile at a time. project: any of
    the tokens of xs [B, T, ...].
    """
    size, taps = token_parts(layout), weights.q.shape[-1]
    B, T = segments.shape

    def last(a: jax.Array) -> jax.Array:  # the last tokens of each device
        a = a.reshape(B, size, T // size, *a.shape[2:])
        return a[:, :, 1 - taps :].reshape(B, size * (taps - 1), *a.shape[3:])

    def start(x: Projected, segments: jax.Array, first: jax.Array) -> Carry:
        carry = delta_scan.empty_carry(x, first, taps)
        if size > 1:
            carry = _tails_before(carry, x.channels, segments, size)
        return _boxed(carry)

    firsts = segments[:, :: T // size]
    ends = project(jax.tree.map(last, xs)), last(segments), firsts
    carry = _on_devices(start, layout, (CUT_HEADS, CUT, CUT), CARRY)(*ends)
    if size == 1:
        return carry

    def extend(carry: Carry, operands: tuple, key: None) -> tuple[Carry, None]:
        xs, segments, real = operands

        def run(x, weights, segments, real, carry):
            carry, number = _unboxed(carry), jnp.sum(real, axis=1)
            end = jnp.take_along_axis(segments, number[:, None] - 1, axis=1)
            x, segments = x.without(~real), jnp.where(real, segments, end)
            ins = delta_scan.inputs(x, weights, segments, carry.tails)
            tails = delta_scan.tails_after(x, segments, carry.tails)
            return _boxed(Carry(tails, delta_rule.extended(ins, carry.delta)))

        specs = (CUT_HEADS, PER_HEAD, CUT, CUT, CARRY)
        run = _on_devices(run, layout, specs, CARRY)
        return run(project(xs), weights, segments, real, carry), None

    def with_identity(carry: Carry) -> Carry:
        k = carry.delta.state.shape[-2]
        more = jnp.broadcast_to(jnp.eye(k), (*carry.delta.state.shape[:-1], k))
        state = jnp.concatenate([more, carry.delta.state], axis=-1)
        return carry._replace(delta=carry.delta._replace(state=state))

    operands = (xs, segments, jnp.ones(segments.shape, bool))
    total, _ = scan_tiles(extend, with_identity(carry), operands, None, memory, layout)

    def before(carry: Carry, total: jax.Array) -> Carry:
        return _boxed(_state_before(_unboxed(carry), total[:, 0], size))

    specs = (CARRY, CARRY.delta.state)
    return _on_devices(before, layout, specs, CARRY)(carry, total.delta.state)


def whole_platform(layout: Layout | None) -> str:
    """The platform whose kernels may run outside of `shard_map`: none of several devices, because
    the compiler cannot cut a kernel.
    """
    return kernel_platform(layout) if layout is None or layout.mesh.size == 1 else "cpu"


def _on_devices(run: Callable, layout: Layout | None, in_specs: Any, out_specs: Any) -> Callable:
    if layout is None:
        return run
    return jax.shard_map(
        run, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _boxed(carry: Carry) -> Carry:
    """With an axis of devices, of which this is one, in front of the heads of the state."""
    return carry._replace(delta=DeltaCarry(*(a[:, None] for a in carry.delta)))


def _unboxed(carry: Carry) -> Carry:
    return carry._replace(delta=DeltaCarry(*(a[:, 0] for a in carry.delta)))


def _tails_before(carry: Carry, last: Channels, segments: Int[Array, "B end"], size: int) -> Carry:
    """The carry with the end of the tokens of the device before, which `last` is here."""
    tails = Channels(*(ConvTail(a, segments) for a in last))
    tails, segment = pass_on((tails, segments[:, -1]), size)
    return _unless_first(Carry(tails, carry.delta._replace(segment=segment)), carry)


def _state_before(carry: Carry, total: Float[Array, "B M R k kv"], size: int) -> Carry:
    """The carry with the state before this device, whose tokens have the transition `total`."""
    by = 1
    while by < size:
        both = delta_rule.compose(pass_on(total, size, by), total)
        total = jnp.where(jax.lax.axis_index(TOKENS) >= by, both, total)
        by *= 2
    state = pass_on(total[..., total.shape[-2] :], size)  # the state before the row is zero
    received = carry._replace(delta=carry.delta._replace(state=state))
    return _unless_first(received, carry)


def _unless_first(received: Any, own: Any) -> Any:
    first = jax.lax.axis_index(TOKENS) == 0
    return jax.tree.map(lambda there, here: jnp.where(first, here, there), received, own)
