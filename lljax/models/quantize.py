"""Weights in four or eight bits: codes, and a scale for each block of inputs of an output.

Formats: nf4, the quantiles of a normal distribution, and nf4-double, whose scales are in eight bits
in turn (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3; the tables and blocks are
bitsandbytes'); int4 and int8, (code - zero) * scale; fp8, e4m3 * scale.

A `Weight` holds a quantized kernel in place of the dense one. It becomes dense a layer at a time,
inside the scan over layers (`dequantized`). `model.quantize` selects the format of frozen kernels;
lljax.training.q_galore trains kernels in int8.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from lljax.parallel.rounding import cdiv

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)  # arXiv 2305.14314, appendix E
OUTER = 256  # scales that share an outer scale, in nf4-double


def _dynamic() -> np.ndarray:
    """The 256 values of bitsandbytes' dynamic map: seven decades, each with twice as many values as
    the decade below.

    Dettmers et al. 2021, arXiv 2110.02861, section 2.1; bitsandbytes `create_dynamic_map`, whose
    float32 differs in the last bit from one CPU to another.
    """
    edges = [np.linspace(0.1, 1, 2**decade + 1) for decade in range(7)]
    positive = np.concatenate(
        [10.0 ** (decade - 6) * (e[:-1] + e[1:]) / 2 for decade, e in enumerate(edges)]
    )
    return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]])).astype(np.float32)


DYNAMIC = _dynamic()


@dataclasses.dataclass(frozen=True)
class Form:
    """format: see above. block: inputs that share a scale. zero: whether every block has a zero
    point (int4, int8).
    """

    format: str
    block: int
    zero: bool = False

    @property
    def bits(self) -> int:
        return 8 if self.format in ("int8", "fp8") else 4


FORMS = {
    form.format: form
    for form in (
        Form("nf4", 64),
        Form("nf4-double", 64),
        Form("int4", 64),
        Form("int8", 64),
        Form("fp8", 128),
    )
}


def integer_form(bits: int, rows: int) -> Form:
    """The form of a trained matrix with `rows` inputs: Zhang et al. 2024, arXiv 2407.08296, in
    blocks of 256.
    """
    return Form(f"int{bits}", min(256, rows + rows % 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel [..., in, out] with any leading axes, its inputs padded to whole blocks.

    codes: [..., blocks, block, out] float8_e4m3fn, or uint8; in four bits [..., blocks, block / 2,
      out], the first half of a block in the low bits and the second half in the high bits.
    scale: float32 [..., blocks, out]; or uint8 codes, which `outer` float32 [..., ceil(out * blocks
      / 256)] scales in the order [out, blocks] before `offset` float32 [...] is added.
    zero: int16 [..., blocks, out] or None.
    rows: inputs (`in`). dtype: the dtype of the dense kernel.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    outer: jax.Array | None
    offset: jax.Array | None
    form: Form = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-3], self.rows, self.codes.shape[-1])

    def dense(self, dtype: Any) -> jax.Array:
        return dequantize(self, dtype)

    def each(self, f: Callable, axes: tuple) -> "Quantized":
        """Replaces each array by f(array, its logical axes), given the axes of the dense kernel
        (lljax.parallel.sharding.map_arrays).
        """
        *lead, inputs, outputs = axes
        axes_of = {
            "codes": (*lead, inputs, None, outputs),
            "scale": (*lead, inputs, outputs),
            "zero": (*lead, inputs, outputs),
            "outer": (*lead, None),
            "offset": tuple(lead),
        }
        return dataclasses.replace(
            self,
            **{
                name: None if getattr(self, name) is None else f(getattr(self, name), axes)
                for name, axes in axes_of.items()
            },
        )


def quantize(
    kernel: Float[Array, "... I O"], form: Form, dtype: Any, key: jax.Array | None = None
) -> Quantized:
    """A dense kernel in `form`; `dtype` is its dtype when it is dense again.

    Rounds to the nearest code; int4 and int8 with a key stochastically, so that the mean is the
    kernel.
    """
    *lead, rows, out = kernel.shape
    blocks = cdiv(rows, form.block)
    x = jnp.pad(
        kernel.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, blocks * form.block - rows), (0, 0)]
    )
    x = x.reshape(*lead, blocks, form.block, out)
    largest = jnp.max(jnp.abs(x), axis=-2)
    top = {"int4": 7.0, "int8": 127.0, "fp8": 448.0}.get(form.format, 1.0)
    scale = largest / top
    x = x / jnp.where(scale == 0, 1.0, scale)[..., None, :]
    zero = outer = offset = None
    if form.format == "fp8":
        codes = x.astype(jnp.float8_e4m3fn)
    elif form.format in ("int4", "int8"):
        middle = 1 << form.bits - 1
        steps = (
            jnp.round(x)
            if key is None
            else jnp.clip(jnp.floor(x + jax.random.uniform(key, x.shape)), -top, top)
        )
        codes = (steps + middle).astype(jnp.uint8)
        zero = jnp.full(scale.shape, middle, jnp.int16) if form.zero else None
    else:
        codes: Any = sum((x > midpoint).astype(jnp.uint8) for midpoint in _midpoints(NF4))
    if form.bits == 4:
        codes = pack(codes)
    if form.format == "nf4-double":
        scale, outer, offset = _quantize_scales(scale)
    return Quantized(
        codes=codes,
        scale=scale,
        zero=zero,
        outer=outer,
        offset=offset,
        form=form,
        rows=rows,
        dtype=jnp.dtype(dtype),
    )


def dequantize(value: Quantized, dtype: Any) -> Float[Array, "... I O"]:
    """The dense kernel; products are float32, as in bitsandbytes, and rounded once."""
    form, codes = value.form, value.codes
    if form.bits == 4:
        codes = unpack(codes)
    if form.format == "fp8":
        x = codes.astype(jnp.float32)
    elif form.format in ("int4", "int8"):
        zero = jnp.int16(1 << form.bits - 1) if value.zero is None else value.zero[..., None, :]
        x = codes.astype(jnp.float32) - zero.astype(jnp.float32)
    else:
        x = _lookup(NF4, codes)
    x = (x * _scales(value)[..., None, :]).astype(dtype)
    *lead, blocks, block, out = x.shape
    return x.reshape(*lead, blocks * block, out)[..., : value.rows, :]


def dense(value: Any, dtype: Any = None) -> Any:
    """The value of a Variable to compute with: a quantized value in `dtype` (None: the dtype of its
    dense kernel), an array as it is.
    """
    return value.dense(dtype or value.dtype) if hasattr(value, "dense") else value


def dequantized(variables: Any, dtype: Any) -> Any:
    """A tree of Variables with its quantized values dense."""
    return jax.tree.map(
        lambda variable: variable.replace(dense(variable.get_value(), dtype)),
        variables,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def abstract_quantized(shape: tuple[int, ...], form: Form, dtype: Any) -> Quantized:
    """A quantized kernel of this shape, of `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(
        functools.partial(quantize, form=form, dtype=dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )


def pack(codes: UInt8[Array, "... block out"]) -> UInt8[Array, "... half out"]:
    """Codes below 16, two to a byte."""
    half = codes.shape[-2] // 2
    return codes[..., :half, :] | codes[..., half:, :] << 4


def unpack(codes: UInt8[Array, "... half out"]) -> UInt8[Array, "... block out"]:
    """The inverse of `pack`; one elementwise expression, which compilers fuse."""
    *lead, half, out = codes.shape
    shifts = jnp.array([0, 4], jnp.uint8)[:, None, None]
    return (codes[..., None, :, :] >> shifts & 15).reshape(*lead, 2 * half, out)


def _quantize_scales(scale: Float[Array, "... blocks out"]) -> tuple[jax.Array, ...]:
    """(codes, outer, offset) of scales [..., blocks, out], see `Quantized`; bitsandbytes
    `quantize_4bit`.
    """
    *lead, blocks, out = scale.shape
    flat = jnp.swapaxes(scale, -1, -2).reshape(*lead, blocks * out)
    offset = jnp.mean(flat, axis=-1)
    flat = jnp.pad(flat - offset[..., None], [(0, 0)] * len(lead) + [(0, -flat.shape[-1] % OUTER)])
    flat = flat.reshape(*lead, -1, OUTER)
    outer = jnp.max(jnp.abs(flat), axis=-1)
    codes = jnp.searchsorted(
        _midpoints(DYNAMIC), flat / jnp.where(outer == 0, 1.0, outer)[..., None]
    ).astype(jnp.uint8)
    codes = codes.reshape(*lead, -1)[..., : blocks * out].reshape(*lead, out, blocks)
    return jnp.swapaxes(codes, -1, -2), outer, offset


def _scales(value: Quantized) -> Float[Array, "... blocks out"]:
    """float32."""
    if value.outer is None or value.offset is None:
        return value.scale
    *lead, blocks, out = value.scale.shape
    outer = jnp.repeat(value.outer, OUTER, axis=-1)[..., : blocks * out].reshape(*lead, out, blocks)
    return _dynamic_value(value.scale) * jnp.swapaxes(outer, -1, -2) + value.offset[..., None, None]


def _dynamic_value(codes: jax.Array) -> jax.Array:
    """DYNAMIC[codes] by arithmetic, exact to the last bit or two: a table of 256 entries is too
    large for the selects of `_lookup`, and a TPU gathers element by element.
    """
    signed = codes.astype(jnp.int32) - 127
    place = jnp.abs(signed)
    decade: Any = sum((place >= 2**k).astype(jnp.int32) for k in range(1, 8))
    steps = (1 << decade).astype(jnp.float32)
    x = (0.1 + 0.9 * (place + 0.5 - steps) / steps) * _lookup(
        np.float32(10.0) ** np.arange(-6, 2, dtype=np.float32), decade
    )
    return jnp.where(place == 128, 1.0, jnp.where(signed == 0, 0.0, jnp.where(signed < 0, -x, x)))


def _lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """table[codes]; on a TPU, which gathers element by element, by selecting on a bit of the code
    at a time.
    """

    def select(codes, table=table):
        if len(table) == 1:
            return table[0]
        half = len(table) // 2
        return jnp.where(
            codes & half != 0, select(codes, table[half:]), select(codes, table[:half])
        )

    def gather(codes):
        return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")

    return jax.lax.platform_dependent(codes, tpu=select, default=gather)


def _midpoints(table: np.ndarray) -> np.ndarray:
    return (table[:-1] + table[1:]) / np.float32(2)
