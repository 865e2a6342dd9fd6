"""The formats of an export, and the models that each cannot hold."""

from collections.abc import Mapping, Set
from typing import Any

from lljax.config.tree import value_or_default

# Properties of a trained model that some format cannot hold.
NO_ADAPTER, OWN_KERNELS, DORA, SEVERAL = "no adapter", "own kernels", "dora", "several scales"
TEXT = "a base that is a text model"
_TRAINED_WHOLE = "it exports an adapter, and this run trained every weight: use --format=merged"
BEYOND_PLAIN_LORA = {DORA: "the magnitudes of DoRA", SEVERAL: "several ranks or scales"}
REFUSALS: dict[str, dict[str, str]] = {  # by format and property: the reason and the way out
    "peft": {
        NO_ADAPTER: _TRAINED_WHOLE,
        OWN_KERNELS: "the kernels that lora.init='loftq' quantized are in no base that PEFT could "
        "load: use --format=split, which writes them too, or --format=merged",
    },
    "merged": {},
    "split": {
        NO_ADAPTER: _TRAINED_WHOLE,
        **{
            name: f"it is for servers that take plain LoRA, and this adapter has {what}: use "
            "--format=merged or --format=peft"
            for name, what in BEYOND_PLAIN_LORA.items()
        },
    },
    "whole": {
        TEXT: "it writes a multimodal model with the trained text model in it, and this base is a "
        "text model: use --format=merged"
    },
    "w4a16": {},
    "w8a16": {},
    "fp8": {},
    "gguf": {},
    "gguf_lora": {
        NO_ADAPTER: _TRAINED_WHOLE.replace("merged", "gguf"),
        **{
            name: f"llama.cpp's adapters hold factors alone, and this one has {what}: use "
            "--format=gguf"
            for name, what in (
                (OWN_KERNELS, "kernels of its own"),
                (DORA, BEYOND_PLAIN_LORA[DORA]),
            )
        },
    },
}


def refusal(format: str, properties: Set[str]) -> str:
    """The reason why `format` cannot hold a model with these properties; or an empty text."""
    return next((why for name, why in REFUSALS[format].items() if name in properties), "")


def formats(config: Mapping[str, Any]) -> list[str]:
    """The formats that hold the model of a run. config: its configuration as nested mappings.

    Ranks or alphas by pattern count as several: only a model shows which of them are matched. The
    base counts as a text model.
    """
    trained, targets, init, dora, ranks, alphas = (
        value_or_default(config, field)
        for field in (
            "train_type",
            "lora.targets",
            "lora.init",
            "lora.dora",
            "lora.rank_pattern",
            "lora.alpha_pattern",
        )
    )
    properties = {
        NO_ADAPTER: trained == "full" or not targets,
        OWN_KERNELS: init == "loftq",
        DORA: dora,
        SEVERAL: ranks or alphas,
        TEXT: True,
    }
    held = {name for name, holds in properties.items() if holds}
    return [format for format in REFUSALS if not refusal(format, held)]
