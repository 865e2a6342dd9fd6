"""Qwen3-8B prefers what a document of up to 64k tokens says: DPO on pairs whose rejected answer
stands elsewhere in the same document. The document is read once for both answers.

lljax data preferences --tasks=keychain,needle,ruler/vt --model=Qwen/Qwen3-8B \
    --lengths=8k,16k,32k,63k --examples=250 --out=data/preferences.jsonl
lljax align --config=configs/dpo_longdocs.py --workdir=runs/dpo_longdocs
"""

from lljax.config import Config, default_config


def get_config() -> Config:
    c = default_config()
    c.model.path = "Qwen/Qwen3-8B"
    c.objective.name = "dpo"
    c.objective.beta = 0.1  # strength of the tie to the reference, the model with the adapter off
    c.objective.sft_weight = 0.2  # keeps the chosen answers likely, as in RPO
    c.context.length = 65_536  # tokens the adapter is trained to read
    c.context.schedule = (  # (until_step, length, attention)
        (200, 16_384, "full"),
        (500, 65_536, "full"),
    )
    c.context.rope.type = "yarn"  # Qwen3's own recipe beyond its trained context
    c.lora.rank = 32
    c.lora.alpha = 64.0  # twice the rank
    c.lora.targets = ("all-linear",)
    c.lora.also_train = ()  # the adapter alone: vLLM serves it
    c.data.train = ("data/preferences.jsonl",)
    c.data.valid_fraction = 0.05  # share of the pairs held out
    c.data.overlong = "drop"  # a prompt is never split
    c.optimizer.learning_rate = 2e-5
    c.training.accumulate = 4  # rows an optimizer step, one at a time
    c.training.eval_every = 100  # steps
    c.memory.offload = True  # residuals wait in host memory
    c.memory.tile = 4_096  # tokens that go through the MLP at a time
    return c
