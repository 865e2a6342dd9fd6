"""Quantizes a model layer by layer into a folder of HF format.

Every layer that is done is a file, so that the same call goes on after a kill, and ends with the
same bytes.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.compression.layers import LayerStream, Rows
from lljax.compression.methods import METHODS, Kernels
from lljax.compression.observe import linear_layers
from lljax.compression.recipe import Modules, Recipe, stays_dense
from lljax.data.files import atomic_write
from lljax.errors import ConfigError, printable
from lljax.interop import safetensors
from lljax.interop.base import Base, config_dtype
from lljax.interop.export_files import write_files
from lljax.interop.export_weights import finite_value
from lljax.interop.folder import read_json
from lljax.interop.huggingface import hf_part, hf_shape, join_parts, parts_of
from lljax.interop.layouts import WRITERS, Codes
from lljax.interop.quantized import QuantizedFolder
from lljax.models.declare import declared, hf_names
from lljax.models.decoder import Decoder
from lljax.models.decoder_layer import DecoderLayer
from lljax.models.spec import DecoderSpec

REPORT = "compression.json"  # beside the weights: the recipe, and how well each kernel was rounded
WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """rows: None for a method that needs none. dtype, layout, tile: see `LayerStream`."""

    rows: Rows | None
    dtype: Any
    layout: Any = None
    tile: int = 0


class Work:
    """The layers that are done, in a hidden folder beside the export."""

    def __init__(self, folder: Path):
        self.folder = folder

    def layer(self, number: int) -> Path:
        return self.folder / f"layer-{number:05d}"

    def done(self, number: int) -> bool:
        return (self.layer(number) / WEIGHTS).is_file()

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def work_folder(out: Path) -> Path:
    out = out.resolve()
    return out.with_name(f".{out.name}.unfinished")


@contextlib.contextmanager
def opened(out: Path, identity: dict[str, Any], overwrite: bool) -> Iterator[Work]:
    """The layers of the export to `out` that are done, for this process alone.

    identity: everything that changes the export. overwrite: whether layers of another export are
    removed.

    Raises:
      ConfigError: it holds the layers of another export, or another process writes it.
    """
    folder = work_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out={printable(str(out))}: another process exports to it: wait for its end, or "
                "name another folder"
            ) from None
        record, wanted = folder / "export.json", json.dumps(identity, sort_keys=True)
        before = read_json(record) if record.is_file() else None
        if before is not None and before != json.loads(wanted):
            if not overwrite:
                others = [k for k in identity if before.get(k) != json.loads(wanted)[k]]
                raise ConfigError(
                    f"--out={printable(str(out))} has an unfinished export that differs in "
                    f"{', '.join(others)}: give its flags to go on with it, or --overwrite to "
                    "begin again"
                )
            for layer in folder.glob("layer-*"):
                shutil.rmtree(layer)
        atomic_write(record, wanted)
        yield Work(folder)


def compress(
    base: Base,
    spec: DecoderSpec,
    recipe: Recipe,
    modules: Modules,
    calibration: Calibration,
    work: Work,
    say: Callable[[str], None],
) -> None:
    """Quantizes the layers of `base` that are not done. The calibration rows reach a layer through
    the quantized layers before it.

    base: gives dense weights. modules: of the recipe. say: takes a line on every layer.
    """
    method, rows = METHODS[recipe.method], calibration.rows
    settings = recipe.settings(config_dtype(base.config))
    stream = LayerStream(
        spec,
        rows,
        dtype=calibration.dtype,
        layout=calibration.layout,
        tile=calibration.tile,
    )
    stream.embed(base)
    started, first = time.monotonic(), sum(work.done(i) for i in range(spec.L))
    for number in range(spec.L):
        folder = work.layer(number)
        if not work.done(number):
            layer = stream.load(base, number)
            _check_finite(layer)
            before = {id(variable): variable.get_value() for _, variable in declared(layer)}
            quantized = {name for name in linear_layers(layer) if not stays_dense(name)}
            kernels = method.run(layer, quantized, stream.observe(layer), settings)
            _check_errors(kernels, number)
            changed = [x for _, x in declared(layer) if x.get_value() is not before[id(x)]]
            folder.mkdir(exist_ok=True)
            config = dense_config(base) | {"quantization_config": modules.config}
            atomic_write(folder / "config.json", json.dumps(config))
            atomic_write(folder / REPORT, json.dumps(_report(layer, kernels)))
            tensors = _tensors(layer, kernels, changed, base, recipe)
            table = safetensors.layout(tensors.items())
            safetensors.write(folder / WEIGHTS, table, tensors.__getitem__)
            left = (time.monotonic() - started) / (number + 1 - first) * (spec.L - number - 1)
            say(_line(number, spec.L, kernels, left))
            del layer, before, kernels, changed, tensors
        if rows is not None and number + 1 < spec.L:
            stream.advance(stream.load(QuantizedFolder(str(folder), folder), number))


def remove_unless_begun(out: Path) -> None:
    """Removes the work folder of an export of which no layer is done."""
    folder = work_folder(out)
    if not any(folder.glob(f"layer-*/{WEIGHTS}")):
        shutil.rmtree(folder, ignore_errors=True)


def assemble(
    base: Base,
    spec: DecoderSpec,
    recipe: Recipe,
    modules: Modules,
    rows: Rows | None,
    work: Work,
    folder: Path,
    chat_template: str | None,
) -> None:
    """Fills a folder with a model whose layers are all done: a shard for each layer, and one for
    everything else.
    """
    tokenizer = base.tokenizer()
    layers = [work.layer(number) for number in range(spec.L)]
    names = safetensors.shard_names(spec.L + 1)
    outside = {
        name: (base.dtype(name), hf_shape(of[0][0]))
        for name, of in parts_of(Decoder(spec)).items()
        if not name.startswith("model.layers.")
    }
    safetensors.write(folder / names[0], outside, lambda name: finite_value(base, name))
    for layer, name in zip(layers, names[1:], strict=True):
        _link(layer / WEIGHTS, folder / name)
    safetensors.write_index(folder, names)
    write_files(
        base,
        folder,
        spec,
        tokenizer,
        dtype=None,
        chat_template=chat_template,
        quantization=modules.config,
    )
    for name, content in modules.files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    report = {
        "recipe": dataclasses.asdict(recipe),
        "calibration": rows
        and {
            "rows": len(rows),
            "length": rows.tokens.shape[1],
            "tokens": rows.count,
        },
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "layers": [read_json(layer / REPORT) for layer in layers],
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def dense_config(base: Base) -> dict[str, Any]:
    """config.json, as if the base were not quantized."""
    return {k: v for k, v in base.config.items() if k != "quantization_config"}


def _check_finite(layer: DecoderLayer) -> None:
    """Raises ConfigError for a weight that is not finite: rounding would make a number of it."""
    for _, variable in declared(layer):
        if not jnp.isfinite(variable.get_value()).all():
            names = hf_names(variable)
            more = f" (or another of the {len(names)} experts)" if len(names) > 1 else ""
            raise ConfigError(
                f"tensor {names[0]!r}{more} holds values that are not finite: export an earlier "
                "--step, or mend the base"
            )


def _check_errors(kernels: Kernels, number: int) -> None:
    """Raises ConfigError if the calibration rows gave a layer inputs that are not finite."""
    for name, of in kernels.items():
        if any(kernel.error is not None and not math.isfinite(kernel.error) for kernel in of):
            raise ConfigError(
                f"layer {number}: what {name} reads on the calibration rows is not finite: the "
                "model overflows there; use a model in a wider dtype"
            )


def _tensors(
    layer: DecoderLayer,
    kernels: Kernels,
    changed: list[nnx.Variable],
    base: Base,
    recipe: Recipe,
) -> dict[str, np.ndarray]:
    """All tensors of a layer by HF name. changed: the Variables that the method changed."""
    writer, linears = WRITERS[recipe.layout], linear_layers(layer)
    codes: dict[str, list[tuple[nnx.Variable, Codes]]] = {}
    for name, of in kernels.items():
        variable = linears[name].kernel
        for kernel, hf in zip(of, hf_names(variable), strict=True):
            codes.setdefault(hf.removesuffix(".weight"), []).append((variable, kernel.codes))
    tensors = {
        stem + end: array
        for stem, parts in codes.items()
        for end, array in writer.tensors(_joined(parts), recipe.scheme).items()
    }
    for hf, parts in parts_of(layer).items():
        if hf.removesuffix(".weight") in codes:
            continue
        if any(variable is x for variable, _ in parts for x in changed):
            tensors[hf] = join_parts(parts).astype(base.dtype(hf))
        else:
            tensors[hf] = finite_value(base, hf)
    return tensors


def _joined(parts: list[tuple[nnx.Variable, Codes]]) -> Codes:
    """The codes of a HF kernel from the codes of its parts: kernels of ranges of its outputs."""
    if len(parts) == 1:
        return parts[0][1]

    def whole(field: str) -> Any:
        first = getattr(parts[0][1], field)
        if first is None:
            return None
        joined = np.empty((hf_shape(parts[0][0])[0], first.shape[1]), first.dtype)
        for variable, codes in parts:
            joined[hf_part(variable)] = getattr(codes, field)
        return joined

    return Codes(**{field.name: whole(field.name) for field in dataclasses.fields(Codes)})


def _report(layer: DecoderLayer, kernels: Kernels) -> dict[str, dict[str, Any]]:
    """By the name of each kernel: its error, and a note if there is one."""
    linears = linear_layers(layer)
    return {
        hf.removesuffix(".weight"): {"error": kernel.error}
        | ({"note": kernel.note} if kernel.note else {})
        for name, of in kernels.items()
        for kernel, hf in zip(of, hf_names(linears[name].kernel), strict=True)
    }


def _line(number: int, layers: int, kernels: Kernels, left: float) -> str:
    every = [kernel for of in kernels.values() for kernel in of]
    errors = [kernel.error for kernel in every if kernel.error is not None]
    error = f"  error {max(errors):.2%} at most" if errors else ""
    noted = sum(bool(kernel.note) for kernel in every)
    notes = f"  {noted} kernels with a note in {REPORT}" if noted else ""
    minutes, seconds = divmod(round(left), 60)
    return f"layer {number + 1}/{layers}{error}{notes}  left {minutes}:{seconds:02d}"


def _link(source: Path, target: Path) -> None:
    """The same file in two folders; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
