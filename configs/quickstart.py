"""tiny-512, which reads 512 tokens, learns to read 4,096: the whole job in minutes on two cores.
`make quickstart`.

lljax data stdlib --out=data/stdlib.jsonl
lljax train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "lljax/assets/tiny-512"  # comes with the package
    c.model.dtype = "float32"  # a CPU computes in float32
    c.context.length = 4_096  # eight times the base's context
    c.context.schedule = (  # (until_step, length, attention): x2, x4, x8
        (60, 1_024, "shifted"),
        (110, 2_048, "shifted"),
        (150, 4_096, "shifted"),
        (240, 4_096, "full"),  # finish in full attention: retrieval needs it
    )
    c.context.rope.type = "yarn"
    c.lora.rank = 16
    c.lora.alpha = 32.0  # twice the rank
    c.lora.targets = ("all-linear",)
    c.data.train = ("data/stdlib.jsonl",)
    c.data.valid_fraction = 0.03  # documents that the base was not trained on either
    c.training.eval_rows = 16  # held-out rows an evaluation
    c.optimizer.learning_rate = 1.5e-3
    # a row a step is too noisy for the embeddings at the full rate
    c.optimizer.learning_rate_ratio.embed = 0.2
    return c
