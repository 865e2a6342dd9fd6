"""The largest difference of every family from transformers and PEFT, in float32, on tiny random
models.

python scripts/bench/parity.py
python scripts/bench/parity.py --families=gemma3_text,phi3

Rows of 150 tokens on models of 64 positions. logits: against transformers. gradient: of every LoRA
factor against PEFT, relative to the largest. round trip: tensors that do not return bitwise. PEFT:
logits of the exported adapter. cache: logits of cached generation against whole rows. GGUF: logits
of the base read back from a file in f32, where llama.cpp has this model and lljax writes it. Needs
torch and peft: pip install -e '.[test]'. The families are in tests/families.py. Exit code 1: a cell
is above 1e-4.
"""

import sys
import tempfile
from pathlib import Path

import common
import jax
from rich.table import Table

from lljax.cli.console import console
from lljax.errors import ConfigError, exit_cleanly

LIMIT = 1e-4


def bench(names: list[str]) -> bool:
    """Prints the table; returns whether every cell is within the limit."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    try:
        from families import FAMILIES, measure
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install -e '.[test]'") from None
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(f"--families: {name!r} is none of {'; '.join(FAMILIES)}")
    table, sound = None, True
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder, console().status(name):
            differences = measure(name, Path(folder) / "base")
        jax.clear_caches()  # the programs of 40 families reach the system's limit of memory maps
        table = table or Table("family", *differences)
        cells = (
            "" if value is None else str(value) if kind == "round trip" else f"{value:.1e}"
            for kind, value in differences.items()
        )
        table.add_row(name, *cells)
        print(name, *differences.values(), flush=True)  # a family takes up to a minute
        worst = max(value for value in differences.values() if value is not None)
        sound &= differences["round trip"] == 0 and worst <= LIMIT
    if table:
        console().print(table)
    return sound


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--families", default="", help="comma-separated; by default all")
    arguments = parser.parse_args()
    with exit_cleanly():
        if not bench([name.strip() for name in arguments.families.split(",") if name.strip()]):
            sys.exit(1)


if __name__ == "__main__":
    main()
