"""Qwen3-4B learns from rewards to follow chains of keys through documents of up to 64k tokens
(KeyChain, LoongRL, arXiv 2510.19363). A document is read once for all answers to it.

lljax data tasks --tasks=keychain,ruler/vt --model=Qwen/Qwen3-4B --lengths=8k,16k,32k,60k \
    --examples=500 --out=data/keychain.jsonl
lljax align --config=configs/grpo_keychain.py --workdir=runs/grpo_keychain
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "Qwen/Qwen3-4B"
    c.objective.name = "dapo"  # every token counts alike: no bias to short answers
    c.objective.clip_high = 0.28  # DAPO's
    c.objective.mask_truncated = True  # an answer that was cut off teaches nothing
    c.context.length = 65_536  # tokens the adapter is trained to read
    c.context.schedule = (  # (until_step, length, attention): the documents grow
        (100, 20_480, "full"),
        (300, 40_960, "full"),
        (500, 65_536, "full"),
    )
    c.context.rope.type = "yarn"  # Qwen3's own recipe beyond its trained context
    c.lora.rank = 32
    c.lora.alpha = 64.0  # twice the rank
    c.lora.targets = ("all-linear",)
    c.lora.also_train = ()  # the adapter alone: vLLM serves it
    c.data.train = ("data/keychain.jsonl",)
    c.data.overlong = "drop"  # of a stage: longer prompts wait for the next
    c.training.accumulate = 8  # rows a step: as many prompts as fit with their answers
    c.training.eval_every = 50  # steps
    c.training.eval_tasks = (("keychain", 65_536),)
    c.rollout.answers = 8  # to each prompt
    c.rollout.tokens = 512  # tokens of an answer at most
    c.rollout.updates = 2  # optimizer steps on each rollout
    c.rollout.log = "rewards"
    c.reward.functions = (("contains", 1.0), ("repetition?ngram_size=4", 0.1))
    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "constant"
    c.memory.offload = True  # residuals wait in host memory
    c.memory.tile = 4_096  # tokens that go through the MLP at a time
    return c
