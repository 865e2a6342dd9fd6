"""Export a trained model, or quantize a base.

lljax export --workdir=runs/quickstart --format=peft     # an adapter for PEFT
lljax export --workdir=runs/quickstart --format=merged   # a checkpoint for transformers and vLLM
lljax export --workdir=runs/quickstart --format=split    # a base and a plain LoRA for vLLM
lljax export --workdir=runs/quickstart --format=gguf     # a file for llama.cpp, Ollama, LM Studio
lljax export --workdir=runs/quickstart --format=w4a16    # 4 bits, calibrated on the run's documents
lljax export --model=Qwen/Qwen3-8B --format=w4a16 --data=data/docs.jsonl --out=models/qwen3-w4

w4a16 (4 bits), w8a16 (8 bits) and fp8 (for H100s) are quantized layer by layer; the same command
goes on after an interruption.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lljax.cli.arguments import model_flag, parser, positive, whole
from lljax.errors import ConfigError, exit_cleanly, printable


def main(argv: Sequence[str]) -> None:
    """Writes the export and prints the commands that load it."""
    arguments = _parser().parse_args(argv)
    with exit_cleanly(), model_flag():
        export(arguments)


def _parser() -> argparse.ArgumentParser:
    command = parser("export", __doc__)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a run")
    source.add_argument("--model", help="hub id, folder or GGUF file of a base, exported alone")
    command.add_argument(
        "--format",
        default="peft",
        help="peft (default), merged, split, w4a16, w8a16, fp8, gguf or gguf_lora",
    )
    command.add_argument(
        "--out", type=Path, help="by default WORKDIR/export/FORMAT; needed with --model"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --out"
    )
    command.add_argument("--step", type=whole, help="of the checkpoint; by default the last")
    command.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16: of the weights of merged and split, to which trained "
        "weights are rounded; by default the base's. Of gguf: f16 (default), bf16, f32, q8_0, "
        "q5_1, q5_0, q4_1 or q4_0",
    )
    quantized = command.add_argument_group("quantized formats")
    quantized.add_argument(
        "--method", help="gptq (default of w4a16), awq, or rtn, rounding to nearest"
    )
    quantized.add_argument("--layout", help="compressed-tensors (default), gptq or awq")
    quantized.add_argument(
        "--group", type=whole, help="inputs that share a scale (128), -1 for all of an output"
    )
    quantized.add_argument(
        "--scales", help="largest (default): from the largest weight of a group; or search"
    )
    quantized.add_argument(
        "--data", help="JSONL files that calibrate, by default the run's training documents"
    )
    quantized.add_argument("--rows", type=positive, help="of calibration, by default 2^19 tokens")
    quantized.add_argument(
        "--length", type=positive, help="of a calibration row, by default the run's"
    )
    quantized.add_argument("--seed", type=whole, help="of the choice of rows (0)")
    return command


def export(arguments: argparse.Namespace) -> None:
    """Exports a checkpoint of a run, or a base. arguments: the flags of `lljax export`."""
    # Imported here: --help needs no jax.
    from lljax.exports import FORMATS, Options, check_options, write_export
    from lljax.interop.export_folder import check_out

    format, workdir = arguments.format, arguments.workdir
    options = Options(
        dtype=arguments.dtype,
        method=arguments.method,
        layout=arguments.layout,
        group=arguments.group,
        scales=arguments.scales,
        data=tuple(arguments.data.split(",")) if arguments.data else None,
        rows=arguments.rows,
        length=arguments.length,
        seed=arguments.seed,
    )
    check_options(format, options)
    if workdir is None and FORMATS[format].needs_run:
        raise ConfigError(f"--model with --format={format}: it exports what a run trained")
    if workdir is None and arguments.step is not None:
        raise ConfigError("--step with --model: it is the step of a run; use --workdir")
    if workdir is None and arguments.out is None:
        raise ConfigError("--model without --out: name the folder to write")
    out: Path = arguments.out or arguments.workdir / "export" / format
    check_out(out, arguments.overwrite)  # before the weights are read
    exported = _run(workdir, arguments.step) if workdir else _base(arguments.model)
    commands = write_export(format, exported, out, options, arguments.overwrite)
    print(f"{printable(str(out))} is written. To load it:\n\n{commands}")


def _run(workdir: Path, step: int | None) -> Any:
    from lljax.exports import Exported
    from lljax.run.restore import restore_checkpoint, trained_template

    step, _, model, base = restore_checkpoint(workdir, step)
    return Exported(
        model, base, workdir=workdir, step=step, chat_template=trained_template(workdir, base)
    )


def _base(path: str) -> Any:
    from lljax.exports import Exported
    from lljax.interop.open import open_base
    from lljax.models.decoder import Decoder
    from lljax.models.families import spec_from_hf

    base = open_base(path)
    return Exported(Decoder(spec_from_hf(base.config)), base, trained=False)
