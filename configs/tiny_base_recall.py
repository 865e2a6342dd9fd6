"""The second run behind lljax/assets/tiny-512: resumes from the result of tiny_base.py and learns
retrieval within 512 tokens.

python scripts/make_tiny_base.py recall data/recall.jsonl
lljax train --config=configs/tiny_base_recall.py --workdir=runs/tiny_base_recall

A quarter of an hour on two cores.
"""

from configs import tiny_base
from lljax.config import Config


def get_config() -> Config:
    c = tiny_base.get_config()
    c.model.init = "pretrained"  # the weights of the first run
    c.context.schedule = ((600, 512, "full"),)  # (until_step, length, attention)
    c.data.train = ("data/tiny_base.jsonl", "data/recall.jsonl")
    c.optimizer.learning_rate = 2e-3  # half of the first run's
    c.optimizer.warmup_steps = 50
    c.memory.remat = "none"  # rows of 512 tokens leave memory to spare
    c.training.eval_every = 200  # steps
    c.training.eval_rows = 32  # held-out rows an evaluation
    # (task, length): retrieval while it trains
    c.training.eval_tasks = (("passkey/tokens", 384), ("needle", 384), ("ruler/niah_single_1", 384))
    return c
