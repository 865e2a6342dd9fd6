"""Qwen2.5-Coder-7B reads repositories of 16k tokens: a sliding window with anchors, then full
attention.

Every token sees the 4,096 before it, the first 64 of its repository, and the start of each file.

lljax data folder ~/code --repository --out=data/repositories.jsonl
lljax train --config=configs/qwen_coder_16k.py --workdir=runs/qwen_coder_16k
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "Qwen/Qwen2.5-Coder-7B"
    c.context.length = 16_384  # tokens the adapter is trained to read
    c.context.schedule = (  # (until_step, length, attention)
        (800, 16_384, "window"),
        (1_000, 16_384, "full"),  # finish in full attention: retrieval needs it
    )
    c.context.window = 4_096  # tokens that each token sees before it
    c.context.anchors = 64  # first tokens of each repository, seen from everywhere
    # the base's own token before each file of a repository
    c.context.anchor_markers = ("<|file_sep|>",)
    c.context.rope.type = "keep"  # trained for 32,768 tokens
    c.lora.rank = 32
    c.lora.alpha = 64.0  # twice the rank
    c.data.train = ("data/repositories.jsonl",)
    c.data.valid_fraction = 0.02  # share of the repositories held out
    c.optimizer.learning_rate = 1e-4
    c.training.accumulate = 8  # rows an optimizer step, one at a time
    c.training.eval_every = 200  # steps
    c.mesh.fsdp = 1  # rows are not spread ...
    c.mesh.sequence = -1  # ... but the tokens of each row are, and the weights, over all devices
    return c
