"""Low-rank adapters: which linear layers get one, and which other weights train beside them.

Hu et al. 2021, arXiv 2106.09685: W + (alpha / rank) A B; rank-stabilised scale alpha / sqrt(rank):
Kalajdzievski 2023, arXiv 2312.03732. Training embeddings and norms as well: LongLoRA, arXiv
2309.12307, section 3.3. Rank and alpha of single layers, by patterns over their names, as in PEFT.
DoRA: Liu et al. 2024, arXiv 2402.09353. The embedding and an untied head can be adapted too
(`TableLora`).
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.errors import ConfigError
from lljax.models.declare import LoraWeight, declare, declared, hf_names
from lljax.models.flops import TokenFlops, token_flops, weight_flops
from lljax.models.linear import Linear
from lljax.models.patterns import matching
from lljax.models.quantize import Quantised, dequantise

FACTORS = ("lora_a", "lora_b", "lora_magnitude")
# what can be adapted beside linear layers, and its role
TABLES = {"embed_tokens": "embed", "lm_head": "head"}
ROLES = ("embed", "norm", "head")  # what may train whole beside the factors


class Lora(nnx.Module):
    """The update scale * dropout(x) @ A @ B of one linear layer; A [in, R], B [R, out], one of each
    per layer.

    With `dora` there is a magnitude [out] too, and the layer's kernel W becomes magnitude * V /
    |V|, where V = W + scale * A B and |V| are the norms of its columns (those of [in, out]: over
    the inputs).
    """

    def __init__(
        self,
        linear: Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool,
        dropout: float,
        dora: bool,
        init: str,
        seed: int,
    ):
        kernel = linear.kernel
        *layers, D, F = kernel.get_value().shape
        axes, name = kernel.get_metadata("axes"), kernel.get_metadata("hf").removesuffix(".weight")
        held = {
            name: value
            for name, value in kernel.get_metadata().items()
            if name in ("layers", "part")
        }
        if init != "default" and rank > min(D, F):
            raise ConfigError(
                f"lora.rank={rank} and lora.init={init!r}: {name.format(layer=0)} is [{F}, {D}] and has no more "
                f"than {min(D, F)} directions: use a lower rank (lora.rank_pattern for it alone) or 'default'"
            )
        # Without an `init` B starts at zero, so that the adapted model starts as the base; A as in
        # PEFT, uniform by fan-in.
        self.a = declare(
            (*layers, D, rank),
            axes=(*axes[:-1], "rank"),
            hf=f"{name}.lora_A.weight",
            role="lora_a",
            init="he_uniform",
            transpose=True,
            kind=LoraWeight,
            **held,
        )
        self.b = declare(
            (*layers, rank, F),
            axes=(*axes[:-2], "rank", axes[-1]),
            hf=f"{name}.lora_B.weight",
            role="lora_b",
            init="zeros",
            transpose=True,
            kind=LoraWeight,
            **held,
        )
        self.magnitude = (
            declare(
                (*layers, F),
                axes=(*axes[:-2], axes[-1]),
                hf=f"{name}.lora_magnitude_vector",
                role="lora_magnitude",
                init="norms",
                kind=LoraWeight,
                **held,
            )
            if dora
            else None
        )
        self.turned = not kernel.get_metadata("transpose")  # HF holds [in, out], as we do
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.init, self.seed = init, seed  # see lljax.models.adapter_init
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        # Layers of one model drop different units.
        self.salt = zlib.crc32(name.encode()) + held.get("part", (0,))[0]

    def __call__(
        self,
        x: jax.Array,
        y: jax.Array,
        kernel: jax.Array,
        dropout_key: jax.Array | None,
        dot=jnp.matmul,
    ) -> jax.Array:
        """x [..., in] and y [..., out] = dot(x, kernel) -> the output of the adapted kernel. No
        dropout without a key.
        """
        kept = _dropped(x, self.dropout, self.salt, dropout_key)
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        update = dot(dot(kept, a), b) * self.scale
        if self.magnitude is None:
            return y + update
        # As in PEFT: the norms are constants to the gradient (section 4.3), and what dropout leaves
        # of x goes through W too.
        ratio = self.magnitude[...] / jax.lax.stop_gradient(column_norms(kernel, a, b, self.scale))
        base = y if kept is x else dot(kept, kernel)
        # float32: a ratio near 1 would be one of the 256 steps that bfloat16 has there.
        return (y + (ratio - 1) * base + ratio * update).astype(x.dtype)


def _dropped(x, dropout: float, salt: int, key):
    """`x` itself without a key."""
    if not dropout or key is None:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - dropout, x.shape)
    return jnp.where(keep, x / (1 - dropout), 0)


class TableLora(nnx.Module):
    """The update of the embedding or of the head, both [V, D].

    Of the embedding: scale * A @ B with A [V, R], B [R, D]; PEFT starts A at zero and B normal, and
      has no dropout there. Of
    the head: scale * B @ A^T with A [D, R], B [V, R].
    """

    init = "default"
    magnitude = None

    def __init__(
        self, table: nnx.Variable, *, rank: int, alpha: float, rslora: bool, dropout: float
    ):
        V, D = table.get_value().shape
        name = table.get_metadata("hf").removesuffix(".weight")
        self.turned = table.get_metadata("role") == "embed"  # [V, D] is [in, out] there
        if self.turned:
            self.a = declare(
                (V, rank),
                axes=("vocab", "rank"),
                hf=f"{name}.lora_embedding_A",
                role="lora_a",
                init="zeros",
                transpose=True,
                kind=LoraWeight,
            )
            self.b = declare(
                (rank, D),
                axes=("rank", "embed"),
                hf=f"{name}.lora_embedding_B",
                role="lora_b",
                init="unit_normal",
                transpose=True,
                kind=LoraWeight,
            )
        else:
            self.a = declare(
                (D, rank),
                axes=("embed", "rank"),
                hf=f"{name}.lora_A.weight",
                role="lora_a",
                init="he_uniform",
                transpose=True,
                kind=LoraWeight,
            )
            self.b = declare(
                (V, rank),
                axes=("vocab", "rank"),
                hf=f"{name}.lora_B.weight",
                role="lora_b",
                init="zeros",
                kind=LoraWeight,
            )
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.salt = zlib.crc32(name.encode())

    def of_rows(self, rows: jax.Array) -> jax.Array:
        """What is added to the embeddings [B, T, D] of the tokens whose rows of A are [B, T, R]."""
        return rows @ self.b[...].astype(rows.dtype) * self.scale

    def before_head(self, hidden: jax.Array, dropout_key: jax.Array | None):
        """[..., R] and B [V, R], whose product is added to the logits of hidden [..., D]."""
        kept = _dropped(hidden, self.dropout, self.salt, dropout_key)
        return kept @ self.a[...].astype(hidden.dtype) * self.scale, self.b[...]

    def token_flops(self) -> TokenFlops:
        """The rows of an embedding's A are looked up, not multiplied."""
        return weight_flops(self.b) if self.turned else token_flops(self)


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The norms, over the inputs, of kernel + scale * a @ b: float32 [..., out] of [..., in, out],
    [..., in, R], [..., R, out].

    The square is multiplied out, so that no second array of the kernel's size exists.
    """
    wide = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)
    cross = jnp.sum(wide("...DR,...DF->...RF", a, kernel) * b, axis=-2)
    # in bfloat16 XLA:GPU would join it to the one above
    of_a = wide("...DR,...DS->...RS", *[a.astype(jnp.float32)] * 2)
    own = jnp.sum(wide("...RS,...SF->...RF", of_a, b) * b, axis=-2)
    return jnp.sqrt(
        jnp.maximum(squares + 2 * scale * cross + scale**2 * own, jnp.finfo(jnp.float32).tiny)
    )


def attach(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    targets,
    rslora: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    init: str = "default",
    seed: int = 0,
    rank_pattern=(),
    alpha_pattern=(),
    also_train=(),
) -> None:
    """Gives every layer that `targets` name its adapter, and marks what trains: the factors and
    `also_train`.

    A target is the end of a name ("q_proj"), a regular expression over the dotted name
    ("self_attn\\.[qv]_proj"), with "model.layers.0." in front or not, or "all-linear". The model is
    changed in place; new Variables are abstract until initialised or loaded.

    init, seed: how the factors start, see lljax.models.adapter_init; other than "default" the base
      must be read through lljax.interop.adapter_init. rank_pattern, alpha_pattern: pairs (pattern,
      value); see `of_pattern`.

    Raises:
      ConfigError: a target, a role or a pattern matches nothing (the line lists the candidates),
        some layers of those that are one array, or is no regular expression.
    """
    candidates = [(name, weight) for name, weight, _ in adaptable(model)]
    names = _targeted(candidates, tuple(targets))
    adapted = [(name, weight) for name, weight in candidates if name in names]
    for field, pairs in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for pattern, _ in pairs:
            if all(
                of_pattern([(pattern, True)], name, weight, field, None) is None
                for name, weight in adapted
            ):
                raise ConfigError(
                    f"lora.{field}: {pattern!r} matches no adapted layer; there are {', '.join(names)}"
                )
    _check_kinds(model, names, dora=dora, init=init, also_train=also_train)

    def settings(name, weight):
        return dict(
            rank=of_pattern(rank_pattern, name, weight, "rank_pattern", rank),
            rslora=rslora,
            dropout=dropout,
            alpha=float(of_pattern(alpha_pattern, name, weight, "alpha_pattern", alpha)),
        )

    for name, linear in linear_layers(model):
        if name in names:
            linear.lora = Lora(
                linear, **settings(name, linear.kernel), dora=dora, init=init, seed=seed
            )
    if "embed_tokens" in names:
        model.embed_lora = TableLora(model.embed, **settings("embed_tokens", model.embed))
    if "lm_head" in names:
        model.head_lora = TableLora(model.lm_head, **settings("lm_head", model.lm_head))
    roles = {variable.get_metadata("role") for _, variable in declared(model)}
    for role in also_train:
        if role not in ROLES:
            raise ConfigError(f"lora.also_train: {role!r} is none of {', '.join(ROLES)}")
        if role not in roles:
            raise ConfigError(
                f"lora.also_train: this model has no {role!r} of its own (its head is the embedding): "
                "name 'embed' instead"
            )
    mark_trainable(model, {*FACTORS, *also_train})


def _check_kinds(model, adapted, *, dora: bool, init: str, also_train) -> None:
    experts = next((name for name in adapted if ".experts." in name), None)
    if experts and (dora or init != "default"):
        raise ConfigError(
            f"lora.targets: {experts!r}: experts take plain LoRA, and lora.dora={dora}, lora.init={init!r}: name "
            "the other layers alone, or set lora.dora=False and lora.init='default'"
        )
    for name, role in TABLES.items():
        if name not in adapted:
            continue
        if model.spec.tied:
            raise ConfigError(
                f"lora.targets: {name!r}: the head of this model is its embedding, and an adapter would part "
                "them: train the table whole with lora.also_train=('embed',)"
            )
        if role in also_train:
            raise ConfigError(
                f"lora.targets: {name!r} and lora.also_train: {role!r} both train the same table: drop one"
            )
        if dora or init != "default":
            raise ConfigError(
                f"lora.targets: {name!r} takes plain LoRA, and lora.dora={dora}, lora.init={init!r}: leave it "
                "out, or set lora.dora=False and lora.init='default'"
            )


def adaptable(model: nnx.Module):
    """(name, weight, its adapter or None) of all that can be adapted: the linear layers, the
    embedding, an untied head.
    """
    for name, linear in linear_layers(model):
        yield name, linear.kernel, linear.lora
    if hasattr(model, "embed"):  # a whole decoder, not a layer of one
        yield "embed_tokens", model.embed, model.embed_lora
    if getattr(model, "lm_head", None) is not None:
        yield "lm_head", model.lm_head, model.head_lora


def start_magnitudes(model: nnx.Module, *, shardings=None) -> None:
    """Gives every magnitude that has no value the norms of its adapted kernel, so that the model
    stays as it is.
    """
    for _, linear in linear_layers(model):
        magnitude = None if linear.lora is None else linear.lora.magnitude
        if magnitude is None or not isinstance(magnitude.get_value(), jax.ShapeDtypeStruct):
            continue

        def norms(layer, scale=linear.lora.scale):
            kernel, a, b = layer
            if isinstance(kernel, Quantised):
                kernel = dequantise(kernel, kernel.dtype)
            return column_norms(kernel, a.astype(kernel.dtype), b.astype(kernel.dtype), scale)

        make = jax.jit(
            lambda *layers: jax.lax.map(norms, layers),
            out_shardings=shardings(magnitude) if shardings else None,
        )
        magnitude.set_value(make(linear.kernel.get_value(), linear.lora.a[...], linear.lora.b[...]))


def mark_trainable(model: nnx.Module, roles=None) -> None:
    """Marks the Variables of these roles (None: all) as trainable, and all others as frozen."""
    for _, variable in declared(model):
        variable.set_metadata(trainable=roles is None or variable.get_metadata("role") in roles)


def is_trainable(path, variable) -> bool:
    """An nnx filter: `nnx.split(model, is_trainable, ...)` gives (graphdef, trainable, frozen)."""
    return isinstance(variable, nnx.Variable) and variable.get_metadata().get("trainable", False)


def linear_layers(model: nnx.Module):
    """(dotted name, module) of every linear layer that can be adapted, for example
    "self_attn.q_proj". A name comes once for each stack of layers, and stands for all experts of a
    layer.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            kernel = module.kernel.get_metadata()
            name = (
                kernel["hf"]
                .removesuffix(".weight")
                .removeprefix("model.layers.{layer}.")
                .replace(".{expert}", "")
            )
            yield (f"{name.rpartition('.')[0]}.{path[-1]}" if "part" in kernel else name), module


