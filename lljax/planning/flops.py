"""Arithmetic of a training step. A product of [a, b] and [b, c] is 2abc FLOPs.

The modules of the model count their own products (lljax.models.flops). Model FLOPs are required by
the mathematics; hardware FLOPs add the products that are computed again to save memory.
"""

import dataclasses

from lljax.config import Config
from lljax.models.decoder import Decoder
from lljax.objectives.objective import ONE_OF_EACH, Passes
from lljax.training.curriculum import Stage


@dataclasses.dataclass(frozen=True)
class Flops:
    model: float
    hardware: float


def of_step(
    model: Decoder, config: Config, stage: Stage, *, parts: int = 1, passes: Passes = ONE_OF_EACH
) -> Flops:
    """FLOPs of one optimizer step on all devices. Attention is counted over rows of one document:
    an upper bound for packed rows, and for answers that share a prompt and do not see each other.

    model: may be abstract, with its trainable Variables marked.
    parts: devices that a row is spread over.
    passes: the passes of the objective.
    """
    T, memory = stage.length, config.memory
    rows = config.training.rows * config.training.accumulate
    tokens, head = model.token_flops(), model.head_flops()
    mixed = model.row_flops(T, stage.pattern)
    mixing = sum(layer.forward for layer in mixed)
    model_flops = rows * (
        T * (tokens.forward + tokens.backward + head.forward + head.backward)
        + mixing
        + sum(layer.backward for layer in mixed)
    )
    # A tile computes its inner values again, and mixes again if it runs the whole layer; with
    # rematerialization that is the only time.
    again, tiled = 0.0, 0 < memory.tile < T // parts
    streamed = tiled and any(layer.streamed for layer in mixed)
    if memory.remat != "none" or tiled:
        again = T * (tokens.forward - tokens.unread)
    if memory.remat == "full" or (memory.remat == "none" and streamed):
        again += mixing
    if memory.layers_per_residual > 1:
        again += T * tokens.forward + mixing
    if parts > 1:  # the slices of the head go round twice
        again += T * head.forward
    again += sum(layer.recomputed for layer in mixed)
    hardware = model_flops + rows * again
    # Passes of the objective beyond one forward and one backward; the backward pass recomputes.
    ahead = rows * (T * (tokens.forward + head.forward) + mixing)
    more = passes.forward - passes.backward
    return Flops(
        model=passes.backward * model_flops + more * ahead,
        hardware=passes.backward * hardware + more * ahead,
    )
