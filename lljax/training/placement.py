"""How the rows of a stage lie on the mesh: which context-parallel mode, in which order, and which
process reads them.
"""

import functools
import math
from typing import cast

import jax
import numpy as np

from lljax.attention.context_parallel import choose
from lljax.attention.pattern import AttentionPattern
from lljax.data.batch import NEXT_TOKEN, Batch, Field, dtypes
from lljax.errors import ConfigError
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import Layout, batch_sharding, row_parts, zigzag


def layout_of(
    mesh,
    wanted: str,
    pattern: AttentionPattern,
    length: int,
    spec: DecoderSpec,
    *,
    bytes_per: int = 4,
    memory: float = math.inf,
) -> tuple[Layout | None, str]:
    """The layout of rows of `length` tokens under `pattern`, None on the one device of this
    process; and the reason for its mode.

    wanted: `mesh.context_parallel`. memory: bytes of a device; gathered keys and values may take a
      sixteenth of it: with their gradients and copies in the order of a kernel they exist some five
      times.

    Raises:
      ConfigError: the rows, heads or experts do not spread over the mesh, or the wanted mode cannot
        serve the pattern.
    """
    if mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend():
        return None, "one device"
    sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    if spec.N % tensor or spec.K % tensor:
        raise ConfigError(
            f"mesh.tensor={tensor} does not divide the {spec.N} query and {spec.K} key/value heads of the "
            f"model: use {math.gcd(spec.N, spec.K, tensor)}"
        )
    if spec.moe and spec.moe.E % mesh.shape["expert"]:
        raise ConfigError(
            f"mesh.expert={mesh.shape['expert']} does not divide the {spec.moe.E} experts of a layer: use "
            f"{math.gcd(spec.moe.E, mesh.shape['expert'])}"
        )
    if pattern.kind == "shifted" and tensor % 2 and tensor > 1:
        raise ConfigError(
            f"mesh.tensor={tensor} and a shifted stage: the two halves of the heads do not part; use an even one"
        )
    if length % (sequence * tensor):
        multiple = math.lcm(sequence * tensor, 2)
        raise ConfigError(
            f"context.schedule: rows of {length} tokens do not spread over mesh.sequence={sequence} x "
            f"mesh.tensor={tensor}: use a multiple such as {-(-length // multiple) * multiple}"
        )
    windows = [
        min((w for w in (layer.window, pattern.window or None) if w), default=None)
        for layer in spec.layers
    ]
    mode, balanced, reason = choose(
        wanted,
        T=length,
        size=sequence,
        tensor=tensor,
        N=spec.N,
        K=spec.K,
        H=spec.H,
        group=pattern.group or None,
        windows=windows,
        bytes_per=bytes_per,
        room=memory / 16,
    )
    return Layout(mesh, mode, balanced), reason


@functools.lru_cache  # asked for at every step
def row_share(mesh) -> tuple[int, int]:
    """(share, shares): this process' devices hold the share-th of so many equal parts of the rows.
    Processes along whose devices a row is cut have the same share and read the same rows.
    """
    rows = row_parts(mesh)
    at = np.arange(rows).reshape(rows, 1)
    mine = (
        np.vectorize(lambda device: device.process_index)(mesh.devices.reshape(rows, -1))
        == jax.process_index()
    )
    held = np.unique(np.broadcast_to(at, mine.shape)[mine])
    return int(held[0]) // len(held), rows // len(held)


def rows_of_share(rows: int, accumulate: int, mesh) -> np.ndarray:
    """The numbers of the rows that this process holds, of `accumulate` times `rows`; `place` takes
    them in this order.
    """
    share, shares = row_share(mesh)
    return np.arange(accumulate * rows).reshape(accumulate, shares, -1)[:, share].reshape(-1)


def check_rows(rows: int, mesh) -> None:
    """Raises ConfigError where `rows` do not spread evenly over the mesh."""
    devices = row_parts(mesh)
    if rows % devices:
        raise ConfigError(
            f"training.rows={rows} (in YAML batch_size) do not spread evenly over the {devices} devices of "
            f"mesh.data, mesh.fsdp and mesh.expert: use a multiple such as {-(-rows // devices) * devices}, "
            "or spread the tokens of each row over all devices: mesh.fsdp=1 and mesh.sequence=-1 (in YAML "
            "sequence_parallel: true)"
        )


def abstract_batch(
    accumulate: int, rows: int, length: int, mesh, fields: tuple[Field, ...] = NEXT_TOKEN
) -> Batch:
    """The batches [A, B, T] that `place` makes, as `jax.ShapeDtypeStruct`s."""
    shape, sharding = (accumulate, rows, length), batch_sharding(mesh, 3)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in dtypes(fields).items()
    }
    return cast(Batch, arrays)


def place(batch: dict[str, np.ndarray], accumulate: int, mesh, layout: Layout | None) -> Batch:
    """This process' rows, arrays [A * B_local, T], as its part of the global batch [A, B, T]; with
    `index`, the position of every token in its row.
    """
    tokens = batch["tokens"]
    share, shares = row_share(mesh)
    index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    sharding = batch_sharding(mesh, 3)

    def place_array(x):
        x = x.reshape(accumulate, -1, x.shape[-1])
        if layout is not None and layout.zigzag:
            x = zigzag(x, mesh.shape["sequence"])
        first, shape = share * x.shape[1], (accumulate, shares * x.shape[1], x.shape[2])

        def local(at):
            rows = slice((at[1].start or 0) - first, (at[1].stop or shape[1]) - first)
            return x[at[0], rows, at[2]]

        return jax.make_array_from_callback(shape, sharding, local)

    return cast(Batch, {name: place_array(x) for name, x in (batch | {"index": index}).items()})
