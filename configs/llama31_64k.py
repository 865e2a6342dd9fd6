"""Llama-3.1-8B reads papers of 64k tokens: shifted sparse attention up to 32k, full attention at
64k.

The base is trained for 131,072 tokens already, so its RoPE is kept; what the adapter learns is the
domain at length.

python scripts/train.py --config=configs/llama31_64k.py --workdir=runs/llama31_64k \
    --config.data.train="('papers.jsonl',)"
"""

from lljax.config import default_config


def get_config():
    c = default_config()
    c.model.path = "meta-llama/Llama-3.1-8B"
    c.context.length = 65_536
    c.context.schedule = (  # (until_step, length, attention)
        (500, 16_384, "shifted"),
        (1_000, 32_768, "shifted"),
        (1_500, 65_536, "full"),
    )
    c.context.rope.type = "keep"  # llama3 scaling to 131,072 is in the base
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.targets = ("all-linear",)
    c.data.train = ("data/papers.jsonl",)
    c.data.valid_fraction = 0.02
    c.optimizer.learning_rate = 5e-5
    c.training.accumulate = 8
    c.training.eval_every = 250
    # a row over all devices there are, and the weights with it
    c.mesh.fsdp, c.mesh.sequence = 1, -1
    return c
