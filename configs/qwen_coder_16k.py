"""Qwen2.5-Coder-7B reads repositories of 16k tokens: a sliding window with anchors, then full
attention.

Every token sees the 4,096 before it, the first 64 of its repository, and the start of each file.

python scripts/prepare_data.py folder ~/code --repository --out=data/repositories.jsonl
python scripts/train.py --config=configs/qwen_coder_16k.py --workdir=runs/qwen_coder_16k
"""

from lljax.config import default_config


def get_config():
    c = default_config()
    c.model.path = "Qwen/Qwen2.5-Coder-7B"
    c.context.length = 16_384
    c.context.schedule = (  # (until_step, length, attention)
        (800, 16_384, "window"),
        (1_000, 16_384, "full"),  # finish in full attention: retrieval needs it
    )
    c.context.window = 4_096
    c.context.anchors = 64
    # the base's own token before each file of a repository
    c.context.anchor_markers = ("<|file_sep|>",)
    c.context.rope.type = "keep"  # trained for 32,768 tokens
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.data.train = ("data/repositories.jsonl",)
    c.data.valid_fraction = 0.02
    c.optimizer.learning_rate = 1e-4
    c.training.accumulate = 8
    c.training.eval_every = 200
    # a row over all devices there are, and the weights with it
    c.mesh.fsdp, c.mesh.sequence = 1, -1
    return c
