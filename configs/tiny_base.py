"""The run that made lljax/assets/tiny-512: a 3M-parameter Llama trained from nothing on the Python
standard library.

lljax data stdlib --out=data/tiny_base.jsonl
lljax train --config=configs/tiny_base.py --workdir=runs/tiny_base

About an hour on two cores. Trained on the library of Python 3.11.7; it holds out the same documents
as the quickstart.
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.train_type = "full"  # every weight, no adapter
    c.model.path = "lljax/assets/tiny-512"  # its shape and its tokenizer
    c.model.init = "random"  # and none of its weights
    c.model.dtype = "float32"
    c.context.length = 512
    c.context.schedule = ((2_000, 512, "full"),)  # (until_step, length, attention)
    c.context.rope.type = "keep"
    c.data.train = ("data/tiny_base.jsonl",)
    c.data.valid_fraction = 0.03  # share of the documents held out
    c.training.rows = 8  # rows a step
    c.training.eval_every = 300  # steps
    c.training.eval_rows = 128  # held-out rows an evaluation
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.beta2 = 0.98  # a short run: the second moment forgets faster
    c.optimizer.weight_decay.kernel = 0.1
    c.checkpoint.every_minutes = 5.0
    return c
