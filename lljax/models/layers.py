"""What decoder layers are made of. Each module declares its parameters once; see lljax.models.declare.

Formulas follow transformers `models/llama/modeling_llama.py`, `models/qwen3/modeling_qwen3.py` and
`models/gemma2/modeling_gemma2.py`.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.attention import Mask, attend_parallel
from lljax.models.cache import kept, read, write
from lljax.models.declare import declare
from lljax.models.probe import times
from lljax.models.rope import Place, rotate
from lljax.models.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """What a stage of the schedule adds to the model's own mask: full | shifted (groups) | window (with anchors)."""

    kind: str = "full"
    group: int = 0                           # tokens, for shifted
    window: int = 0                          # tokens, for window
    anchors: int = 0                         # first tokens of each document, for window
    markers: tuple[int, ...] = ()            # token ids that are anchors wherever they stand, for window

    @property
    def groups(self) -> int | None:
        """Tokens of a group, None where the row is not cut into groups."""
        return self.group if self.kind == "shifted" else None


class RMSNorm(nnx.Module):
    """x / rms(x) * weight; or times 1 + weight (`plus_one`), which Gemma takes in float32 too."""

    def __init__(self, size: int, eps: float, *, hf: str, axis: str | None = None, plus_one: bool = False):
        self.weight = declare((size,), axes=(axis,), hf=f"{hf}.weight", role="norm", init="zeros" if plus_one else "ones")
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis, in float32: the mean of squares of a bfloat16 row loses its low bits."""
        wide = unit(x, self.eps)
        if self.plus_one:
            return (wide * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return self.weight[...].astype(x.dtype) * wide.astype(x.dtype)


def unit(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class Linear(nnx.Module):
    """x @ kernel (+ low-rank update) (+ bias); kernel is [in, out]. `lora` is filled by lljax.models.lora.attach; `dot`, the
    product with the kernel, may be lljax.models.fp8.fp8_dot.

    part: its outputs are some of those of the HF layer `hf`, see `declare.Weight`.
    """

    def __init__(self, shape: tuple[int, int], *, axes: tuple, hf: str, bias: bool = False,
                 part: tuple[int, int, int] | None = None):
        more = {} if part is None else {"part": part}
        self.kernel = declare(shape, axes=axes, hf=f"{hf}.weight", role="kernel", transpose=True, **more)
        self.bias = declare(shape[1:], axes=axes[1:], hf=f"{hf}.bias", role="bias", init="zeros") if bias else None
        self.lora = nnx.data(None)
        self.dot = jnp.matmul

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        kernel = self.kernel.get_value()
        y = times(x, kernel, self.dot)
        if self.lora is not None:
            y = self.lora(x, y, kernel.astype(x.dtype), dropout_key)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        return y


class Attention(nnx.Module):
    def __init__(self, spec: DecoderSpec, hf: str):
        D, N, K, H = spec.D, spec.N, spec.K, spec.H
        names = named_or_fused(f"{hf}.qkv_proj" if spec.fused else None, hf, q_proj=N * H, k_proj=K * H, v_proj=K * H)
        self.q_proj = Linear((D, N * H), axes=("embed", "heads"), bias=spec.qkv_bias, **names["q_proj"])
        self.k_proj = Linear((D, K * H), axes=("embed", "kv_heads"), bias=spec.qkv_bias, **names["k_proj"])
        self.v_proj = Linear((D, K * H), axes=("embed", "kv_heads"), bias=spec.qkv_bias, **names["v_proj"])
        self.o_proj = Linear((N * H, D), axes=("heads", "embed"), hf=f"{hf}.o_proj", bias=spec.output_bias)
        norm = functools.partial(RMSNorm, H, spec.norm_eps, plus_one=spec.norm_plus_one)
        self.q_norm = norm(hf=f"{hf}.q_norm") if spec.qk_norm else None
        self.k_norm = norm(hf=f"{hf}.k_norm") if spec.qk_norm else None
        self.unit_eps, self.interleaved = spec.norm_eps if spec.qk_unit else None, spec.interleaved
        self.sinks = declare((N,), axes=("heads",), hf=f"{hf}.sinks", role="bias", init="zeros") if spec.sinks else None
        self.H, self.scale, self.softcap = H, spec.scale, spec.attention_softcap

    def heads(self, x, dropout_key=None):
        """Queries [B, T, N, H], keys and values [B, T, K, H] of x [B, T, D], before rotation."""
        q, k, v = (projection(x, dropout_key).reshape(*x.shape[:2], -1, self.H)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return (halves(q), halves(k), v) if self.interleaved else (q, k, v)

    def placed(self, x, place: Place, *, query: bool = False):
        """Keys [B, T, K, H] of `heads`, or queries, with what their places do to them."""
        if query and place.temperature is not None:
            x = (x * place.temperature[:, :, None, None]).astype(x.dtype)
        if place.rotation is None:
            return x
        x = rotate(x, place.rotation)
        return x if self.unit_eps is None else unit(x, self.unit_eps).astype(x.dtype)

    @property
    def how(self) -> dict:
        """What attention takes beside queries, keys, values and their mask."""
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)      # like the sums that they enter
        return {"scale": self.scale, "softcap": self.softcap, "sinks": sinks}

    def mix(self, q, k, v, mask: Mask, pattern: AttentionPattern, layout=None, cache=None, start=0):
        """Attention [B, T, N * H] of `heads`, queries and keys `placed`; with a `cache` (k, v [B, K, S, H]) over its entries
        too, the new ones from slot `start` on. Also returns what the cache keeps of them. `o_proj` comes after it."""
        if cache is not None:
            new = tuple(kept(each, held) for each, held in zip((k, v), cache))
            k, v = (read(write(held, each, start), q.dtype) for held, each in zip(cache, new))
            cache = new
        out = attend_parallel(q, k, v, mask, group=pattern.groups, layout=layout, **self.how)
        return self.join(out), cache

    def join(self, out):
        """What `o_proj` takes, [B, T, N * H], of the heads [B, T, N, H] that attention gives."""
        return out.reshape(*out.shape[:2], -1)


def halves(x):
    """[..., dimensions] in the order in which i pairs with the one half of them further; a checkpoint whose RoPE pairs
    neighbours has them in another. Scores do not change where queries and keys are ordered alike."""
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}        # jax's gelu is the approximation by tanh


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, spec: DecoderSpec, hf: str, *, F: int):
        D, bias = spec.D, spec.mlp_bias
        self.activation = spec.activation
        names = named_or_fused(f"{hf}.gate_up_proj" if spec.fused else None, hf, gate_proj=F, up_proj=F)
        self.gate_proj = Linear((D, F), axes=("embed", "mlp"), bias=bias, **names["gate_proj"])
        self.up_proj = Linear((D, F), axes=("embed", "mlp"), bias=bias, **names["up_proj"])
        self.down_proj = Linear((F, D), axes=("mlp", "embed"), hf=f"{hf}.down_proj", bias=bias)

    def __call__(self, x: jax.Array, dropout_key=None) -> jax.Array:
        hidden = ACTIVATIONS[self.activation](self.gate_proj(x, dropout_key)) * self.up_proj(x, dropout_key)
        return self.down_proj(hidden, dropout_key)


def named_or_fused(fused: str | None, hf: str, **sizes: int) -> dict:
    """How each of several projections of `sizes` outputs is called in HF: by its own name, or as rows of `fused`."""
    if fused is None:
        return {name: {"hf": f"{hf}.{name}"} for name in sizes}
    firsts = itertools.accumulate(sizes.values(), initial=0)
    return {name: {"hf": fused, "part": (first, 1, sum(sizes.values()))} for name, first in zip(sizes, firsts)}
