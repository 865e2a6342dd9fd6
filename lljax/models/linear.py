"""Norm, linear layer and MLP of a decoder layer. Each module declares its parameters once, see
lljax.models.declare.

Formulas follow transformers `models/llama/modeling_llama.py`, `models/qwen3/modeling_qwen3.py` and
`models/gemma2/modeling_gemma2.py`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lljax.models.declare import declare
from lljax.models.flops import TokenFlops, token_flops, weight_flops
from lljax.models.probe import multiply
from lljax.models.spec import DecoderSpec


class RMSNorm(nnx.Module):
    """x / rms(x) * weight; or times 1 + weight (`plus_one`), which Gemma takes in float32 too."""

    def __init__(
        self, size: int, eps: float, *, hf: str, axis: str | None = None, plus_one: bool = False
    ):
        self.weight = declare(
            (size,),
            axes=(axis,),
            hf=f"{hf}.weight",
            role="norm",
            init="zeros" if plus_one else "ones",
        )
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """float32, because the mean square of a bfloat16 row loses its low bits."""
        wide, weight = rms_normalize(x, self.eps), over_tokens(self.weight[...], x)
        if self.plus_one:
            return (wide * (1 + weight.astype(jnp.float32))).astype(x.dtype)
        return weight.astype(x.dtype) * wide.astype(x.dtype)


def over_tokens(vector: Float[Array, "*B D"], x: Float[Array, "B ... D"]) -> jax.Array:
    """The vector, or one for each row (lljax.models.by_row), in a shape to multiply x with."""
    return vector if vector.ndim == 1 else vector.reshape(len(x), *[1] * (x.ndim - 2), -1)


def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class Linear(nnx.Module):
    """x @ kernel (+ low-rank update) (+ bias); kernel is [in, out].

    lora: filled by lljax.models.lora.attach. dot: the product with the kernel, which may be
    lljax.models.fp8.fp8_dot. part: which outputs of the HF layer `hf` these are, see
    `declare.Weight`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        axes: tuple[str | None, str | None],
        hf: str,
        bias: bool = False,
        part: tuple[int, int, int] | None = None,
    ):
        more: dict[str, Any] = {} if part is None else {"part": part}
        self.kernel = declare(
            shape, axes=axes, hf=f"{hf}.weight", role="kernel", transpose=True, **more
        )
        self.bias = (
            declare(shape[1:], axes=axes[1:], hf=f"{hf}.bias", role="bias", init="zeros")
            if bias
            else None
        )
        self.lora: Any = nnx.data(None)
        self.dot: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul

    def __call__(
        self, x: Float[Array, "... I"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "... O"]:
        kernel = self.kernel.get_value()
        y = multiply(x, kernel, self.dot)
        if self.lora is not None:
            y = self.lora(x, y, kernel.astype(x.dtype), dropout_key)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        return y


# jax's gelu is the tanh approximation
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, spec: DecoderSpec, hf: str, *, F: int):
        D, bias = spec.D, spec.mlp_bias
        self.activation = spec.activation
        names = named_or_fused(
            f"{hf}.{spec.mlp.gate_up}" if spec.mlp.gate_up else None, hf, gate_proj=F, up_proj=F
        )
        self.gate_proj = Linear((D, F), axes=("embed", "mlp"), bias=bias, **names["gate_proj"])
        self.up_proj = Linear((D, F), axes=("embed", "mlp"), bias=bias, **names["up_proj"])
        self.down_proj = Linear(
            (F, D), axes=("mlp", "embed"), hf=f"{hf}.{spec.mlp.down}", bias=bias
        )

    def __call__(
        self, x: Float[Array, "... D"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "... D"]:
        hidden = ACTIVATIONS[self.activation](self.gate_proj(x, dropout_key)) * self.up_proj(
            x, dropout_key
        )
        return self.down_proj(hidden, dropout_key)

    def token_flops(self) -> TokenFlops:
        """No gradient reads the result of the last product."""
        unread = weight_flops(self.down_proj.kernel).forward
        return token_flops(self) + TokenFlops(unread=unread)


def named_or_fused(fused: str | None, hf: str, **sizes: int) -> dict[str, dict]:
    """The HF names of several projections, as arguments of `Linear`: each its own name, or a range
    of the outputs of `fused`. sizes: outputs of each projection.
    """
    if fused is None:
        return {name: {"hf": f"{hf}.{name}"} for name in sizes}
    firsts = itertools.accumulate(list(sizes.values())[:-1], initial=0)
    return {
        name: {"hf": fused, "part": (first, 1, sum(sizes.values()))}
        for name, first in zip(sizes, firsts, strict=True)
    }
