"""The run that made lljax/assets/tiny-512: a 3M-parameter Llama trained from nothing on the Python
standard library.

python scripts/prepare_data.py stdlib --out=data/tiny_base.jsonl
python scripts/train.py --config=configs/tiny_base.py --workdir=runs/tiny_base

About an hour on two cores. Made with the library of Python 3.11.7; the held-out documents are those
of the quickstart.
"""

from lljax.config import default_config


def get_config():
    c = default_config()
    c.train_type = "full"
    c.model.path = "lljax/assets/tiny-512"
    c.model.init = "random"
    c.model.dtype = "float32"
    c.context.length = 512
    c.context.schedule = ((2_000, 512, "full"),)
    c.context.rope.type = "keep"
    c.data.train = ("data/tiny_base.jsonl",)
    c.data.valid_fraction = 0.03
    c.training.rows = 8
    c.training.eval_every = 300
    c.training.eval_rows = 128
    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.beta2 = 0.98
    c.optimizer.weight_decay.kernel = 0.1
    c.checkpoint.every_minutes = 5.0
    return c
