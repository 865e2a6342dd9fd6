"""The layout of a stage's rows on the mesh: context-parallel mode, order of tokens, and the rows
that each process reads.
"""

import functools
import math
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh

from lljax.attention.attend import check_platform
from lljax.attention.context_parallel import choose
from lljax.attention.pattern import AttentionPattern
from lljax.data.batch import NEXT_TOKEN, Batch, Field, dtypes
from lljax.errors import ConfigError
from lljax.models.mixers import needs_order, refused_modes, refuses_branches
from lljax.models.spec import DecoderSpec
from lljax.parallel.rounding import round_up
from lljax.parallel.sharding import Layout, batch_sharding, row_parts, zigzag


def layout_of(
    mesh: Mesh,
    context_parallel: str,
    pattern: AttentionPattern,
    length: int,
    spec: DecoderSpec,
    *,
    bytes_per: int = 4,
    memory: float = math.inf,
    branches: bool = False,
) -> tuple[Layout | None, str]:
    """The layout of rows of `length` tokens under `pattern`, None on the one device of this
    process; and the reason for its mode.

    context_parallel: as `mesh.context_parallel`.
    bytes_per: bytes per value of the keys.
    memory: bytes per device. Gathered keys and values may take a sixteenth of it: with their
      gradients and copies in the order of a kernel they exist about five times.
    branches: rows hold answers that share a prompt.

    Raises:
      ConfigError: the rows, heads or experts do not spread over the mesh, the mode cannot
        serve the pattern, the implementation of its attention does not run on these devices, or a
        mixer of the model cannot serve branches.
    """
    if branches and (refusal := refuses_branches(spec.layers, mesh.shape["sequence"])):
        raise ConfigError(refusal)
    check_platform(pattern.implementation, mesh.devices.flat[0].platform)
    if mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend():
        return None, "one device"
    _check_spread(mesh, pattern, length, spec)
    windows = [
        min((w for w in (layer.window, pattern.window or None) if w), default=None)
        for layer in spec.layers
    ]
    mode, balanced, reason = choose(
        context_parallel,
        T=length,
        size=mesh.shape["sequence"],
        tensor=mesh.shape["tensor"],
        N=spec.N,
        K=spec.kv_parts,
        H=max(spec.heads_of(layer).H for layer in spec.layers),
        key_size=spec.key_size,
        groups=pattern.groups,
        windows=windows,
        bytes_per=bytes_per,
        gather_bytes=memory / 16,
        refused=refused_modes(spec.layers),
        ordered=needs_order(spec.layers),
        branches=branches,
    )
    return Layout(mesh, mode, balanced), reason


def has_branches(fields: tuple[Field, ...]) -> bool:
    """Whether rows of these fields hold answers that share a prompt."""
    return any(field.name == "branches" for field in fields)


def _check_spread(mesh: Mesh, pattern: AttentionPattern, length: int, spec: DecoderSpec) -> None:
    """Refuses heads, experts or tokens that do not divide evenly over the mesh."""
    sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    if spec.N % tensor or spec.kv_parts % tensor:
        numbers = sorted({spec.heads_of(layer).K for layer in spec.layers})
        raise ConfigError(
            f"mesh.tensor={tensor} does not divide the {spec.N} query and "
            f"{' and '.join(map(str, numbers))} key/value heads of the model: use "
            f"{math.gcd(spec.N, spec.kv_parts, tensor)}"
        )
    if spec.delta and spec.delta.M % tensor:
        raise ConfigError(
            f"mesh.tensor={tensor} does not divide the {spec.delta.M} key heads of the model's "
            f"gated delta networks: use {math.gcd(spec.delta.M, spec.N, spec.kv_parts, tensor)}"
        )
    if spec.moe and spec.moe.E % mesh.shape["expert"]:
        raise ConfigError(
            f"mesh.expert={mesh.shape['expert']} does not divide the {spec.moe.E} experts of a "
            f"layer: use {math.gcd(spec.moe.E, mesh.shape['expert'])}"
        )
    if pattern.kind == "shifted" and tensor % 2 and tensor > 1:
        raise ConfigError(
            f"mesh.tensor={tensor} and a shifted stage: the two halves of the heads do not "
            "separate; use an even number"
        )
    if length % (sequence * tensor):
        multiple = math.lcm(sequence * tensor, 2)
        raise ConfigError(
            f"context.schedule: rows of {length} tokens do not spread over "
            f"mesh.sequence={sequence} x mesh.tensor={tensor}: use a multiple such as "
            f"{round_up(length, multiple)}"
        )


@functools.lru_cache  # called at every step
def row_share(mesh: Mesh) -> tuple[int, int]:
    """(share, shares): the devices of this process hold part `share` of `shares` equal parts of the
    rows. Processes that hold different tokens of the same rows have the same share.
    """
    rows = row_parts(mesh)
    process = np.vectorize(lambda device: device.process_index)(mesh.devices.reshape(rows, -1))
    held = np.flatnonzero((process == jax.process_index()).any(axis=1))
    return int(held[0]) // len(held), rows // len(held)


def rows_of_share(rows: int, accumulate: int, mesh: Mesh) -> np.ndarray:
    """The numbers of the rows that this process holds, of `accumulate` times `rows`, in the order
    that `place` takes them.
    """
    share, shares = row_share(mesh)
    return np.arange(accumulate * rows).reshape(accumulate, shares, -1)[:, share].reshape(-1)


def check_rows(rows: int, mesh: Mesh) -> None:
    """Refuses rows that do not spread evenly over the mesh.

    Raises:
      ConfigError: with the next multiple.
    """
    devices = row_parts(mesh)
    if rows % devices:
        raise ConfigError(
            f"training.rows={rows} (in YAML batch_size) do not spread evenly over the {devices} "
            "devices of mesh.data, mesh.fsdp and mesh.expert: use a multiple such as "
            f"{round_up(rows, devices)}, or spread the tokens of each row over all devices: "
            "mesh.fsdp=1 and mesh.sequence=-1 (in YAML sequence_parallel: true)"
        )


def abstract_batch(
    accumulate: int, rows: int, length: int, mesh: Mesh, fields: tuple[Field, ...] = NEXT_TOKEN
) -> Batch:
    """The batches [A, B, T] that `place` makes, as `jax.ShapeDtypeStruct`s."""
    shape, sharding = (accumulate, rows, length), batch_sharding(mesh, 3)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes(fields).items()
    }
    return cast(Batch, arrays)


def place(
    batch: dict[str, np.ndarray], accumulate: int, mesh: Mesh, layout: Layout | None
) -> Batch:
    """This process' rows, arrays [A * B_local, T], as its part of the global batch [A, B, T]; with
    `index`, the position of every token in its row.
    """
    tokens = batch["tokens"]
    share, shares = row_share(mesh)
    index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    sharding = batch_sharding(mesh, 3)

    def place_array(x: np.ndarray):
        x = x.reshape(accumulate, -1, x.shape[-1])
        if layout is not None and layout.zigzag:
            x = zigzag(x, mesh.shape["sequence"])
        first, shape = share * x.shape[1], (accumulate, shares * x.shape[1], x.shape[2])

        def local(at: tuple[slice, ...] | None) -> np.ndarray:
            assert at is not None, "an array has an index in every device"
            rows = slice((at[1].start or 0) - first, (at[1].stop or shape[1]) - first)
            return x[at[0], rows, at[2]]

        return jax.make_array_from_callback(shape, sharding, local)

    return cast(Batch, {name: place_array(x) for name, x in (batch | {"index": index}).items()})
