"""The runs of longlora.py: one thing changed at a time."""

import argparse
import dataclasses
from typing import Any

from lljax.attention.pattern import KINDS, AttentionPattern
from lljax.config import Config, default_config

BASE, LENGTHS = "lljax/assets/tiny-512", (512, 1024, 2048, 4096)
TASKS, SAMPLES = ("passkey/tokens", "ruler/niah_single_2_local"), 10
WRITTEN = 16  # new tokens at most; RULER has 128, and the answer stands in the first
DOCUMENTS = 5  # held-out ones of more than 4,096 tokens
TRAINED = {
    "full fine-tuning": None,
    "LoRA": (),
    "LoRA+norm": ("norm",),
    "LoRA+embed": ("embed",),
    "LoRA+embed+norm": ("embed", "norm"),
}
# by the RoPE they are measured under
BASES = {"keep": "base", "linear": "base, linear", "yarn": "base, YaRN"}
ATTENTION = {"full": "full", "S2": "shifted", "S2 unshifted": "unshifted", "window": "window"}
MAIN = "YaRN, S2"  # LoRA+embed+norm, rank 16, groups of 1/4


def unshifted(context: Config, length: int, markers: tuple[int, ...]) -> AttentionPattern:
    """All heads in the same groups: the ablation of the paper's table 6."""
    return dataclasses.replace(KINDS["shifted"](context, length, markers), shift=False)


# A kind of this measurement alone: it costs as much as S2-Attn and is worse.
KINDS["unshifted"] = unshifted


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. changes: fields of the configuration that differ from MAIN. lengths: to measure at.
    retrieves: also measure retrieval.
    """

    name: str
    changes: dict[str, Any]
    lengths: tuple[int, ...] = LENGTHS
    retrieves: bool = True


def in_attention(steps: int, prefix: str, changes: dict[str, Any], **fields: Any) -> list[Run]:
    """A run in each kind of attention. fields: of Run."""
    return [
        Run(
            name=f"{prefix}, {attention}",
            changes=changes | {"context.schedule": ((steps, LENGTHS[-1], kind),)},
            **fields,
        )
        for attention, kind in ATTENTION.items()
    ]


def runs(steps: int) -> list[Run]:
    """All runs, each of `steps` times 4,096 tokens."""
    then_full = ((steps // 2, 4096, "shifted"), (steps, 4096, "full"))
    # A quarter of the tokens at 1,024, a quarter at 2,048, half at 4,096.
    ends = (steps, steps + steps // 2, 2 * steps)
    progressive = tuple((end, n, "shifted") for end, n in zip(ends, LENGTHS[1:], strict=True))
    made = [
        *in_attention(steps, "YaRN", {}),
        Run("YaRN, S2 then full", {"context.schedule": then_full}),
        Run("YaRN, S2 progressive", {"context.schedule": progressive}),
    ]
    for rank in (8, 32, 64):
        made.append(Run(f"YaRN, S2, rank {rank}", {"lora.rank": rank, "lora.alpha": 2.0 * rank}))
    for part in (2, 6, 8):
        made.append(Run(f"YaRN, S2, groups of 1/{part}", {"context.group": 1 / part}))
    for name, type in (("NTK", "dynamic"), ("linear", "linear")):
        made.append(Run(f"{name}, S2", {"context.rope.type": type}))
    for trained, roles in TRAINED.items():
        # A third of LoRA's learning rate: full fine-tuning breaks with more.
        full = {"train_type": "full", "optimizer.learning_rate": 5e-4}
        changes = {"lora.also_train": roles} if roles is not None else full
        changes["context.rope.type"] = "linear"
        made += in_attention(steps, trained, changes, lengths=LENGTHS[-1:], retrieves=False)
    return made


def config_of(run: Run, arguments: argparse.Namespace, seed: int) -> Config:
    c = default_config()
    c.seed = seed
    c.model.path, c.model.dtype, c.memory.remat = BASE, "float32", "none"
    c.context.length, c.context.rope.type = 4096, "yarn"
    c.context.window, c.context.anchors = 1024, 0
    c.context.schedule = ((arguments.steps, 4096, "shifted"),)
    c.lora.rank, c.lora.alpha, c.lora.targets = 16, 32.0, ("all-linear",)
    c.data.train, c.data.valid_fraction = (arguments.data,), 0.03
    c.optimizer.learning_rate, c.optimizer.learning_rate_ratio.embed = 1.5e-3, 0.2
    c.optimizer.warmup_steps = 4
    c.training.eval_rows = 1  # the measurement comes after training
    c.update_from_flattened_dict(run.changes)
    return c
