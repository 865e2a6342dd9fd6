"""Layers and experts that the Qwen families share."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lljax.models.families.family import first_set, local_layers, sliding_window, uniform_layers
from lljax.models.spec import LayerSpec, MoESpec
from lljax.models.values import FLAG, list_of, optional, whole

WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
WINDOW_CHECKS = {"use_sliding_window": FLAG, "max_window_layers": whole(0)}
EXPERT_DEFAULTS = {"norm_topk_prob": False, "decoder_sparse_step": 1}
EXPERT_CHECKS = {
    "norm_topk_prob": FLAG,
    "decoder_sparse_step": whole(1),
    "mlp_only_layers": optional(list_of(whole(0))),
}


def upper_layers_slide(c: dict) -> tuple[LayerSpec, ...]:
    """A sliding window from layer `max_window_layers` on, see `sliding_layers`."""
    return sliding_layers(c, lambda i: i >= c["max_window_layers"])


def sliding_layers(c: dict, default: Callable[[int], Any]) -> tuple[LayerSpec, ...]:
    """A sliding window in the layers that `layer_types` names, or default(layer) is true of, if
    `use_sliding_window` is on.
    """
    if not c["use_sliding_window"]:
        return uniform_layers(c, LayerSpec())
    window = sliding_window(c)
    return tuple(
        LayerSpec(window=window if slides else None) for slides in local_layers(c, default)
    )


def sparse_layers(c: dict, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Experts in every `decoder_sparse_step`-th layer, except `mlp_only_layers`."""
    dense, step = c.get("mlp_only_layers") or (), c["decoder_sparse_step"]
    return tuple(
        dataclasses.replace(layer, moe=i not in dense and (i + 1) % step == 0)
        for i, layer in enumerate(layers)
    )


def softmax_experts(c: dict, *, shared: int = 0) -> MoESpec:
    """Experts weighted by a softmax of the router; shared: MLP width of the gated shared expert."""
    return MoESpec(
        E=first_set(c, "num_experts", "num_local_experts"),
        k=first_set(c, "num_experts_per_tok"),
        F=first_set(c, "moe_intermediate_size"),
        normalize=c["norm_topk_prob"],
        shared_name="shared_expert",
        shared_gate=shared > 0,
        shared=shared,
    )
