"""Gated delta network: a linear recurrence with a state of constant size.

Yang et al. 2024, arXiv 2412.06464; transformers `models/qwen3_5/modeling_qwen3_5.py` and, with its
projections fused, `models/qwen3_next/modeling_qwen3_next.py`, Qwen3NextGatedDeltaNet.

The tokens of a row may lie on several devices in their order: the state travels from device to
device as a map of constant size (`lljax.models.mixers.delta_parallel`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lljax.attention.pattern import AttentionPattern
from lljax.models.context import LayerContext
from lljax.models.declare import declare
from lljax.models.flops import RowFlops, TokenFlops, token_flops
from lljax.models.linear import Linear, RMSNorm
from lljax.models.mixers import delta_parallel, delta_scan
from lljax.models.mixers.causal_conv import ConvTail
from lljax.models.mixers.delta_rule import CHUNK, DeltaCarry
from lljax.models.mixers.delta_scan import Carry, Channels, Projected
from lljax.models.rope import Positions
from lljax.models.spec import DecoderSpec, LayerSpec

Operands = tuple[Projected, Float[Array, "B T M R v"]]  # and the gate of the outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """What a layer keeps of the tokens read, whatever their number; float32.

    tails: the last inputs of the convolution, [B, heads, taps - 1, ...]. state: of the recurrence.
    """

    tails: Channels
    state: Float[Array, "B M R k v"]

    @staticmethod
    def of(carry: Carry) -> "DeltaState":
        tails = Channels(*(jnp.moveaxis(tail.x, 1, 2) for tail in carry.tails))
        return DeltaState(tails, carry.delta.state)

    def carry(self) -> Carry:
        """All of one document."""
        ones = jnp.ones((len(self.state), self.tails.q.shape[2]), jnp.int32)
        tails = Channels(*(ConvTail(jnp.moveaxis(x, 2, 1), ones) for x in self.tails))
        return Carry(tails, DeltaCarry(self.state, ones[:, 0]))

    def write(self, update: "DeltaState", start: Int[Array, " B"]) -> "DeltaState":
        return jax.tree.map(lambda new, old: new.astype(old.dtype), update, self)

    def part(self, start: Int[Array, ""], T: int) -> "DeltaState":
        return self

    def grow(self, slots: int) -> "DeltaState":
        return self

    def fork(self, B: int, S: int) -> "DeltaState":
        return jax.tree.map(lambda x: jnp.repeat(x[:1], B, axis=0), self)


class GatedDelta(nnx.Module):
    """Gated delta rule with a short convolution, and a gated norm of its outputs."""

    hf_name: ClassVar[str] = "linear_attn"
    refused_modes: ClassVar[Mapping[str, str]] = {}
    ordered: ClassVar[bool] = True
    branches: ClassVar[bool] = True

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str):
        assert spec.delta is not None, "a layer with mixer 'gated_delta' needs DecoderSpec.delta"
        self.delta = delta = spec.delta
        D, keys, values = spec.D, delta.M * delta.k, delta.M * delta.R * delta.v
        heads, channels = delta.M * delta.R, 2 * delta.M * delta.k + delta.M * delta.R * delta.v

        def linear(outputs: int, **names: Any) -> Linear:
            return Linear((D, outputs), axes=("embed", "heads"), **names)

        if delta.fused:
            self.in_proj_qkvz = linear(2 * keys + 2 * values, hf=f"{hf}.in_proj_qkvz")
            self.in_proj_ba = linear(2 * heads, hf=f"{hf}.in_proj_ba")
        else:
            # Whole on every device of `tensor`, so that its adapter is one pair of factors, as in
            # PEFT: equal parts would mix heads of queries, keys and values.
            self.in_proj_qkv = Linear(
                (D, 2 * keys + values), axes=("embed", None), hf=f"{hf}.in_proj_qkv"
            )
            self.in_proj_z = linear(values, hf=f"{hf}.in_proj_z")
            self.in_proj_b = linear(heads, hf=f"{hf}.in_proj_b")
            self.in_proj_a = linear(heads, hf=f"{hf}.in_proj_a")
        self.conv = declare(
            (channels, 1, delta.taps),
            axes=(None, None, None),
            hf=f"{hf}.conv1d.weight",
            role="bias",
        )
        # In bfloat16 a decay close to 1 is off by more than what it forgets.
        self.A_log, self.dt_bias = (
            declare(
                (heads,), axes=("heads",), hf=f"{hf}.{name}", role="bias", init=init, float32=True
            )
            for name, init in (("A_log", "zeros"), ("dt_bias", "ones"))
        )
        self.norm = RMSNorm(delta.v, spec.norm_eps, hf=f"{hf}.norm")
        self.out_proj = Linear((values, D), axes=("heads", "embed"), hf=f"{hf}.out_proj")

    def project(
        self, x: Float[Array, "B T D"], positions: Positions, dropout_key: jax.Array | None = None
    ) -> Operands:
        if self.delta.fused:
            q, k, v, z, b, a = self._split(
                self.in_proj_qkvz(x, dropout_key), self.in_proj_ba(x, dropout_key)
            )
        else:
            q, k, v = jnp.split(self.in_proj_qkv(x, dropout_key), self._borders(), axis=-1)
            z, b, a = (
                projection(x, dropout_key)
                for projection in (self.in_proj_z, self.in_proj_b, self.in_proj_a)
            )
        keys = (*x.shape[:2], self.delta.M, self.delta.k)
        heads = (*x.shape[:2], self.delta.M, self.delta.R)
        values = (*heads, self.delta.v)
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))
        a = a.astype(jnp.float32).reshape(*x.shape[:2], -1)
        decay = -rate * jax.nn.softplus(a + self.dt_bias[...])
        return Projected(
            Channels(q.reshape(keys), k.reshape(keys), v.reshape(values)),
            decay=decay.reshape(heads),
            beta=jax.nn.sigmoid(b.astype(jnp.float32)).reshape(heads),
        ), z.reshape(values)

    def _split(self, qkvz: Float[Array, "B T X"], ba: Float[Array, "B T Y"]) -> list[jax.Array]:
        """The fused projections, in which the outputs of a key head stand together."""
        M, R, k, v = self.delta.M, self.delta.R, self.delta.k, self.delta.v
        qkvz, ba = (x.reshape(*x.shape[:2], M, -1) for x in (qkvz, ba))
        return [
            *jnp.split(qkvz, (k, 2 * k, 2 * k + R * v), axis=-1),
            *jnp.split(ba, (R,), axis=-1),
        ]

    def mix(
        self, operands: Operands, context: LayerContext, state: DeltaState | None = None
    ) -> tuple[Float[Array, "B T X"], DeltaState | None]:
        x, z = operands
        if state is None:
            segments, trunks = _segments(context), context.mask.q_trunks
            out = delta_parallel.mix(x, self._taps(), segments, context.layout, trunks)
            return self._gated(out, z), None
        segments = jnp.ones(z.shape[:2], jnp.int32)
        if context.count is not None:
            x = x.without(jnp.arange(z.shape[1]) >= context.count[:, None])
        out, after = delta_scan.run(
            *(x, self._taps(), segments, state.carry()),
            count=context.count,
            platform=delta_parallel.whole_platform(context.layout),
        )
        assert context.start is not None, "a state comes with the slots of the tokens"
        return self._gated(out, z), state.write(DeltaState.of(after), context.start)

    def output(
        self, mixed: Float[Array, "B T X"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        return self.out_proj(mixed, dropout_key)

    def first_carry(
        self, project: Callable[[tuple], Operands], xs: tuple, context: LayerContext
    ) -> Carry | None:
        """With LoRA dropout, the state before a device is computed under another draw than its
        tokens are. None for rows with branches, which look back to the end of their prompt.
        """
        if context.mask.q_trunks is not None:
            return None
        return delta_parallel.first_carry(
            lambda xs: project(xs)[0],
            xs,
            self._taps(),
            _segments(context),
            context.memory,
            context.layout,
        )

    def mix_tile(
        self, operands: Operands, context: LayerContext, carry: Carry
    ) -> tuple[Float[Array, "B t X"], Carry]:
        x, z = operands
        out, carry = delta_parallel.mix_tile(
            x, self._taps(), _segments(context), carry, context.layout
        )
        return self._gated(out, z), carry

    def token_flops(self) -> TokenFlops:
        return token_flops(self)

    def row_flops(self, T: int, pattern: AttentionPattern) -> RowFlops:
        """Products of keys with keys and queries, of scores with values and decays, and of the
        state with keys and queries; the triangular solve of a chunk, which is half a product.
        """
        M, R, k, v = self.delta.M, self.delta.R, self.delta.k, self.delta.v
        within = 2 * CHUNK * (2 * k + R * v + R) + R * CHUNK * (k + v)
        forward = float(T * M * (within + R * 6 * k * v))
        return RowFlops(forward=forward, backward=2 * forward, recomputed=forward, streamed=True)

    @staticmethod
    def abstract_state(
        spec: DecoderSpec, layer: LayerSpec, B: int, S: int, dtype: Any
    ) -> DeltaState:
        assert spec.delta is not None
        M, R, k, v, past = (
            spec.delta.M,
            spec.delta.R,
            spec.delta.k,
            spec.delta.v,
            spec.delta.taps - 1,
        )

        def zeros(*shape: int) -> Any:
            return jax.ShapeDtypeStruct((B, *shape), jnp.float32)

        tails = Channels(zeros(M, past, k), zeros(M, past, k), zeros(M, past, R, v))
        return DeltaState(tails, zeros(M, R, k, v))

    def _borders(self) -> tuple[int, int]:
        """The first channel of keys, and of values."""
        return self.delta.M * self.delta.k, 2 * self.delta.M * self.delta.k

    def _taps(self) -> Channels:
        """The weights of the convolution, by channel as `Projected` has them."""
        M, R, k, v = self.delta.M, self.delta.R, self.delta.k, self.delta.v
        q, keys, values = jnp.split(self.conv[...][:, 0], self._borders())
        return Channels(q.reshape(M, k, -1), keys.reshape(M, k, -1), values.reshape(M, R, v, -1))

    def _gated(
        self, out: Float[Array, "B T M R v"], z: Float[Array, "B T M R v"]
    ) -> Float[Array, "B T X"]:
        gate = jax.nn.silu(z.astype(jnp.float32))
        y = (self.norm(out.astype(z.dtype)) * gate).astype(z.dtype)
        return y.reshape(*y.shape[:2], -1)


def _segments(context: LayerContext) -> Int[Array, "B T"]:
    mask = context.mask
    return jnp.ones_like(mask.q_index) if mask.q_segments is None else mask.q_segments
