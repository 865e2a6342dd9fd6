"""Qwen3-235B-A22B reads 32k tokens on a v5p-128: eight rows a step, experts over eight devices and
each row over eight.

lljax plan --config=configs/qwen3_moe_32k.py --device=v5p-128
lljax train --config=configs/qwen3_moe_32k.py --workdir=/shared/runs/qwen3_moe_32k
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    # configs/shapes has its config.json, and DeepSeek-R1's: enough for `lljax plan`
    c.model.path = "Qwen/Qwen3-235B-A22B"
    c.context.length = 32_768  # tokens the adapter is trained to read
    c.context.schedule = ((1_000, 32_768, "full"),)  # (until_step, length, attention)
    c.context.rope.type = "keep"  # the base reads 32k already
    c.lora.rank = 32
    c.lora.alpha = 64.0  # twice the rank
    c.lora.targets = ("all-linear",)  # the experts too
    c.lora.also_train = ()  # neither embeddings nor norms: the export stays a plain LoRA
    c.data.train = ("data/train.jsonl",)
    c.optimizer.learning_rate = 1e-4
    c.training.rows = 8  # a row for each group of eight devices
    c.training.router_aux_loss_coef = 0.001  # as in the base's config.json
    c.memory.tile = 1024  # tokens a device puts through its experts at a time
    c.mesh.fsdp = 1  # all 64 chips are in the other two axes
    c.mesh.expert = 8  # devices over which the experts are spread
    c.mesh.sequence = 8  # devices over which the tokens of a row are spread
    return c
