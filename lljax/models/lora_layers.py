"""The low-rank update of one linear layer, of the embedding and of the head.

Hu et al. 2021, arXiv 2106.09685: W + (alpha / rank) A B; rank-stabilized scale alpha / sqrt(rank):
Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lljax.errors import ConfigError
from lljax.models.declare import LoraWeight, declare
from lljax.models.flops import TokenFlops, token_flops, weight_flops
from lljax.models.linear import Linear


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Settings of one adapter: fields of `config.lora`, and the seed of the run."""

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    init: str = "default"
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Lora(nnx.Module):
    """The update scale * dropout(x) @ A @ B of one linear layer; A [in, R], B [R, out], one of each
    per layer of a stack.

    With `dora` there is a magnitude [out] too, and the kernel W of the layer becomes magnitude * V
    / |V| with V = W + scale * A B and |V| the norms of its columns, over the inputs.
    """

    def __init__(self, linear: Linear, settings: LoraSettings):
        kernel, rank = linear.kernel, settings.rank
        *layers, D, F = kernel.get_value().shape
        axes, name = kernel.get_metadata("axes"), kernel.get_metadata("hf").removesuffix(".weight")
        if settings.init != "default" and rank > min(D, F):
            raise ConfigError(
                f"lora.rank={rank} and lora.init={settings.init!r}: {name.format(layer=0)} is "
                f"[{F}, {D}] and has no more than {min(D, F)} directions: use a lower rank "
                "(lora.rank_pattern for it alone) or 'default'"
            )
        shared = {
            key: value for key, value in kernel.get_metadata().items() if key in ("layers", "part")
        }
        factor = functools.partial(declare, transpose=True, kind=LoraWeight, **shared)
        # Default: B starts at zero, so that the adapted model starts as the base; A as in PEFT,
        # uniform by fan-in.
        self.a = factor(
            (*layers, D, rank),
            axes=(*axes[:-1], "rank"),
            hf=f"{name}.lora_A.weight",
            role="lora_a",
            init="he_uniform",
        )
        self.b = factor(
            (*layers, rank, F),
            axes=(*axes[:-2], "rank", axes[-1]),
            hf=f"{name}.lora_B.weight",
            role="lora_b",
            init="zeros",
        )
        self.magnitude = (
            declare(
                (*layers, F),
                axes=(*axes[:-2], axes[-1]),
                hf=f"{name}.lora_magnitude_vector",
                role="lora_magnitude",
                init="norms",
                kind=LoraWeight,
                **shared,
            )
            if settings.dora
            else None
        )
        self.turned = not kernel.get_metadata("transpose")  # HF stores [in, out], as we do
        self.rank, self.alpha, self.rslora = rank, settings.alpha, settings.rslora
        self.dropout, self.scale = settings.dropout, settings.scale
        self.init, self.seed = settings.init, settings.seed  # see lljax.models.adapter_init
        # The layers of a model drop different units.
        self.salt = zlib.crc32(name.encode()) + shared.get("part", (0,))[0]

    def __call__(
        self,
        x: Float[Array, "... I"],
        y: Float[Array, "... O"],
        kernel: jax.Array,
        dropout_key: jax.Array | None,
        dot: Callable = jnp.matmul,
    ) -> Float[Array, "... O"]:
        """The output of the adapted kernel. y: dot(x, kernel). No dropout without a key."""
        dropped = _dropped(x, self.dropout, self.salt, dropout_key)
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        update = dot(dot(dropped, a), b) * self.scale
        if self.magnitude is None:
            return y + update
        # As in PEFT: the norms are constants to the gradient (section 4.3), and dropout applies to
        # the input of W too.
        ratio = self.magnitude[...] / jax.lax.stop_gradient(column_norms(kernel, a, b, self.scale))
        base = y if dropped is x else dot(dropped, kernel)
        # float32: near 1 bfloat16 has steps of 1/256 and would round the ratio to them.
        return (y + (ratio - 1) * base + ratio * update).astype(x.dtype)


class TableLora(nnx.Module):
    """The update of the embedding or of the head, both [V, D].

    Embedding: scale * A @ B with A [V, R], B [R, D]; PEFT starts A at zero and B normal, and has no
    dropout. Head: scale * B @ A^T with A [D, R], B [V, R].
    """

    init = "default"
    magnitude = None

    def __init__(self, table: nnx.Variable, settings: LoraSettings):
        (V, D), rank = table.get_value().shape, settings.rank
        name = table.get_metadata("hf").removesuffix(".weight")
        factor = functools.partial(declare, kind=LoraWeight)
        self.turned = table.get_metadata("role") == "embed"  # [V, D] is [in, out] there
        if self.turned:
            self.a = factor(
                (V, rank),
                axes=("vocab", "rank"),
                hf=f"{name}.lora_embedding_A",
                role="lora_a",
                init="zeros",
                transpose=True,
            )
            self.b = factor(
                (rank, D),
                axes=("rank", "embed"),
                hf=f"{name}.lora_embedding_B",
                role="lora_b",
                init="unit_normal",
                transpose=True,
            )
        else:
            self.a = factor(
                (D, rank),
                axes=("embed", "rank"),
                hf=f"{name}.lora_A.weight",
                role="lora_a",
                init="he_uniform",
                transpose=True,
            )
            self.b = factor(
                (V, rank),
                axes=("vocab", "rank"),
                hf=f"{name}.lora_B.weight",
                role="lora_b",
                init="zeros",
            )
        self.rank, self.alpha, self.rslora = rank, settings.alpha, settings.rslora
        self.dropout, self.scale = settings.dropout, settings.scale
        self.salt = zlib.crc32(name.encode())

    def of_rows(self, rows: Float[Array, "B T R"]) -> Float[Array, "B T D"]:
        """The update of the embeddings of tokens, given their rows of A."""
        return rows @ self.b[...].astype(rows.dtype) * self.scale

    def before_head(
        self, hidden: Float[Array, "... D"], dropout_key: jax.Array | None
    ) -> tuple[Float[Array, "... R"], Float[Array, "V R"]]:
        """Two arrays whose product is the update of the logits of `hidden`."""
        dropped = _dropped(hidden, self.dropout, self.salt, dropout_key)
        return dropped @ self.a[...].astype(hidden.dtype) * self.scale, self.b[...]

    def token_flops(self) -> TokenFlops:
        """The rows of an embedding's A are looked up, not multiplied."""
        return weight_flops(self.b) if self.turned else token_flops(self)


def _dropped(
    x: Float[Array, "... D"], dropout: float, salt: int, key: jax.Array | None
) -> Float[Array, "... D"]:
    """`x` itself without a key."""
    if not dropout or key is None:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - dropout, x.shape)
    return jnp.where(keep, x / (1 - dropout), 0)


def column_norms(
    kernel: Float[Array, "... I O"],
    a: Float[Array, "... I R"],
    b: Float[Array, "... R O"],
    scale: float,
) -> Float[Array, "... O"]:
    """The norms, over the inputs, of kernel + scale * a @ b, float32.

    The square is expanded, so that no second array of the size of the kernel exists.
    """
    wide = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    of_kernel = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)
    cross = jnp.sum(wide("...DR,...DF->...RF", a, kernel) * b, axis=-2)
    # float32, because XLA:GPU would fuse a bfloat16 product with the one above
    of_a = wide("...DR,...DS->...RS", *[a.astype(jnp.float32)] * 2)
    of_update = jnp.sum(wide("...RS,...SF->...RF", of_a, b) * b, axis=-2)
    squares = of_kernel + 2 * scale * cross + scale**2 * of_update
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
