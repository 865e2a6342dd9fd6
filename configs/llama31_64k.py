"""Llama-3.1-8B reads papers of 64k tokens: shifted sparse attention up to 32k, then full attention.

The base is trained for 131,072 tokens already, so its RoPE is kept; the adapter learns the domain
at that length.

lljax train --config=configs/llama31_64k.py --workdir=runs/llama31_64k \
    --config.data.train="('papers.jsonl',)"
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "meta-llama/Llama-3.1-8B"
    c.context.length = 65_536  # tokens the adapter is trained to read
    c.context.schedule = (  # (until_step, length, attention)
        (500, 16_384, "shifted"),
        (1_000, 32_768, "shifted"),
        (1_500, 65_536, "full"),  # finish in full attention: retrieval needs it
    )
    c.context.rope.type = "keep"  # llama3 scaling to 131,072 is in the base
    c.lora.rank = 32
    c.lora.alpha = 64.0  # twice the rank
    c.lora.targets = ("all-linear",)
    c.data.train = ("data/papers.jsonl",)
    c.data.valid_fraction = 0.02  # share of the documents held out
    c.optimizer.learning_rate = 5e-5
    c.training.accumulate = 8  # rows an optimizer step, one at a time
    c.training.eval_every = 250  # steps
    c.mesh.fsdp = 1  # rows are not spread ...
    c.mesh.sequence = -1  # ... but the tokens of each row are, and the weights, over all devices
    return c
