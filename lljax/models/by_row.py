"""Several models in one batch, each row under its own: adapters of one base, also with norms,
embedding, head and RoPE of their own.

The rows share every product with a weight of the base; each has its factors (Chen et al. 2023,
Punica, arXiv 2310.18547; Sheng et al. 2023, S-LoRA, arXiv 2311.03285).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.linear import Linear, RMSNorm
from lljax.models.lora_layers import Lora, LoraSettings
from lljax.models.spec import DecoderSpec
from lljax.models.tables import Tables


class CannotMix(Exception):
    """Two models cannot share a batch; the message says why."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """A weight [A, ...] of A models, small enough that every row of a batch gets a copy of its own.

    A factor becomes [B, in, out], the weight of a norm [B, D].
    """

    values: Float[Array, "A ..."]

    def of_rows(self, models: Int[Array, " B"]) -> Float[Array, "B ..."]:
        return jnp.take(self.values, models, axis=0)


def mix(models: Sequence[Decoder], dtype: Any) -> Decoder:
    """A model whose weights are those of `models`; see `of_rows` for its use. Weights that the
    models share, which must be the same arrays, are not copied.

    dtype: of the factors, the dtype of the computation.

    Raises:
      CannotMix: the models differ in more than adapters of linear layers, norms, embedding, head
        and RoPE; or they are stacked (lljax.models.by_layer).
    """
    first = models[0]
    if not all(model.by_layer for model in models):
        raise CannotMix("the layers are stacked")
    skeleton = _skeleton(first, first.spec)
    if any(_skeleton(model, first.spec) != skeleton for model in models):
        raise CannotMix("the models compute in another way")
    mixed = nnx.clone(first)  # its Variables, not its arrays
    modules = [dict(nnx.iter_modules(model)) for model in models]
    for path, module in list(nnx.iter_modules(mixed)):
        theirs: list[Any] = [each.get(path) for each in modules]
        if isinstance(module, RMSNorm):
            _bank(module.weight, [norm.weight.get_value() for norm in theirs])
        elif type(module) is Linear:  # experts have factors of their own kind
            module.lora = _mixed_lora(module, [linear.lora for linear in theirs], dtype)
    for name in ("embed", "lm_head"):
        if (table := getattr(mixed, name)) is not None:
            values = [getattr(model, name).get_value() for model in models]
            if not _same(values):
                table.set_value(_tables(values))
    _check_rest(mixed, models)
    return mixed


def of_rows(variables: Any, models: Int[Array, " B"]) -> Any:
    """The state of a mixed model for rows of these models, by their numbers in `mix`."""
    return jax.tree.map(
        lambda x: x.of_rows(models) if isinstance(x, Bank | Tables) else x,
        variables,
        is_leaf=lambda x: isinstance(x, Bank | Tables),
    )


def _skeleton(model: Decoder, spec: DecoderSpec) -> tuple:
    """Everything static of a model, but for what may differ: RoPE and adapters of linear layers.
    spec: of the model that it is compared with.
    """
    skeleton = nnx.clone(model)
    skeleton.spec = spec
    for _, module in list(nnx.iter_modules(skeleton)):
        if type(module) is Linear:
            module.lora = None
    for _, variable in declared(skeleton):
        variable.set_metadata({})
    without_rope = dataclasses.replace(model.spec, rope=None, more_ropes=(), max_length=0)
    return without_rope, model.spec.scale, len(model.spec.ropes), nnx.graphdef(skeleton)


def _same(values: Sequence[Any]) -> bool:
    leaves = [jax.tree.leaves(value) for value in values]
    return all(
        len(each) == len(leaves[0]) and all(x is y for x, y in zip(each, leaves[0], strict=True))
        for each in leaves
    )


def _bank(variable: nnx.Variable, values: Sequence[Any]) -> None:
    if not _same(values):
        variable.set_value(Bank(jnp.stack(values)))


def _tables(values: Sequence[Any]) -> Tables:
    tables, numbers = [], []
    for value in values:
        number = next((i for i, table in enumerate(tables) if _same([table, value])), len(tables))
        tables += [value] if number == len(tables) else []
        numbers.append(number)
    return Tables(tuple(tables), jnp.asarray(numbers, jnp.int32))


def _mixed_lora(linear: Linear, loras: Sequence[Lora | None], dtype: Any) -> Lora | None:
    """One adapter of the highest rank. The scale of each model is a factor of its B."""
    ranks = [lora.rank for lora in loras if lora is not None]
    if not ranks:
        return None
    if any(lora is not None and lora.magnitude is not None for lora in loras):
        raise CannotMix("DoRA divides by a norm of the whole adapted weight")
    rank = max(ranks)
    mixed = Lora(linear, LoraSettings(rank=rank, alpha=rank))
    (inputs, _), (_, outputs) = mixed.a.get_value().shape, mixed.b.get_value().shape
    a, b = [], []
    for lora in loras:
        more = rank - (lora.rank if lora else 0)
        left = lora.a[...] if lora else jnp.zeros((inputs, 0))
        right = lora.b[...] * lora.scale if lora else jnp.zeros((0, outputs))
        a.append(jnp.pad(left, ((0, 0), (0, more))).astype(dtype))
        b.append(jnp.pad(right, ((0, more), (0, 0))).astype(dtype))
    mixed.a.set_value(Bank(jnp.stack(a)))
    mixed.b.set_value(Bank(jnp.stack(b)))
    return mixed


def _check_rest(mixed: Decoder, models: Iterable[Decoder]) -> None:
    """Raises CannotMix unless every other weight is the same array in all models."""
    known = {path: variable.get_value() for path, variable in declared(mixed)}
    for model in models:
        own = {path: variable for path, variable in declared(model)}
        for path in known.keys() | own.keys():
            value = known.get(path)
            if isinstance(value, Bank | Tables):
                continue
            if path not in own or value is None or not _same([value, own[path].get_value()]):
                names = ".".join(map(str, path))
                raise CannotMix(f"{names} differs")
