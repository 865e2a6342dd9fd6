"""Sine and cosine of positions, and the rotation of queries and keys by them.

Everything here is float32: at bfloat16, position 257 is already another position.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lljax.models.rope.kinds import Frequencies

Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # sine and cosine


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A factor of queries that grows with the position, and keeps attention sharp over more keys:
    1 + weight log(1 + floor((position + first) / floor)).

    After Nakanishi 2025, arXiv 2501.19399; transformers' Llama 4 and Ministral 3.
    """

    weight: float
    floor: float
    first: int = 0
    rotated: bool = True  # of layers with RoPE, or else of layers without it


class Positions(NamedTuple):
    """The positions of a batch, as one layer uses them: to rotate queries and keys, and to scale
    queries.
    """

    rotation: Rotation | None = None  # see `rotation`
    temperature: Float[Array, "B T"] | None = None  # see `temperature`


def rotation(positions: Int[Array, "B T"], frequencies: Frequencies) -> Rotation:
    """Sine and cosine, float32 [B, T, rotary dimensions / 2], of positions."""
    inverse = jnp.expand_dims(frequencies.inverse, -2)
    angles = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.sin(angles) * frequencies.scale, jnp.cos(angles) * frequencies.scale


def rotate(x: Float[Array, "B T N H"], rotation: Rotation | None) -> Float[Array, "B T N H"]:
    """Rotates the first dimensions of every head of x; `None` returns x.

    The first half of the rotary dimensions pairs with the second, as in transformers
    (`rotate_half`). Computed in float32, returned in the dtype of x.
    """
    if rotation is None:
        return x
    sin, cos = (part[:, :, None] for part in rotation)
    rotary = x[..., : 2 * sin.shape[-1]]
    first, second = jnp.split(rotary.astype(jnp.float32), 2, axis=-1)
    rest = [] if rotary.shape == x.shape else [x[..., rotary.shape[-1] :].astype(jnp.float32)]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, *rest], axis=-1
    ).astype(x.dtype)


def temperature(positions: Int[Array, "B T"], spec: Temperature) -> Float[Array, "B T"]:
    """The factor of queries, see `Temperature`."""
    steps = jnp.floor((positions.astype(jnp.float32) + spec.first) / spec.floor)
    return 1 + spec.weight * jnp.log1p(steps)
