"""A decoder layer: a mixer, then an MLP or experts, each with norms and added to the residual."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lljax.attention.mask import NEVER, Mask
from lljax.models.context import LayerContext
from lljax.models.declare import declare
from lljax.models.flops import TokenFlops
from lljax.models.linear import MLP, RMSNorm
from lljax.models.memory import fold_tiles, is_tiled, map_tiles, scan_tiles
from lljax.models.mixers import MIXERS
from lljax.models.mixers.mixer import Carry, Operands, State
from lljax.models.moe import ExpertsBesideMLP, MoE
from lljax.models.rope import Positions
from lljax.models.router import Load, no_load
from lljax.models.spec import DecoderSpec, LayerSpec
from lljax.parallel.sharding import Layout


class DecoderLayer(nnx.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec, hf: str = "model.layers.{layer}"):
        self.layer = layer

        mixer = MIXERS[layer.mixer]
        self.norms = spec.norms
        # As attributes of their HF names: paths are part of a checkpoint.
        for name in dataclasses.astuple(spec.norms):
            if name is not None:
                norm = RMSNorm(
                    spec.D, spec.norm_eps, hf=f"{hf}.{name}", plus_one=spec.norm_plus_one
                )
                setattr(self, name, norm)
        self.self_attn = mixer(spec, layer, f"{hf}.{mixer.hf_name}")
        self.mlp = _mlp(spec, layer, hf)
        self.residual_scale = spec.residual_scale
        self.scale = (
            declare((1,), axes=(None,), hf=f"{hf}.{spec.layer_scale}", role="scale", init="ones")
            if spec.layer_scale
            else None
        )

    @property
    def norm_before_mixer(self) -> RMSNorm | None:
        return self._norm(self.norms.before_mixer)

    @property
    def norm_after_mixer(self) -> RMSNorm | None:
        return self._norm(self.norms.after_mixer)

    @property
    def norm_before_mlp(self) -> RMSNorm | None:
        return self._norm(self.norms.before_mlp)

    @property
    def norm_after_mlp(self) -> RMSNorm | None:
        return self._norm(self.norms.after_mlp)

    def _norm(self, name: str | None) -> RMSNorm | None:
        return None if name is None else getattr(self, name)

    def __call__(
        self, x: Float[Array, "B T D"], context: LayerContext, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State | None, Load | None]:
        """x after the layer; the mixer's `state` in the cache after it; and the load of the experts
        by `context.counted` tokens (None without experts, or if nothing is counted).
        """
        if not self.layer.moe:
            context = context.replace(counted=None)
        key, memory, layout = context.dropout_key, context.memory, context.layout
        if state is None and is_tiled(x.shape[1], memory, layout):
            project = functools.partial(self.project, key=key)
            carry = self.self_attn.first_carry(project, (x, context.positions), context)
            if carry is not None:
                x, load = self._streamed(x, context, carry)
                return x, None, load
        operands = map_tiles(self.project, (x, context.positions), key, memory, layout)
        mixed, state = self.self_attn.mix(operands, context, state)
        load, x = fold_tiles(
            functools.partial(self.rest, layout=layout),
            self._no_load(context),
            (x, mixed, context.counted),
            key,
            memory,
            layout,
        )
        return x, state, load

    def token_flops(self) -> TokenFlops:
        """Products of one token with the weights of all the layers of a stack."""
        return self.self_attn.token_flops() + self.mlp.token_flops()

    def project(
        self, xs: tuple[Float[Array, "B T D"], Positions], key: jax.Array | None
    ) -> Operands:
        """Operands of the mixer. Norms and RoPE compute in float32: a tile at a time."""
        x, positions = xs
        return self.self_attn.project(_normalized(x, self.norm_before_mixer), positions, key)

    def rest(
        self, load: Load | None, xs: tuple, key: jax.Array | None, layout: Layout | None
    ) -> tuple[Load | None, Float[Array, "B T D"]]:
        """The layer after its mixer: (load plus the load of these tokens, x).

        xs: x, the mixed tokens, and which are counted.
        """
        x, mixed, counted = xs
        mixed = self.self_attn.output(mixed, key)
        x = self._added(x, _normalized(mixed, self.norm_after_mixer))
        load, y = self._mlp(load, _normalized(x, self.norm_before_mlp), counted, key, layout)
        x = self._added(x, _normalized(y, self.norm_after_mlp))
        return load, x if self.scale is None else x * self.scale[...].astype(x.dtype)

    def _added(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual x with the output y of mixer or MLP."""
        if self.residual_scale == 1:
            return x + y
        # float32, because bfloat16 rounds the factor
        return x + (y.astype(jnp.float32) * self.residual_scale).astype(y.dtype)

    def _mlp(
        self,
        load: Load | None,
        x: Float[Array, "B T D"],
        counted: Bool[Array, "B T"] | None,
        key: jax.Array | None,
        layout: Layout | None,
    ) -> tuple[Load | None, Float[Array, "B T D"]]:
        if isinstance(self.mlp, MLP):
            return load, self.mlp(x, key)
        y, more = self.mlp(x, key, layout, counted)
        return (load if load is None or more is None else load + more), y

    def _no_load(self, context: LayerContext) -> Load | None:
        if context.counted is None or isinstance(self.mlp, MLP):
            return None
        return no_load(self.mlp.moe, context.counted, context.layout)

    def _streamed(
        self, x: Float[Array, "B T D"], context: LayerContext, carry: Carry
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """The whole layer a tile at a time, so that nothing of a whole row exists but the input and
        the output of the layer.
        """

        def tile(carry, xs, key):
            (carry, load), (x, positions, mask, real, counted) = carry, xs
            operands = self.project((x, positions), key)
            mixed, carry = self.self_attn.mix_tile(
                operands, context.replace(mask=_without_fill(mask, real)), carry
            )
            load, x = self.rest(load, (x, mixed, counted), key, context.layout)
            return (carry, load), x

        real = jnp.ones(x.shape[:2], bool)  # False for the tokens that fill up the last tile
        (_, load), x = scan_tiles(
            tile,
            (carry, self._no_load(context)),
            (x, context.positions, context.mask, real, context.counted),
            context.dropout_key,
            context.memory,
            context.layout,
        )
        return x, load


def _mlp(spec: DecoderSpec, layer: LayerSpec, hf: str) -> MLP | MoE:
    """The MLP of a layer, experts in its place, or both. hf: the prefix of the layer."""
    block = spec.moe.block if spec.moe else spec.mlp.block
    block = f"{hf}.{block}" if block else hf
    if not layer.moe:
        return MLP(spec, block, F=spec.F)
    beside = spec.moe is not None and spec.moe.beside
    return ExpertsBesideMLP(spec, hf, block) if beside else MoE(spec, block)


def _normalized(x: Float[Array, "B T D"], norm: RMSNorm | None) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


def _without_fill(mask: Mask, real: Bool[Array, "B t"]) -> Mask:
    return mask.replace(
        q_index=jnp.where(real, mask.q_index, -1), k_index=jnp.where(real, mask.k_index, NEVER)
    )
