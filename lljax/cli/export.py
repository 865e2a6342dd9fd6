"""Export a trained model for PyTorch.

lljax export --workdir=runs/quickstart --format=peft     # an adapter for PEFT
lljax export --workdir=runs/quickstart --format=merged   # a checkpoint for transformers and vLLM
lljax export --workdir=runs/quickstart --format=split    # a base and a plain LoRA for vLLM
"""

from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import parser, whole
from lljax.config.checks import one_of
from lljax.errors import exit_cleanly, printable


def main(argv: Sequence[str]) -> None:
    """Writes the export and prints the commands that load it."""
    command = parser("export", __doc__)
    command.add_argument("--workdir", type=Path, required=True)
    command.add_argument("--format", default="peft", help="peft (default), merged or split")
    command.add_argument("--out", type=Path, help="by default WORKDIR/export/FORMAT")
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --out"
    )
    command.add_argument("--step", type=whole, help="of the checkpoint; by default the last")
    command.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16: of the weights of merged and split, to which trained "
        "weights are rounded; by default the base's",
    )
    arguments = command.parse_args(argv)
    with exit_cleanly():
        export(
            arguments.workdir,
            format=arguments.format,
            out=arguments.out or arguments.workdir / "export" / arguments.format,
            overwrite=arguments.overwrite,
            step=arguments.step,
            dtype=arguments.dtype,
        )


def export(
    workdir: Path,
    *,
    format: str,
    out: Path,
    overwrite: bool = False,
    step: int | None = None,
    dtype: str | None = None,
) -> None:
    """Exports a checkpoint of the run in `workdir` to `out`; by default the last."""
    # Imported here: --help needs no jax.
    from lljax.interop.export import DTYPES, FORMATS
    from lljax.interop.export_folder import check_out
    from lljax.run.restore import restore_run, trained_template

    one_of(*FORMATS)("--format", format)
    if dtype is not None:
        one_of(*DTYPES)("--dtype", dtype)
    check_out(out, overwrite)  # before the weights are read
    _, model, base = restore_run(workdir, step)
    commands = FORMATS[format](
        model,
        base,
        out,
        dtype=dtype,
        overwrite=overwrite,
        chat_template=trained_template(workdir, base),
    )
    print(f"{printable(str(out))} is written. To load it:\n\n{commands}")
