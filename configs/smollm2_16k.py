"""SmolLM2-135M-Instruct (trained for 8,192 tokens) reads 16k: a small pretrained model for one
modest GPU, or for patience.

lljax train --config=configs/smollm2_16k.py --workdir=runs/smollm2_16k \
    --config.data.train="('documents.jsonl',)"

--config.model.path may name a GGUF file or a folder instead of the hub id.
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.dtype = "float32"  # 135M parameters: float32 costs little and runs on a CPU
    c.context.length = 16_384  # twice the base's context
    c.context.schedule = (  # (until_step, length, attention)
        (400, 4_096, "shifted"),
        (800, 8_192, "shifted"),
        (1_000, 16_384, "full"),  # finish in full attention: retrieval needs it
    )
    c.context.rope.type = "yarn"
    c.lora.rank = 16
    c.lora.alpha = 32.0  # twice the rank
    c.data.train = ("data/train.jsonl",)
    c.data.valid_fraction = 0.02  # share of the documents held out
    c.optimizer.learning_rate = 3e-4
    return c
