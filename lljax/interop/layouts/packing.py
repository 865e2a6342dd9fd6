"""Codes of integers, packed in words on disk and in `Quantized` values in memory."""

from typing import Any, cast

import numpy as np

from lljax.models.quantize import Form, Quantized, pack
from lljax.parallel.rounding import cdiv


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes of int32 words along the last axis, low bits first."""
    codes = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack`, C-contiguous; the last word is filled up with zeros."""
    per_word = 32 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    if bits == 4:
        padded = padded[..., ::2] | padded[..., 1::2] << 4
    return np.ascontiguousarray(padded, np.uint8).view("<i4").astype(np.int32, copy=False)


def quantized_of_groups(
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    form: Form,
    *,
    outer: np.ndarray | None = None,
    offset: np.float32 | None = None,
) -> Quantized:
    """Codes [in, out] with scales and zeros [groups, out] as a `Quantized` of numpy arrays.

    A single group is repeated over all blocks. outer, offset: as in `Quantized`, for
    quantized scales.
    """
    rows, out = codes.shape
    blocks = cdiv(rows, form.block)
    padded = np.pad(codes, ((0, blocks * form.block - rows), (0, 0)))
    codes = padded.reshape(blocks, form.block, out)

    def broadcast(x: np.ndarray, dtype: type) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(x, (blocks, out)), dtype)

    arrays: dict[str, Any] = dict(  # of numpy: they go to a device later
        codes=np.ascontiguousarray(pack(cast(Any, codes)) if form.bits == 4 else codes),
        scale=broadcast(scale, np.float32 if outer is None else np.uint8),
        zero=None if zero is None else broadcast(zero, np.int16),
        outer=outer,
        offset=offset,
    )
    return Quantized(
        **arrays,
        form=form,
        rows=rows,
        dtype=np.dtype(np.float32),
    )