def matched_tables(targets) -> set[str]:
    """Those of `TABLES` that these targets name."""
    texts = {
        "model.embed_tokens": "embed_tokens",
        "embed_tokens": "embed_tokens",
        "lm_head": "lm_head",
    }
    return {
        texts[text]
        for found in matching(tuple(targets), tuple(texts), "lora.targets")
        for text in found
    }


def _targeted(candidates, targets: tuple[str, ...]) -> list[str]:
    """The names of (name, weight) that targets match, as PEFT has it: see `attach`."""
    layers = {}  # name -> its full names, of all stacks of layers
    for name, weight in candidates:
        layers.setdefault(name, []).extend(_full_names(name, weight))
    texts, reached = (*layers, *(full for of in layers.values() for full in of)), set()
    for target, found in zip(targets, matching(targets, texts, "lora.targets")):
        here = {
            full
            for name, of in layers.items()
            for full in of
            if name in found or full in found or (target == "all-linear" and name not in TABLES)
        }
        if not here:
            raise ConfigError(
                f"lora.targets: {target!r} matches no linear layer; there are {', '.join(layers)}"
            )
        reached |= here
    for of in layers.values():
        if 0 < len(reached.intersection(of)) < len(of):
            first, other = (
                next(full for full in of if full in reached),
                next(full for full in of if full not in reached),
            )
            raise ConfigError(
                f"lora.targets: {first} is matched and {other} is not, and layers are adapted all or none: leave "
                "the number out"
            )
    return [name for name, of in layers.items() if reached.issuperset(of)]


