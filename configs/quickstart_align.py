"""The model of `quickstart`, which reads 4,096 tokens, learns from rewards to find what it has
read: GRPO on needles, in minutes on two cores. `make quickstart-align`.

lljax data tasks --tasks=needle --model=lljax/assets/tiny-512 --lengths=1024,2048,3000,3900 \
    --examples=200 --out=data/needles.jsonl
lljax align --config=configs/quickstart_align.py --workdir=runs/quickstart_align
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "lljax/assets/tiny-512"  # comes with the package
    c.model.dtype = "float32"  # a CPU computes in float32
    c.objective.name = "grpo"
    c.context.length = 4_096  # as in quickstart: the RoPE factor follows it
    c.context.schedule = ((60, 4_096, "full"),)  # (until_step, length, attention)
    c.lora.adapter = "runs/quickstart/export/peft"  # goes on from there
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.lora.targets = ("all-linear",)
    c.data.train = ("data/needles.jsonl",)  # prompts, and the answers that the reward looks for
    c.data.overlong = "drop"  # a prompt is never split
    c.training.accumulate = 2  # rows a step: as many prompts as fit with their answers
    c.training.eval_tasks = (("needle", 4_096),)  # other needles than those of the prompts
    c.training.eval_every = 20  # steps
    c.training.eval_rows = 30
    c.rollout.answers = 8  # to each prompt, which is read once for all of them
    c.rollout.tokens = 10  # tokens of an answer at most
    c.rollout.log = "texts"
    c.reward.functions = (("contains", 1.0),)  # the share of the wanted answers in the completion
    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "constant"
    return c
