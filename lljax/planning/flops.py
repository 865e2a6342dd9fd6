"""Arithmetic of a training step, counted from the model's shapes. A product of [a, b] and [b, c] is
2abc FLOPs.

Model FLOPs are what the mathematics needs; hardware FLOPs add what is computed again to save
memory. Causal attention counts the pairs that are visible, half of T x T, as MaxText and the field
do.
"""

import dataclasses
import math

from lljax.models.declare import declared
from lljax.models.quantize import Quantised
from lljax.objectives.objective import ONE_OF_EACH, Passes


@dataclasses.dataclass(frozen=True)
class Flops:
    model: float
    hardware: float


def visible_pairs(pattern, T: int, window: int | None = None, chunked: bool = False) -> float:
    """Pairs of a query and a visible key in a row of T tokens of one document, of an average head.
    window, chunked: of the layer, see LayerSpec.
    """
    if pattern.kind == "shifted":
        G = min(pattern.group, T)
        return T * (G + 1) / 2
    if chunked and window < T:
        chunks, rest = divmod(T, window)
        return chunks * visible_pairs(pattern, window) + (
            visible_pairs(pattern, rest) if rest else 0
        )
    W = min(w for w in (window, pattern.window or None, T) if w)
    anchors = min(pattern.anchors, T - W) if pattern.kind == "window" else 0
    return W * (W + 1) / 2 + (T - W) * W + (T - W) * anchors


def of_step(model, config, stage, *, parts: int = 1, passes: Passes = ONE_OF_EACH) -> Flops:
    """Of one optimizer step on all devices. `model` may be abstract, with its trainable Variables
    marked. parts: devices that a row is spread over.
    """
    spec, T, memory = model.spec, stage.length, config.memory
    rows = config.training.rows * config.training.accumulate
    forward = backward = last = 0.0  # per token, in the layers
    head = trained_head = 0.0
    for _, variable in declared(model):
        role, shape = variable.get_metadata("role"), variable.get_value().shape
        size = 2.0 * math.prod(shape)
        # No gradient of a quantised weight is formed; what stands for it, a few hundredths of one,
        # is not counted.
        trains = variable.get_metadata().get("trainable", False) and not isinstance(
            variable.get_value(), Quantised
        )
        if "experts" in variable.get_metadata("axes"):
            size *= spec.moe.k / spec.moe.E  # a token takes the k best
        looked_up = "lora_embedding_A" in variable.get_metadata("hf")
        if role in ("kernel", "lora_a", "lora_b", "router") and not looked_up:
            forward += size
            # of the input, and of the weight where it trains
            backward += size * (2 if trains else 1)
            last += (
                size
                if variable.get_metadata("hf").endswith(
                    (".down_proj.weight", ".down_proj", ".w2.weight")
                )
                else 0.0
            )
        elif role == "head" or (role == "embed" and model.lm_head is None):
            head, trained_head = size, size if trains else 0.0
    pairs = (
        sum(visible_pairs(stage.pattern, T, layer.window, layer.chunked) for layer in spec.layers)
        * spec.N
    )
    # Scores, and their product with the values, forward.
    attention = 2 * pairs * (spec.H + (spec.mla.v if spec.mla else spec.H))
    model_flops = rows * (T * (forward + backward + 2 * head + trained_head) + 3 * attention)
    # A tile computes its inner values again, attention among them where the tile holds a whole
    # layer; with remat that is the only time. No gradient needs the value of a layer's last
    # product.
    again, tiled = 0.0, 0 < memory.tile < T // parts
    windowed = stage.pattern.kind != "full" or any(layer.window for layer in spec.layers)
    if memory.remat != "none" or tiled:
        again = T * (forward - last)
    if memory.remat == "full" or (memory.remat == "none" and tiled and windowed):
        again += attention
    if memory.layers_per_residual > 1:
        again += T * forward + attention
    if parts > 1:  # the slices of the head go round twice
        again += T * head
    # Flash attention's backward pass computes the scores once more.
    hardware = model_flops + rows * (again + attention / 2)
    # Passes of the objective beyond one forward and one backward; the backward pass recomputes.
    ahead = rows * (T * (forward + head) + attention)
    more = passes.forward - passes.backward
    return Flops(
        passes.backward * model_flops + more * ahead, passes.backward * hardware + more * ahead
    )
