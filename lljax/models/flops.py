"""FLOPs of a forward and a backward pass, as the modules of a model count them. A product of
[a, b] and [b, c] is 2abc FLOPs.
"""

import dataclasses
import math

from flax import nnx

from lljax.models.declare import declared
from lljax.models.quantize import Quantized

MULTIPLIED = ("kernel", "lora_a", "lora_b", "router")  # roles of the matrices that tokens multiply


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """Products of one token with weights.

    forward: products of the forward pass.
    backward: gradients of the input, and of the weights that train.
    unread: the part of `forward` whose result no gradient reads; rematerialization skips it.
    """

    forward: float = 0.0
    backward: float = 0.0
    unread: float = 0.0

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        return TokenFlops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.unread + other.unread,
        )

    def scaled(self, share: float) -> "TokenFlops":
        return TokenFlops(self.forward * share, self.backward * share, self.unread * share)


@dataclasses.dataclass(frozen=True)
class RowFlops:
    """Products between the tokens of one row, in one layer.

    forward, backward: products of each pass. recomputed: forward products that the backward pass of
    the operation repeats by itself. streamed: whether the layer can run a tile at a time
    (`Mixer.first_carry`); the backward pass then computes each tile again.
    """

    forward: float
    backward: float
    recomputed: float
    streamed: bool


def token_flops(module: nnx.Module) -> TokenFlops:
    """Products of one token with every matrix declared below `module`, of all stacked layers.

    The gradient of a quantized weight is never formed. The low-rank probe in its place
    (lljax.models.probe) costs a few hundredths and is not counted.
    """
    return sum(
        (
            weight_flops(variable)
            for _, variable in declared(module)
            if variable.get_metadata("role") in MULTIPLIED
        ),
        TokenFlops(),
    )


def weight_flops(variable: nnx.Variable) -> TokenFlops:
    """The product of one token with this weight."""
    value = variable.get_value()
    size = 2.0 * math.prod(value.shape)
    trains = variable.get_metadata().get("trainable", False)
    with_gradient = trains and not isinstance(value, Quantized)
    return TokenFlops(forward=size, backward=size * (2 if with_gradient else 1))
