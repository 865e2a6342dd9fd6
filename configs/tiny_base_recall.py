"""The second run behind lljax/assets/tiny-512: it goes on from that of tiny_base.py, and learns to
find things in 512 tokens.

python scripts/make_tiny_base.py recall data/recall.jsonl
python scripts/train.py --config=configs/tiny_base_recall.py --workdir=runs/tiny_base_recall

A quarter of an hour on two cores.
"""

from configs import tiny_base


def get_config():
    c = tiny_base.get_config()
    c.model.init = "pretrained"
    c.context.schedule = ((600, 512, "full"),)
    c.data.train = ("data/tiny_base.jsonl", "data/recall.jsonl")
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    c.memory.remat = "none"
    c.training.eval_every = 200
    c.training.eval_rows = 32
    c.training.eval_tasks = (("passkey/tokens", 384), ("needle", 384), ("ruler/niah_single_1", 384))
    return c
