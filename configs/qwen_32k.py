"""Qwen3-8B reads 32k tokens: 8k and 16k in shifted sparse attention, the last stage in full
attention.

lljax train --config=configs/qwen_32k.py --workdir=runs/qwen_32k \
    --config.data.train="('documents.jsonl',)"
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "Qwen/Qwen3-8B"
    c.context.length = 32_768  # tokens the adapter is trained to read
    c.context.schedule = (  # (until_step, length, attention)
        (1_000, 8_192, "shifted"),
        (2_000, 16_384, "shifted"),
        (5_000, 32_768, "full"),  # finish in full attention: retrieval needs it
    )
    c.context.rope.type = "yarn"  # Qwen3's own recipe beyond its trained context
    c.lora.rank = 64
    c.lora.alpha = 128.0  # twice the rank
    c.lora.targets = ("q_proj", "v_proj")  # LoRA's original choice: fewer factors to train
    c.data.train = ("data/train.jsonl",)
    c.data.valid_fraction = 0.02  # share of the documents held out
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "linear"  # decay to zero after the warm-up
    c.optimizer.warmup_steps = 100
    c.training.accumulate = 8  # rows an optimizer step, one at a time
    c.training.eval_every = 500  # steps
    c.mesh.fsdp = 1  # rows are not spread ...
    c.mesh.sequence = -1  # ... but the tokens of each row are, and the weights, over all devices
    return c
