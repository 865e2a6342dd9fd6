"""Hands what a run trained to PyTorch.

python scripts/export.py --workdir=runs/quickstart --format=peft     # an adapter for PEFT
python scripts/export.py --workdir=runs/quickstart --format=merged   # a checkpoint for transformers and vLLM
python scripts/export.py --workdir=runs/quickstart --format=split    # a base and a plain LoRA for vllm --enable-lora
"""

import argparse
from pathlib import Path

from lljax.errors import exit_cleanly
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.restore import restore_run

FORMATS = {"peft": export_peft, "merged": export_merged, "split": export_split}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--format", choices=FORMATS, default="peft")
    parser.add_argument("--out", type=Path, help="by default WORKDIR/export/FORMAT")
    parser.add_argument("--step", type=int, help="of the checkpoint; by default the last")
    arguments = parser.parse_args()
    with exit_cleanly():
        _, model, base = restore_run(arguments.workdir, arguments.step)
        out = arguments.out or arguments.workdir / "export" / arguments.format
        commands = FORMATS[arguments.format](model, base, out)
        print(f"{out} is written. To load it:\n\n{commands}")


if __name__ == "__main__":
    main()
