"""What quantising a base costs, and what training over it wins back: perplexity of held-out text,
and losses side by side.

python scripts/bench_quantize.py --model=models/smollm2.gguf --data=data/stdlib.jsonl
python scripts/bench_quantize.py --model=models/smollm2.gguf --data=data/stdlib.jsonl --steps=20

Everything is computed in float32. With --steps the same LoRA is trained over the dense and the nf4
base, on the same rows.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from lljax.build import load_base
from lljax.config import default_config
from lljax.data.tokens import prepare
from lljax.errors import DataError, exit_cleanly
from lljax.evaluation.perplexity import perplexity, windows
from lljax.interop.open import open_base, tokenizer_fingerprint
from lljax.models import spec
from lljax.models.declare import declared
from lljax.models.quantize import FORMS, Quantised
from lljax.report.records import read_metrics
from lljax.run import loop

CONSOLE = Console(width=120)


def config_of(arguments):
    c = default_config()
    c.model.path, c.model.dtype = arguments.model, "float32"
    c.data.train, c.data.valid_fraction, c.data.loss_on = (arguments.data,), 0.1, "everything"
    c.context.length, c.context.rope.type = arguments.length, "keep"
    c.context.schedule = ((max(arguments.steps, 1), arguments.length, "full"),)
    c.lora.rank, c.lora.alpha, c.lora.targets, c.lora.also_train = 16, 32.0, ("all-linear",), ()
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 5e-4, 2, "constant"
    c.training.rows, c.mesh.fsdp, c.training.eval_rows = 1, 1, arguments.documents
    return c


def bits(model) -> float:
    """Of a weight of the quantised kernels, scales included."""
    held = [v.get_value() for _, v in declared(model) if isinstance(v.get_value(), Quantised)]
    stored = sum(
        x.nbytes
        for value in held
        for x in (value.codes, value.scale, value.outer, value.offset)
        if x is not None
    )
    return 8 * stored / sum(np.prod(value.shape) for value in held) if held else 32.0


def quality(config, base, texts) -> None:
    table = Table(
        title=f"{config.model.path}, {len(texts)} held-out texts of {config.context.length:,} tokens"
    )
    for column in ("kernels", "bits a weight", "perplexity", "against none"):
        table.add_column(column, justify="left" if column == "kernels" else "right")
    first = None
    for format, matmul in (*((format, "default") for format in ("none", *FORMS)), ("none", "fp8")):
        with CONSOLE.status(format):
            model = load_base(base, spec.from_hf(base.config), jnp.float32, format, matmul)
            value = perplexity(model, texts, config.context.length)
        first = first or value
        kernels = format if matmul == "default" else f"{format}, products in {matmul}"
        table.add_row(
            kernels, f"{bits(model):.3f}", f"{value:.3f}", f"{100 * (value / first - 1):+.2f}%"
        )
    CONSOLE.print(table)


def training(config) -> None:
    losses, held_out = {}, {}
    for format in ("none", "nf4"):
        config.model.quantize = format
        with tempfile.TemporaryDirectory() as workdir:
            loop.train(config, workdir)
            records = read_metrics(Path(workdir))
        losses[format] = [record["loss"] for record in records if "loss" in record]
        held_out[format] = next(
            value
            for record in records
            if "eval" in record
            for name, value in record["eval"].items()
            if name.startswith("perplexity")
        )
    table = Table(
        "step",
        *losses,
        title="loss of a LoRA of rank 16 on every linear layer, over the dense and the nf4 base",
    )
    every = max(1, config.context.schedule[-1][0] // 10)
    for i in range(0, len(losses["none"]), every):
        table.add_row(
            str(i + 1), *(f"{np.mean(each[i : i + every]):.4f}" for each in losses.values())
        )
    table.add_row("held-out perplexity", *(f"{value:.3f}" for value in held_out.values()))
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", required=True, help="JSONL of real text; a tenth of its documents is held out"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens a text")
    parser.add_argument("--documents", type=int, default=8, help="held-out texts, at most")
    parser.add_argument(
        "--steps", type=int, default=0, help="steps of LoRA training to compare; 0: perplexity only"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    with exit_cleanly():
        config, base = config_of(arguments), open_base(arguments.model)
        tokenizer = base.tokenizer()
        with tempfile.TemporaryDirectory() as workdir:
            held_out = prepare(
                config.data,
                tokenizer,
                base.config["vocab_size"],
                Path(workdir),
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            ).valid
            texts = windows(held_out, arguments.length, arguments.documents)
        if not len(texts):
            raise DataError(
                f"{arguments.data}: no held-out document has more than {arguments.length} tokens"
            )
        if arguments.steps:
            training(config)
        else:
            quality(config, base, texts)


if __name__ == "__main__":
    main()
