"""Softmax attention over query, key and value heads."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lljax.attention import (
    AttentionOptions,
    Trunk,
    attend_forked,
    attend_parallel,
    attend_tile,
    first_halo,
    tile_reach,
)
from lljax.attention.pattern import AttentionPattern
from lljax.models.context import LayerContext
from lljax.models.declare import declare
from lljax.models.flops import RowFlops, TokenFlops, token_flops
from lljax.models.linear import Linear, RMSNorm, named_or_fused, rms_normalize
from lljax.models.mixers.kv_state import KVState, read_part
from lljax.models.mixers.visible_pairs import visible_pairs
from lljax.models.rope import Positions, rotary_dims, rotate
from lljax.models.spec import DecoderSpec, HeadSpec, LayerSpec

Heads = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]


class Attention(nnx.Module):
    """Grouped-query attention with optional norms of queries and keys, sinks and softcap."""

    hf_name: ClassVar[str] = "self_attn"
    refused_modes: ClassVar[Mapping[str, str]] = {}
    ordered: ClassVar[bool] = False
    branches: ClassVar[bool] = True

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str):
        D, N, heads = spec.D, spec.N, spec.heads_of(layer)
        K, H = heads.K, heads.H
        names = named_or_fused(
            f"{hf}.qkv_proj" if spec.fused_qkv else None,
            hf,
            q_proj=N * H,
            k_proj=K * H,
            v_proj=K * H,
        )
        self.q_proj = Linear(
            (D, N * H), axes=("embed", "heads"), bias=spec.qkv_bias, **names["q_proj"]
        )
        self.k_proj = Linear(
            (D, K * H), axes=("embed", "kv_heads"), bias=spec.qkv_bias, **names["k_proj"]
        )
        self.v_proj = (
            None
            if heads.keys_are_values
            else Linear(
                (D, K * H), axes=("embed", "kv_heads"), bias=spec.qkv_bias, **names["v_proj"]
            )
        )
        self.o_proj = Linear(
            (N * H, D), axes=("heads", "embed"), hf=f"{hf}.o_proj", bias=spec.output_bias
        )
        self.qk_norm = spec.qk_norm
        self.q_norm, self.k_norm = _norms(spec, heads, hf)
        self.normalize_eps = spec.norm_eps if spec.qk_unit else None
        self.value_eps = spec.norm_eps if spec.v_unit else None
        self.sinks = (
            declare((N,), axes=("heads",), hf=f"{hf}.sinks", role="bias", init="zeros")
            if spec.sinks
            else None
        )
        self._set_sizes(spec, layer)

    def _set_sizes(self, spec: DecoderSpec, layer: LayerSpec) -> None:
        H = spec.heads_of(layer).H
        self.layer, self.N, self.H, self.value_size = layer, spec.N, H, H
        self.in_pairs = 0  # dimensions of a head whose RoPE pairs neighbors in the checkpoint
        if spec.interleaved and layer.rope is not None:
            self.in_pairs = rotary_dims(spec.ropes[layer.rope], spec.rotary(layer.rope))
        self.scale, self.softcap = spec.scale, spec.attention_softcap

    def heads(self, x: Float[Array, "B T D"], dropout_key: jax.Array | None = None) -> Heads:
        """Queries, keys and values before rotation."""
        q, k = self.q_proj(x, dropout_key), self.k_proj(x, dropout_key)
        v = self._values(x, k, dropout_key)
        whole = self.qk_norm is not None and self.qk_norm.whole
        if whole:
            q, k = self._normalized(q, k)
        q, k = (part.reshape(*x.shape[:2], -1, self.H) for part in (q, k))
        if self.qk_norm is not None and not (whole or self.qk_norm.after_rope):
            q, k = self._normalized(q, k)
        return deinterleave(q, self.in_pairs), deinterleave(k, self.in_pairs), v

    def _values(
        self,
        x: Float[Array, "B T D"],
        k: Float[Array, "B T X"],
        dropout_key: jax.Array | None,
    ) -> Float[Array, "B T K H"]:
        """k: keys without norm and rotation, which may be the values, too."""
        v = k if self.v_proj is None else self.v_proj(x, dropout_key)
        v = v.reshape(*x.shape[:2], -1, self.H)
        if self.value_eps is None:
            return v
        return rms_normalize(v, self.value_eps).astype(v.dtype)

    def _normalized(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.q_norm is not None and self.k_norm is not None, "qk_norm has both"
        return self.q_norm(q), self.k_norm(k)

    def project(
        self, x: Float[Array, "B T D"], positions: Positions, dropout_key: jax.Array | None = None
    ) -> Heads:
        q, k, v = self.heads(x, dropout_key)
        q, k = self._rotated(q, positions), self._rotated(k, positions)
        if self.qk_norm is not None and self.qk_norm.after_rope:
            q, k = self._normalized(q, k)
        if positions.temperature is not None:
            q = (q * positions.temperature[:, :, None, None]).astype(q.dtype)
        return q, k, v

    def _rotated(
        self, x: Float[Array, "B T heads H"], positions: Positions
    ) -> Float[Array, "B T heads H"]:
        if positions.rotation is None:
            return x
        x = rotate(x, positions.rotation)
        if self.normalize_eps is None:
            return x
        return rms_normalize(x, self.normalize_eps).astype(x.dtype)

    def mix(
        self, operands: Heads, context: LayerContext, state: KVState | None = None
    ) -> tuple[Float[Array, "B T X"], KVState | None]:
        q, k, v = operands
        if state is not None:
            assert context.start is not None, "a state comes with the slots of the tokens"
            state = state.write(state.encode(k, v), context.start)
            k, v = state.decode(q.dtype)
        options, layout = self.options(context.pattern), context.layout
        if context.trunk is None:
            groups = context.pattern.groups
            out = attend_parallel(q, k, v, context.mask, options, groups=groups, layout=layout)
        else:
            read = functools.partial(read_part, dtype=q.dtype)
            trunk = Trunk(
                kept=context.trunk.state,
                used=context.trunk.used,
                mask=context.trunk.mask,
                read=read,
                in_place=context.trunk.state.is_float,
            )
            out = attend_forked(q, k, v, context.mask, trunk, options, layout=layout)
        return self._joined(out), state

    def output(
        self, mixed: Float[Array, "B T X"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        return self.o_proj(mixed, dropout_key)

    def first_carry(
        self, project: Callable[[tuple], Heads], xs: tuple, context: LayerContext
    ) -> Any | None:
        """The keys and values before the first tile, see lljax.attention.streamed."""
        mask, layout = context.mask, context.layout
        reach = tile_reach(
            mask.q_index.shape[1], mask, context.pattern.groups, context.memory.tile, layout
        )
        if reach is None:
            return None
        return first_halo(lambda *xs: project(xs)[1:], xs, mask, reach, layout)

    def mix_tile(
        self, operands: Heads, context: LayerContext, carry: Any
    ) -> tuple[Float[Array, "B t X"], Any]:
        out, halo = attend_tile(
            *operands,
            context.mask,
            carry,
            self.options(context.pattern),
            groups=context.pattern.groups,
            layout=context.layout,
        )
        return self._joined(out), halo

    def token_flops(self) -> TokenFlops:
        return token_flops(self)

    def row_flops(self, T: int, pattern: AttentionPattern) -> RowFlops:
        """Scores, and their product with the values. Flash attention computes the scores once more
        in its backward pass.
        """
        pairs = self.N * visible_pairs(pattern, T, self.layer.window, self.layer.chunked)
        forward = 2 * pairs * (self.H + self.value_size)
        return RowFlops(
            forward=forward,
            backward=2 * forward,
            recomputed=forward / 2,
            streamed=any((pattern.group, pattern.window, self.layer.window)),
        )

    @staticmethod
    def abstract_state(spec: DecoderSpec, layer: LayerSpec, B: int, S: int, dtype: Any) -> KVState:
        heads = spec.heads_of(layer)
        return KVState.abstract((B, heads.K, S, heads.H), dtype)

    def options(self, pattern: AttentionPattern) -> AttentionOptions:
        """Arguments of attention besides queries, keys, values and their mask."""
        # float32, like the sums that they enter
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        return AttentionOptions(
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            implementation=pattern.implementation,
        )

    def _joined(self, out: Float[Array, "B T N H"]) -> Float[Array, "B T X"]:
        return out.reshape(*out.shape[:2], -1)


def _norms(spec: DecoderSpec, heads: HeadSpec, hf: str) -> tuple[RMSNorm | None, RMSNorm | None]:
    """The norms of queries and keys. A norm of the whole projection is cut like its outputs; the
    compiler sums the squares over devices.
    """
    if spec.qk_norm is None:
        return None, None
    norm = functools.partial(RMSNorm, eps=spec.norm_eps, plus_one=spec.norm_plus_one)
    q_name, k_name = (f"{hf}.{name}" for name in spec.qk_norm.names)
    if not spec.qk_norm.whole:
        return norm(heads.H, hf=q_name), norm(heads.H, hf=k_name)
    return (
        norm(spec.N * heads.H, hf=q_name, axis="heads"),
        norm(heads.K * heads.H, hf=k_name, axis="kv_heads"),
    )


def deinterleave(x: Float[Array, "... H"], size: int) -> Float[Array, "... H"]:
    """The first `size` dimensions with the even ones first, then the odd ones: from a checkpoint
    whose RoPE rotates neighbors (2i, 2i + 1) to the order here, in which i pairs with i + size / 2.
    Scores stay the same if queries and keys are reordered alike.
    """
    if not size:
        return x
    return jnp.concatenate([x[..., :size:2], x[..., 1:size:2], x[..., size:]], axis=-1)
