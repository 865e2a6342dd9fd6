"""Low-rank adapters: which linear layers get one, and which other weights train beside them.

Hu et al. 2021, arXiv 2106.09685: W + (alpha / rank) A B; rank-stabilised scale alpha / sqrt(rank): Kalajdzievski 2023,
arXiv 2312.03732. Training embeddings and norms as well: LongLoRA, arXiv 2309.12307, section 3.3.
"""

import math
import re
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.errors import ConfigError
from lljax.models.declare import LoraWeight, declare, declared
from lljax.models.layers import Linear

ROLES = ("embed", "norm", "head")            # what may train whole beside the factors


class Lora(nnx.Module):
    """The update scale * dropout(x) @ A @ B of one linear layer; A [in, R], B [R, out], one of each per layer."""

    def __init__(self, linear: Linear, *, rank: int, alpha: float, rslora: bool, dropout: float):
        kernel = linear.kernel
        *layers, D, F = kernel.get_value().shape
        axes, name = kernel.get_metadata("axes"), kernel.get_metadata("hf").removesuffix(".weight")
        held = {name: value for name, value in kernel.get_metadata().items() if name in ("layers", "part")}
        # B starts at zero, so that the adapted model starts as the base; A as in PEFT, uniform by fan-in.
        self.a = declare((*layers, D, rank), axes=(*axes[:-1], "rank"), hf=f"{name}.lora_A.weight", role="lora_a",
                         init="he_uniform", transpose=True, kind=LoraWeight, **held)
        self.b = declare((*layers, rank, F), axes=(*axes[:-2], "rank", axes[-1]), hf=f"{name}.lora_B.weight",
                         role="lora_b", init="zeros", transpose=True, kind=LoraWeight, **held)
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        # Layers of one model drop different units.
        self.salt = zlib.crc32(name.encode()) + held.get("part", (0,))[0]

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None, dot=jnp.matmul) -> jax.Array:
        """x [..., in] -> [..., out]. No dropout without a key. dot: the product with a factor."""
        if self.dropout and dropout_key is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(dropout_key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return dot(dot(x, self.a[...].astype(x.dtype)), self.b[...].astype(x.dtype)) * self.scale


def attach(model: nnx.Module, *, rank: int, alpha: float, targets, rslora: bool = False, dropout: float = 0.0,
           also_train=()) -> None:
    """Gives every linear layer that `targets` name a `Lora`, and marks what trains: the factors and `also_train`.

    A target is a short name ("q_proj"), a regular expression over the dotted name ("self_attn\\.[qv]_proj"), or
    "all-linear". The model is changed in place; new Variables are abstract until initialised or loaded.

    Raises:
      ConfigError: a target or a role matches nothing; the line lists the candidates.
    """
    linears = list(linear_layers(model))
    for target in targets:
        chosen = [linear for name, linear in linears if matches(target, name)]
        if not chosen:
            names = ", ".join(dict.fromkeys(name for name, _ in linears))
            raise ConfigError(f"lora.targets: {target!r} matches no linear layer; there are {names}")
        for linear in chosen:
            linear.lora = Lora(linear, rank=rank, alpha=alpha, rslora=rslora, dropout=dropout)
    roles = {variable.get_metadata("role") for _, variable in declared(model)}
    for role in also_train:
        if role not in ROLES:
            raise ConfigError(f"lora.also_train: {role!r} is none of {', '.join(ROLES)}")
        if role not in roles:
            raise ConfigError(f"lora.also_train: this model has no {role!r} of its own (its head is the embedding): "
                              "name 'embed' instead")
    mark_trainable(model, {"lora_a", "lora_b", *also_train})


def mark_trainable(model: nnx.Module, roles=None) -> None:
    """Marks the Variables of these roles (None: all) as trainable, and all others as frozen."""
    for _, variable in declared(model):
        variable.set_metadata(trainable=roles is None or variable.get_metadata("role") in roles)


def is_trainable(path, variable) -> bool:
    """An nnx filter: `nnx.split(model, is_trainable, ...)` gives (graphdef, trainable, frozen)."""
    return isinstance(variable, nnx.Variable) and variable.get_metadata().get("trainable", False)


def linear_layers(model: nnx.Module):
    """(dotted name, module) of every linear layer that can be adapted, for example "self_attn.q_proj". A name comes once
    for each stack of layers, and stands for all experts of a layer."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            kernel = module.kernel.get_metadata()
            name = kernel["hf"].removesuffix(".weight").removeprefix("model.layers.{layer}.").replace(".{expert}", "")
            yield (f"{name.rpartition('.')[0]}.{path[-1]}" if "part" in kernel else name), module


def matches(target: str, name: str) -> bool:
    """As in PEFT: a short name, or a regular expression over the whole name, with "model.layers.0." in front or not."""
    return target in ("all-linear", name.rpartition(".")[2]) or \
        any(re.fullmatch(target, full) for full in (name, f"model.layers.0.{name}"))
