"""Reads and writes safetensors one tensor at a time; every statement of a header is checked.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lljax.errors import ModelError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(value): key for key, value in DTYPES.items()}
MAX_HEADER = 100 << 20  # bytes, the limit of the reference implementation
INDEX = "model.safetensors.index.json"
Table = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name: (dtype, shape)
Entry = tuple[np.dtype, tuple[int, ...], int]  # dtype, shape, start byte


class File:
    """One safetensors file. `entries` maps a tensor's name to (dtype, shape, start byte)."""

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if not 0 < length <= min(MAX_HEADER, size - 8):
                raise ModelError(
                    f"{path}: not a safetensors file, or cut short (header of {length} bytes in "
                    f"{size})"
                )
            try:
                header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                raise ModelError(f"{path}: the safetensors header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise ModelError(f"{path}: the safetensors header is not a JSON object")
        header.pop("__metadata__", None)
        self.header_bytes = 8 + length
        self.entries = {
            name: self._entry(name, entry, size - self.header_bytes)
            for name, entry in header.items()
        }
        end = 0
        spans = sorted(
            (start, start + math.prod(shape) * dtype.itemsize, name)
            for name, (dtype, shape, start) in self.entries.items()
        )
        for start, stop, name in spans:
            if start < end:
                raise ModelError(f"{path}: tensor {name!r} overlaps the one before it")
            end = stop

    def _entry(self, name: str, entry: Any, room: int) -> Entry:
        """The entry of a tensor; room: bytes of data in the file.

        Raises:
          ModelError: it does not fit the file.
        """
        try:
            dtype, shape, (start, stop) = (
                np.dtype(DTYPES[entry["dtype"]]),
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            # a bool is an int too
            sound = all(type(x) is int and x >= 0 for x in (*shape, start, stop))
            sound = sound and stop - start == math.prod(shape) * dtype.itemsize and stop <= room
            # the limits of numpy, for a tensor with a side of 0, too
            sound = (
                sound
                and len(shape) <= 32
                and math.prod(x or 1 for x in shape) * dtype.itemsize < 1 << 62
            )
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ModelError(
                f"{self.path}: the header entry of tensor {name!r} does not fit the file; it is "
                f"damaged or of an unsupported type (supported: {', '.join(DTYPES)})"
            )
        return dtype, shape, start

    def read(self, name: str) -> np.ndarray:
        """The tensor, mapped from the file: pages are read as they are used."""
        dtype, shape, start = self.entries[name]
        count = math.prod(shape)
        if count == 0:
            return np.zeros(shape, dtype)
        return (
            np.memmap(self.path, np.uint8, "r", self.header_bytes + start, count * dtype.itemsize)
            .view(dtype)
            .reshape(shape)
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated names: readers differ in the entry that they take."""
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries


class Folder:
    """The safetensors of a model folder: `model.safetensors`, or the shards of its index.

    where: the file of every tensor.
    """

    def __init__(self, folder: Path):
        files: dict[Path, list[str] | None]
        if (folder / INDEX).is_file():
            files = {**_indexed_files(folder)}
        elif (folder / "model.safetensors").is_file():
            files = {folder / "model.safetensors": None}
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            hint = (
                f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors"
                if pickled
                else ""
            )
            raise ModelError(f"{folder}: no model.safetensors and no {INDEX}{hint}")
        self.files = [File(path) for path in files]
        self.where: dict[str, File] = {}
        for file, names in zip(self.files, files.values(), strict=True):
            for name in file.entries if names is None else names:
                if name not in file.entries:
                    raise ModelError(
                        f"{file.path}: tensor {name!r} is missing, though {INDEX} says it is there"
                    )
                self.where[name] = file

    def names(self) -> list[str]:
        return list(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.where[name].entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self.where[name].entries[name][0]

    def read(self, name: str) -> np.ndarray:
        return self.where[name].read(name)


def _indexed_files(folder: Path) -> dict[Path, list[str]]:
    """The files that the index of a folder names, with their tensors.

    Raises:
      ModelError: it is no index, or names a file that is not in the folder.
    """
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_bytes().decode())["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(folder / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index}: not an index of tensors ({type(error).__name__}: {error})"
        ) from None
    for path in files:
        name = path.name
        # A hub's cache links its files into a shared store, so the link itself may leave the
        # folder; the name may not.
        if path.parent != folder or name in ("", ".", "..") or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: {str(path)!r} is not the plain name of a safetensors file in this folder"
            )
        if len(name) > 255 or not path.is_file():  # the system raises on a longer name
            raise ModelError(f"{index}: the file {name[:255]} that it names is not there")
    return files


def write(
    path: Path,
    tensors: Table,
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes one file of `tensors` {name: (dtype, shape)}, one at a time from `read`; then reads it
    back.

    The file appears under its name only when it is complete.

    Raises:
      ModelError: the values on the disk differ from those written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data aligned to 8 bytes, as the format asks of writers
    sums, unfinished = {}, path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            # The header promises row-major order; a transposed view has another.
            array = np.ascontiguousarray(read(name))
            assert array.dtype == dtype and array.shape == tuple(shape), (
                name,
                array.dtype,
                array.shape,
                dtype,
                shape,
            )
            raw = array.reshape(-1).view(np.uint8)
            sums[name] = zlib.crc32(raw.data)
            file.write(raw.data)
        file.flush()
        os.fsync(file.fileno())
    written = File(unfinished)
    for name, checksum in sums.items():
        raw = np.ascontiguousarray(written.read(name)).reshape(-1).view(np.uint8)
        if zlib.crc32(raw.data) != checksum:
            raise ModelError(
                f"{path}: tensor {name!r} read back differs from the tensor written; the disk is "
                "not sound"
            )
    unfinished.rename(path)


def write_sharded(
    folder: Path, tensors: Table, read: Callable[[str], np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` with their index."""
    shards: list[Table] = [{}]
    sizes = [0]
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if sizes[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = (dtype, shape)
        sizes[-1] += size
    if len(shards) == 1:
        return write(folder / "model.safetensors", tensors, read)
    files = shard_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        write(folder / file, shard, read)
    write_index(folder, files)


def shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, names: list[str]) -> None:
    """Writes the index of shards that are complete."""
    files = {name: File(folder / name) for name in names}
    weight_map = {tensor: name for name, file in files.items() for tensor in file.entries}
    sizes = (
        math.prod(shape) * dtype.itemsize
        for file in files.values()
        for dtype, shape, *_ in file.entries.values()
    )
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def layout(arrays: Iterable[tuple[str, np.ndarray]]) -> Table:
    """The `tensors` argument of `write` for arrays in memory."""
    return {name: (array.dtype, array.shape) for name, array in arrays}