def _full_names(name: str, weight: nnx.Variable) -> list[str]:
    """ "model.layers.0.self_attn.q_proj" and so on, of the layers that a weight holds."""
    if "layers" not in weight.get_metadata():
        return [weight.get_metadata("hf").removesuffix(".weight")]
    first, step = weight.get_metadata("layers")
    return [f"model.layers.{first + i * step}.{name}" for i in range(weight.get_value().shape[0])]


def of_pattern(pairs, name: str, weight: nnx.Variable, field: str, default):
    """The value of the first of `pairs` (pattern, value) whose pattern, a regular expression,
    matches the end of the full name of `name` ("model.layers.0.self_attn.q_proj") from a dot on, as
    PEFT has it; else `default`.

    Raises:
      ConfigError: no regular expression; or one that tells the layers of a stack, which are one
        array, apart.
    """
    names = [hf.removesuffix(".weight") for hf in hf_names(weight)] if pairs else []
    if "part" in weight.get_metadata():  # of a fused layer, under its own name
        names = [f"{hf.rpartition('.')[0]}.{name.rpartition('.')[2]}" for hf in names]
    found = matching(
        tuple(pattern for pattern, _ in pairs), tuple(names), f"lora.{field}", r"(.*\.)?"
    )
    for (pattern, value), of in zip(pairs, found):
        matched = [name in of for name in names]
        if all(matched):
            return value
        if any(matched):
            raise ConfigError(
                f"lora.{field}: {pattern!r} matches {names[matched.index(True)]} and not "
                f"{names[matched.index(False)]}, and all layers have one rank and alpha: leave the number out"
            )
    return default
