"""Hands what a run trained to PyTorch.

python scripts/export.py --workdir=runs/quickstart --format=peft     # an adapter for PEFT
python scripts/export.py --workdir=runs/quickstart --format=merged   # a checkpoint for transformers
and vLLM python scripts/export.py --workdir=runs/quickstart --format=split    # a base and a plain
LoRA for vllm --enable-lora
"""

import argparse
from pathlib import Path

from lljax.errors import exit_cleanly, printable
from lljax.interop.export import DTYPES, FORMATS
from lljax.interop.export_folder import check_out
from lljax.run.restore import restore_run, trained_template


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--format", choices=FORMATS, default="peft")
    parser.add_argument("--out", type=Path, help="by default WORKDIR/export/FORMAT")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --out"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; by default the last")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights of merged and split; by default as the base's, to which "
        "trained weights are rounded",
    )
    arguments = parser.parse_args()
    with exit_cleanly():
        out = arguments.out or arguments.workdir / "export" / arguments.format
        check_out(out, arguments.overwrite)  # before the weights are read
        _, model, base = restore_run(arguments.workdir, arguments.step)
        commands = FORMATS[arguments.format](
            model,
            base,
            out,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
            chat_template=trained_template(arguments.workdir, base),
        )
        print(f"{printable(str(out))} is written. To load it:\n\n{commands}")


if __name__ == "__main__":
    main()
