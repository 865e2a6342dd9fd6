"""How far every family is from transformers and PEFT: the largest difference seen, in float32, on
tiny random models.

python scripts/bench_parity.py
python scripts/bench_parity.py --families=gemma3_text,phi3

Rows of 150 tokens on models of 64 positions. logits: against transformers'. gradient: of every LoRA
factor, against PEFT's, in parts of the largest. round trip: tensors that do not return bitwise.
PEFT: logits of the exported adapter. cache: logits of cached generation against those of whole
rows. Needs torch and peft: pip install -e '.[test]'. The families are those of tests/families.py.
Exits with 1 where a cell is above 1e-4.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from lljax.cli.console import console
from lljax.errors import ConfigError, exit_cleanly

LIMIT = 1e-4


def bench(names: list[str]) -> bool:
    """Prints the table; returns whether every cell is within the limit."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    try:
        from families import FAMILIES, measure
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install -e '.[test]'") from None
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(f"--families: {name!r} is none of {'; '.join(FAMILIES)}")
    table, sound = None, True
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, Path(folder) / "base")
        table = table or Table("family", *found)
        table.add_row(
            name,
            *(
                str(value) if kind == "round trip" else f"{value:.1e}"
                for kind, value in found.items()
            ),
        )
        sound &= found["round trip"] == 0 and max(found.values()) <= LIMIT
    console().print(table)
    return sound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default="", help="comma-separated; by default all")
    arguments = parser.parse_args()
    with exit_cleanly():
        if not bench([name.strip() for name in arguments.families.split(",") if name.strip()]):
            sys.exit(1)


if __name__ == "__main__":
    main()
