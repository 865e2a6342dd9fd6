"""Qwen3-235B-A22B reads 32k tokens on a v5p-128: eight rows a step, experts over eight devices and
each row over eight.

python scripts/plan.py --config=configs/qwen3_moe_32k.py --device=v5p-128
python scripts/train.py --config=configs/qwen3_moe_32k.py --workdir=/shared/runs/qwen3_moe_32k
"""

from lljax.config import default_config


def get_config():
    c = default_config()
    # configs/shapes has its config.json, and DeepSeek-R1's: enough for plan.py
    c.model.path = "Qwen/Qwen3-235B-A22B"
    c.context.length = 32_768  # tokens the adapter is trained to read
    c.context.schedule = ((1_000, 32_768, "full"),)
    c.context.rope.type = "keep"  # the base reads as many
    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.lora.targets = ("all-linear",)  # the experts too
    c.lora.also_train = ()
    c.data.train = ("data/train.jsonl",)
    c.optimizer.learning_rate = 1e-4
    c.training.rows = 8
    c.training.router_aux_loss_coef = 0.001  # as in the base's config.json
    c.memory.tile = 1024  # tokens a device puts through its experts at a time
    c.mesh.fsdp, c.mesh.expert, c.mesh.sequence = 1, 8, 8
    return c
