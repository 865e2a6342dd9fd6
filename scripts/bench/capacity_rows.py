"""Runs of Llama-3.1-8B and of Qwen3.5 at length, which capacity.py plans; steps.py steps through
those of Llama.

One row of tokens a step, AdamW in float32 or, if a row says so, in eight bits. LoRA of rank 64 on
q, k, v and o over a frozen bfloat16 base; over a quantized base, for preference and policy
objectives, and for Qwen3.5, of rank 32 on every linear layer. A policy writes 8 answers of 1,024
tokens.
"""

import dataclasses
from pathlib import Path
from typing import Any

import common

from lljax.config import Config, validate
from lljax.interop.folder import read_json
from lljax.interop.multimodal import text_model
from lljax.objectives.table import OBJECTIVES

K, M = 1024, 1024**2
LLAMA, QWEN_9B = "llama-3.1-8b", "qwen3.5-9b"
QWEN_35B, QWEN_397B = "qwen3.5-35b-a3b", "qwen3.5-397b-a17b"
SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


@dataclasses.dataclass(frozen=True)
class Row:
    """One run.

    attention: of the stage; shifted in groups of 8,192. each: memory.layers_per_residual. find:
    search for the longest row that fits, from `length` on. base: model.quantize, or "trained":
    train_type="full". tile: memory.tile, and four times memory.loss_chunk. optimizer: its name.
    objective: its name. cache: rollout.cache. model: a key of MODELS.
    """

    device: str
    length: int
    attention: str
    each: int = 1
    find: bool = False
    base: str = "none"
    tile: int = 4096
    optimizer: str = "adamw"
    objective: str = "sft"
    cache: str = "auto"
    model: str = LLAMA

    @property
    def name(self) -> str:
        objective = self.objective if self.objective != "sft" else ""
        base = self.base if self.base != "none" else ""
        cache = self.cache if self.cache != "auto" else ""
        length = f"{self.length // K}k"
        model = self.model if self.model != LLAMA else ""
        words = (model, self.device, objective, self.attention, length, base, cache)
        return " ".join(word for word in words if word)


ROWS = (
    Row("h100-80g", 512 * K, "full"),
    Row("h100-80g", 288 * K, "shifted"),
    Row("h100-80g", 768 * K, "shifted"),
    Row("h100-80g", 2 * M, "shifted", each=4),
    Row("h100-80g:8", 4 * M, "full", each=4),
    Row("a10-24g", 64 * K, "full", find=True),
    Row("v5e-8", 512 * K, "full"),
    Row("v5e-8", 1 * M, "shifted"),
    Row("v5p-8", 2 * M, "full", each=2),
    Row("v5e-1", 32 * K, "full"),
    Row("h100-80g", 1 * M, "full", each=2, base="nf4"),
    Row("a10-24g", 128 * K, "full", base="nf4"),
    Row("rtx4080-16g", 64 * K, "full", base="nf4"),
    Row("rtx4060-8g", 8 * K, "full", base="nf4-double", tile=1024, optimizer="adamw8bit"),
    Row("v5e-1", 32 * K, "full", base="nf4"),
    Row("h100-80g", 32 * K, "full", base="trained"),
    Row("h100-80g", 32 * K, "shifted", base="nf4"),
    Row("h100-80g", 32 * K, "shifted"),
    Row("h100-80g", 32 * K, "full"),
    Row("h100-80g", 512 * K, "full", objective="grpo", cache="int8"),
    Row("h100-80g", 512 * K, "full", base="nf4", objective="grpo"),
    Row("h100-80g", 1 * M, "full", each=2, base="nf4", objective="grpo", cache="int8"),
    Row("a10-24g", 128 * K, "full", base="nf4", objective="grpo", cache="int8"),
    Row("v5e-8", 256 * K, "full", objective="grpo", cache="int8"),
    Row("h100-80g", 512 * K, "full", objective="dpo"),
    Row("h100-80g", 768 * K, "full", each=2, base="nf4", objective="dpo"),
    Row("h100-80g", 1 * M, "shifted", each=2, model=QWEN_9B),
    Row("h100-80g", 512 * K, "full", each=2, model=QWEN_9B),
    Row("a10-24g", 256 * K, "shifted", each=1, base="nf4", model=QWEN_9B),
    Row("v5e-8", 64 * K, "shifted", model=QWEN_9B),
    Row("v5e-8", 256 * K, "shifted", model=QWEN_9B),
    Row("v5e-8", 1 * M, "shifted", model=QWEN_9B),
    Row("v5e-8", 1 * M, "full", model=QWEN_9B),
    Row("v5e-8", 2 * M, "shifted", each=4, model=QWEN_9B),
    Row("h100-80g", 256 * K, "full", base="nf4", model=QWEN_35B),
    Row("v5e-8", 256 * K, "full", base="nf4", model=QWEN_35B),
    Row("v5p-128", 32 * K, "full", model=QWEN_397B),
)


def model_of(row: Row) -> dict[str, Any]:
    """The config.json of the model of a row."""
    if row.model == LLAMA:
        return common.LLAMA_3_8B
    return text_model(read_json(SHAPES / row.model / "config.json"))[0]


def config_of(row: Row) -> Config:
    """The configuration of a row, validated."""
    c = common.plan_config(row.length, row.attention)
    c.context.group = 8192
    c.lora.rank, c.lora.alpha, c.lora.also_train = 64, 128.0, ()
    if row.base == "trained":
        c.train_type = "full"
    elif row.base != "none":
        c.model.quantize, c.lora.rank, c.lora.targets = row.base, 32, ("all-linear",)
    if row.model != LLAMA:
        c.lora.rank, c.lora.targets = 32, ("all-linear",)
    if row.objective != "sft":
        c.objective.name, c.data.overlong = row.objective, "drop"
        c.lora.rank, c.lora.targets = 32, ("all-linear",)
    c.memory.tile, c.memory.offload, c.memory.layers_per_residual = row.tile, True, row.each
    c.memory.loss_chunk, c.optimizer.name = row.tile // 4, row.optimizer
    c.mesh.fsdp, c.mesh.sequence = 1, -1
    if OBJECTIVES[row.objective].samples:
        c.rollout.answers, c.rollout.tokens, c.rollout.cache = 8, 1 * K, row.cache
        c.mesh.sequence, c.mesh.tensor = 1, -1
    validate(c)
    return c
