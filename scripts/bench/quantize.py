"""The cost of a quantized base in perplexity, and the losses of training over it.

python scripts/bench/quantize.py --model=models/smollm2.gguf --data=data/stdlib.jsonl
python scripts/bench/quantize.py --model=models/smollm2.gguf --data=data/stdlib.jsonl --steps=20

Everything is computed in float32. With --steps the same LoRA is trained over the dense and the nf4
base, on the same rows.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import common
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lljax.build import load_base
from lljax.config import Config, default_config
from lljax.data.tokens import prepare
from lljax.errors import DataError, exit_cleanly
from lljax.evaluation.perplexity import perplexity, windows
from lljax.interop.open import open_base, tokenizer_fingerprint
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.quantize import FORMS, Quantized
from lljax.report.records import read_metrics
from lljax.run import loop

CONSOLE = Console(width=120)


def config_of(arguments: argparse.Namespace) -> Config:
    c = default_config()
    c.model.path, c.model.dtype = arguments.model, "float32"
    c.data.train, c.data.valid_fraction, c.data.loss_on = (arguments.data,), 0.1, "everything"
    c.context.length, c.context.rope.type = arguments.length, "keep"
    c.context.schedule = ((max(arguments.steps, 1), arguments.length, "full"),)
    c.lora.rank, c.lora.alpha, c.lora.targets, c.lora.also_train = 16, 32.0, ("all-linear",), ()
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 5e-4, 2, "constant"
    c.training.rows, c.mesh.fsdp, c.training.eval_rows = 1, 1, arguments.documents
    return c


def bits(model: Decoder) -> float:
    """Bits a weight of the quantized kernels, scales included; 32 if there are none."""
    held = [v.get_value() for _, v in declared(model) if isinstance(v.get_value(), Quantized)]
    stored = sum(
        x.nbytes
        for value in held
        for x in (value.codes, value.scale, value.outer, value.offset)
        if x is not None
    )
    return 8 * stored / sum(np.prod(value.shape) for value in held) if held else 32.0


def quality(config: Config, base: Any, texts: np.ndarray) -> None:
    """Prints the perplexity of `texts` under every form of quantization."""
    length = config.context.length
    table = common.table(
        ("kernels", "bits a weight", "perplexity", "against none"),
        left=("kernels",),
        title=f"{config.model.path}, {len(texts)} held-out texts of {length:,} tokens",
    )
    first = None
    for format, matmul in (*((format, "default") for format in ("none", *FORMS)), ("none", "fp8")):
        with CONSOLE.status(format):
            model = load_base(base, spec_from_hf(base.config), jnp.float32, format, matmul)
            value = perplexity(model, texts, length)
        first = first or value
        kernels = format if matmul == "default" else f"{format}, products in {matmul}"
        table.add_row(
            kernels, f"{bits(model):.3f}", f"{value:.3f}", f"{100 * (value / first - 1):+.2f}%"
        )
    CONSOLE.print(table)


def training(config: Config) -> None:
    """Prints the losses of the same LoRA over the dense and the nf4 base, side by side."""
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
    table = common.table(
        ("step", *losses),
        left=("step",),
        title="loss of a LoRA of rank 16 on every linear layer, over the dense and the nf4 base",
    )
    every = max(1, config.context.schedule[-1][0] // 10)
    for i in range(0, len(losses["none"]), every):
        table.add_row(
            str(i + 1), *(f"{np.mean(loss[i : i + every]):.4f}" for loss in losses.values())
        )
    table.add_row("held-out perplexity", *(f"{value:.3f}" for value in held_out.values()))
    CONSOLE.print(table)


def held_out_texts(config: Config, base: Any) -> np.ndarray:
    """Windows of the held-out documents, int32 [n, length].

    Raises:
      DataError: no held-out document is long enough.
    """
    tokenizer, length = base.tokenizer(), config.context.length
    with tempfile.TemporaryDirectory() as workdir:
        held_out = prepare(
            config.data,
            tokenizer,
            base.config["vocab_size"],
            Path(workdir),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        ).valid
        texts = windows(held_out, length, config.training.eval_rows)
    if not len(texts):
        raise DataError(
            f"{config.data.train[0]}: no held-out document has more than {length} tokens"
        )
    return texts


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", required=True, help="JSONL of text; a tenth of its documents is held out"
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
        texts = held_out_texts(config, base)
        if arguments.steps:
            training(config)
        else:
            quality(config, base, texts)


if __name__ == "__main__":
    main()
