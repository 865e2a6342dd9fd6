"""The formats of an export: a table.

A row writes a folder and returns the commands that load it, and names the options that it takes.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.compression import compress, recipe
from lljax.compression.methods import METHODS
from lljax.config import Config, default_config
from lljax.config.checks import one_of
from lljax.errors import ConfigError
from lljax.interop import export, export_whole, gguf_export
from lljax.interop.base import Base
from lljax.interop.export_folder import extend_record, write_folder
from lljax.interop.export_weights import MergedBase
from lljax.interop.gguf_lora import LORA_TYPES
from lljax.interop.gguf_write import TYPES
from lljax.interop.usage import loader, serve_command
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import Layout, make_mesh
from lljax.run.calibration import calibration_rows
from lljax.run.checksums import describe
from lljax.run.restore import read_config

SCALES = ("largest", "search")
CALIBRATION = ("data", "rows", "length", "seed")  # options of calibrated methods
LONGEST = 1 << 15  # tokens of a calibration row of a base alone, unless given
TILE = 4096  # tokens that norms, projections and MLPs compute at a time while calibrating


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of formats, each None if it was not given.

    dtype: of the weights. method, layout, group, scales: see `lljax.compression.recipe`. data,
    rows, length, seed: see `lljax.run.calibration`.
    """

    dtype: str | None = None
    method: str | None = None
    layout: str | None = None
    group: int | None = None
    scales: str | None = None
    data: tuple[str, ...] | None = None
    rows: int | None = None
    length: int | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model to export: of a run, or a base alone.

    model: its base weights may have no values. workdir: of the run; None for a base alone.
    step: of the run's checkpoint; None for a model in memory. chat_template: that the run trained
    under, if the base has none. trained: whether there is more to export than the base.
    """

    model: Decoder
    base: Base
    workdir: Path | None = None
    step: int | None = None
    chat_template: str | None = None
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """write(the model, folder, options, whether it replaces an earlier export): how to load it.

    options: those that it takes. dtypes: the values of `Options.dtype`. needs_run: whether it
    cannot be written of a base alone.
    """

    write: Callable[[Exported, Path, Options, bool], str]
    options: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    needs_run: bool = False


def write_export(
    format: str, exported: Exported, out: Path, options: Options, overwrite: bool
) -> str:
    """Writes an export; returns how to load it.

    Raises:
      ConfigError: an option that the format does not take, or a model that it cannot hold.
    """
    check_options(format, options)
    usage = FORMATS[format].write(exported, out, options, overwrite)
    extend_record(
        out, usage=usage, base=exported.base.path, trained=exported.trained, step=exported.step
    )
    return usage


def check_options(format: str, options: Options) -> None:
    """Raises ConfigError for an unknown format, options that it does not take, and values that are
    none.
    """
    one_of(*FORMATS)("--format", format)
    row = FORMATS[format]
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) is None or field.name in row.options:
            continue
        others = [name for name, other in FORMATS.items() if field.name in other.options]
        raise ConfigError(
            f"--{field.name} with --format={format}: it is for --format={' and '.join(others)}"
        )
    for name, legal in (("dtype", row.dtypes), ("scales", SCALES)):
        if (value := getattr(options, name)) is not None:
            one_of(*legal)(f"--{name}", value)


def _dense(
    write: Callable[..., str], dtypes: tuple[str, ...] = export.DTYPES, **row: Any
) -> ExportFormat:
    def run(exported: Exported, out: Path, options: Options, overwrite: bool) -> str:
        return write(
            exported.model,
            exported.base,
            out,
            overwrite=overwrite,
            chat_template=exported.chat_template,
            **({"dtype": options.dtype} if dtypes else {}),
        )

    return ExportFormat(run, ("dtype",) if dtypes else (), dtypes=dtypes, **row)


def _quantized(format: str) -> ExportFormat:
    def run(exported: Exported, out: Path, options: Options, overwrite: bool) -> str:
        return _compress(format, exported, out, options, overwrite)

    calibrated = any(METHODS[name].calibrated for name in recipe.FORMATS[format].methods)
    options = ("method", "layout", "group", "scales")
    return ExportFormat(run, (*options, *CALIBRATION) if calibrated else options)


FORMATS = {
    "peft": _dense(export.export_peft, needs_run=True),
    "merged": _dense(export.export_merged),
    "split": _dense(export.export_split, needs_run=True),
    "whole": _dense(export_whole.export_whole, ()),
    **{name: _quantized(name) for name in recipe.FORMATS},
    "gguf": _dense(gguf_export.export_gguf, tuple(TYPES)),
    "gguf_lora": _dense(gguf_export.export_gguf_lora, LORA_TYPES, needs_run=True),
}


def _compress(format: str, exported: Exported, out: Path, options: Options, overwrite: bool) -> str:
    how = recipe.make_recipe(
        format,
        method=options.method,
        layout=options.layout,
        group=options.group,
        search=options.scales == "search",
    )
    modules = recipe.modules_of(exported.model.spec, how)  # may refuse, before anything is read
    for name in CALIBRATION if not METHODS[how.method].calibrated else ():
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} with --method={how.method}: it is not calibrated")
    export.check_model(exported.model, exported.base, out)
    try:
        _write_quantized(format, how, modules, exported, out, options, overwrite)
    except BaseException:
        compress.remove_unless_begun(out)
        raise
    needs = "compressed-tensors" if how.layout == "compressed-tensors" else "gptqmodel optimum"
    return (
        f"import transformers  # and pip install {needs}\n"
        f"model = {loader(exported.model.spec)}({str(out)!r})\n"
        f"{serve_command(exported.model.spec, out, {})}"
    )


def _write_quantized(
    format: str,
    how: recipe.Recipe,
    modules: recipe.Modules,
    exported: Exported,
    out: Path,
    options: Options,
    overwrite: bool,
) -> None:
    model, spec = exported.model, exported.model.spec
    config = read_config(exported.workdir) if exported.workdir else None
    dtype = _dtype(config)
    trained = nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1])
    identity: dict[str, Any] = {
        "format": format,
        **dataclasses.asdict(how),
        "dtype": str(dtype),
        "base": exported.base.fingerprint(),
        "spec": repr(spec),
        "trained": describe(trained),
    }
    base = MergedBase(model, exported.base)
    base.release()
    rows = None
    if METHODS[how.method].calibrated:
        rows = calibration_rows(
            config or default_config(),
            exported.base,
            _cache(exported, out, options),
            files=options.data or (),
            length=options.length or _usual_length(config, spec),
            rows=options.rows,
            seed=options.seed or 0,
        )
        recipe.warn_of_few(spec, rows.count)
        identity["calibration"] = hashlib.sha256(rows.tokens.tobytes()).hexdigest()
    layout = _layout(rows.tokens.shape[1]) if rows else None
    calibration = compress.Calibration(rows, dtype, layout, TILE)
    with compress.opened(out, identity, overwrite) as work:
        compress.compress(base, spec, how, modules, calibration, work, print)

        def write(folder: Path) -> None:
            compress.assemble(base, spec, how, modules, rows, work, folder, exported.chat_template)

        write_folder(out, format, write, overwrite)
        work.remove()


def _cache(exported: Exported, out: Path, options: Options) -> Path:
    """The folder of the tokens that calibrate: the run's, or a hidden one beside `out`."""
    if exported.workdir is not None and options.data is None:
        return exported.workdir / "data"
    return compress.work_folder(out) / "data"


def _usual_length(config: Config | None, spec: DecoderSpec) -> int:
    """The length that the run trained; of a base alone, the length that it reads."""
    return config.context.length if config is not None else min(spec.max_length, LONGEST)


def _dtype(config: Config | None) -> Any:
    """The dtype of the computation: the run's; of a base alone bfloat16, on a CPU float32."""
    if config is not None:
        return jnp.dtype(config.model.dtype)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _layout(length: int) -> Layout | None:
    """Rows over all devices of this process, if they divide; None for one device."""
    devices = jax.local_devices()
    if len(devices) == 1 or length % len(devices):
        return None
    mesh = make_mesh(sequence=len(devices), devices=devices)
    return Layout(mesh, context_parallel="allgather")
