"""Held-out perplexity by length: the base, the base with its RoPE stretched and nothing trained, and the trained model.

python scripts/evaluate.py --workdir=runs/quickstart --lengths=512,1024,2048,4096

Every length predicts the same tokens of the same documents. The table goes into the report of the run.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lljax.build import load_base
from lljax.data.tokens import prepare
from lljax.errors import ConfigError, DataError, exit_cleanly
from lljax.evaluation.perplexity import perplexity, windows
from lljax.interop.base import tokenizer_fingerprint
from lljax.models import spec
from lljax.restore import restore_run
from lljax.training.report import write_report

CONSOLE = Console()


def evaluate(workdir: Path, lengths: list[int], documents: int) -> None:
    config, trained, base = restore_run(workdir)
    lengths = lengths or doublings(trained.spec.rope.original_length, trained.spec.max_length)
    tokenizer = base.tokenizer()
    held_out = prepare(config.data, tokenizer, base.config["vocab_size"], workdir / "data",
                       tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)).valid
    texts = windows(held_out, max(lengths), documents)
    if not len(texts):
        raise DataError(f"no held-out document has more than {max(lengths)} tokens: shorten --lengths, or hold more out "
                        "with data.valid_fraction")
    dtype, like = jnp.dtype(config.model.dtype), (config.model.quantize, config.model.matmul)
    models = {"base": load_base(base, spec.from_hf(base.config), dtype, *like),
              "base, RoPE stretched": load_base(base, trained.spec, dtype, *like), "trained": trained}
    columns = ["perplexity at", *(f"{length:,}" for length in lengths)]
    table = Table(*columns)
    rows = []
    for name, model in models.items():
        values = [perplexity(model, texts, length, dtype=dtype)
                  for length in track(lengths, name, console=CONSOLE, transient=True)]
        rows.append([name, *(f"{value:.2f}" for value in values)])
        table.add_row(*rows[-1])
    CONSOLE.print(table)
    caption = (f"Held-out perplexity by context length; {len(texts)} documents of {max(lengths):,} tokens, every length "
               "predicts the same tokens, full attention")
    (workdir / "evaluation.json").write_text(json.dumps({"tables": [
        {"columns": columns, "rows": rows, "caption": caption}]}, indent=2))
    write_report(workdir)


def doublings(first: int, last: int) -> list[int]:
    """`first`, twice, four times ... it, up to and with `last`."""
    lengths = [min(first, last)]
    while lengths[-1] < last:
        lengths.append(min(2 * lengths[-1], last))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--lengths", default="",
                        help="comma-separated tokens; by default the base's context, twice it ... up to the new one")
    parser.add_argument("--documents", type=int, default=32, help="held-out documents that are read, at most")
    arguments = parser.parse_args()
    with exit_cleanly():
        try:
            lengths = sorted(int(length) for length in arguments.lengths.split(",") if length)
        except ValueError:
            raise ConfigError(f"--lengths={arguments.lengths}: comma-separated numbers of tokens") from None
        evaluate(arguments.workdir, lengths, arguments.documents)


if __name__ == "__main__":
    main()
