"""Mixture of experts: a router sends each token to k of E experts (Shazeer et al. 2017, arXiv
1701.06538).

No token is dropped: tokens are sorted by expert and multiplied group by group (`grouped_dot`),
whatever the number of tokens of an expert. Formulas follow transformers
`models/qwen2_moe/modeling_qwen2_moe.py` and `models/deepseek_v3/modeling_deepseek_v3.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lljax.models.declare import declare
from lljax.models.dispatch import combine
from lljax.models.flops import TokenFlops, token_flops, weight_flops
from lljax.models.grouped import grouped_dot
from lljax.models.linear import ACTIVATIONS, MLP, Linear, RMSNorm
from lljax.models.probe import multiply
from lljax.models.router import Load, Router, load_of
from lljax.models.spec import DecoderSpec, MoESpec
from lljax.parallel.sharding import ROWS, TOKENS, Layout, map_arrays, weight_spec

CUT = PartitionSpec(ROWS, TOKENS)


class ExpertLinear(Linear):
    """A `Linear` of each expert: kernel [E, in, out], and so are the factors of its `lora`.

    fused: HF keeps all experts in one tensor, see `MoESpec`. part: see `Linear`.
    """

    def __init__(
        self,
        E: int,
        shape: tuple[int, int],
        *,
        axes: tuple[str, str],
        hf: str,
        fused: str = "",
        bias: bool = False,
        part: tuple[int, int, int] | None = None,
    ):
        more: dict[str, Any] = {} if part is None else {"part": part}
        self.kernel = declare(
            (E, *shape),
            axes=("experts", *axes),
            hf=hf if fused else f"{hf}.weight",
            role="kernel",
            transpose=fused in ("", "rows"),
            **more,
        )
        self.bias = (
            declare(
                (E, shape[1]),
                axes=("experts", axes[1]),
                hf=f"{hf}_bias",
                role="bias",
                init="zeros",
                **more,
            )
            if bias
            else None
        )
        self.lora: Any = nnx.data(None)

    def __call__(
        self, x: Float[Array, "M in"], dropout_key: jax.Array | None, dot: Callable
    ) -> Float[Array, "M out"]:
        """dot: product of the rows with the matrices [E, in, out] of their experts."""
        y = multiply(x, self.kernel.get_value(), dot)
        if self.bias is not None:
            y += dot(jnp.ones((len(x), 1), x.dtype), self.bias[...][:, None])
        return y if self.lora is None else self.lora(x, y, self.kernel[...], dropout_key, dot)


class Experts(nnx.Module):
    """The MLP of every expert, see lljax.models.linear.MLP; or a clamped one, see `MoESpec`."""

    def __init__(self, D: int, moe: MoESpec, *, hf: str, activation: str):
        gate, up, down = _hf_names(moe, hf)
        self.gate_proj = ExpertLinear(moe.E, (D, moe.F), axes=("embed", "mlp"), **gate)
        self.up_proj = ExpertLinear(moe.E, (D, moe.F), axes=("embed", "mlp"), **up)
        self.down_proj = ExpertLinear(moe.E, (moe.F, D), axes=("mlp", "embed"), **down)
        self.clamp, self.activation = moe.clamp, activation

    def __call__(
        self,
        x: Float[Array, "M D"],
        sizes: Int[Array, " E"],
        dropout_key: jax.Array | None,
        platform: str,
    ) -> Float[Array, "M D"]:
        """x: sorted by expert. sizes: tokens of each expert."""
        dot = functools.partial(grouped_dot, sizes=sizes, platform=platform)
        return self.down_proj(self.hidden(x, dropout_key, dot), dropout_key, dot)

    def hidden(
        self, x: Float[Array, "M D"], dropout_key: jax.Array | None, dot: Callable
    ) -> Float[Array, "M F"]:
        """The input of the down projections. dot: see `ExpertLinear`."""
        gate, up = self.gate_proj(x, dropout_key, dot), self.up_proj(x, dropout_key, dot)
        if self.clamp is None:
            return ACTIVATIONS[self.activation](gate) * up
        alpha, limit = self.clamp
        gate = jnp.minimum(gate, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (jnp.clip(up, -limit, limit) + 1)

    def token_flops(self) -> TokenFlops:
        """As if a token went to every expert. No gradient reads the result of the last product."""
        unread = weight_flops(self.down_proj.kernel).forward
        return token_flops(self) + TokenFlops(unread=unread)


def _hf_names(moe: MoESpec, hf: str) -> tuple[dict[str, Any], ...]:
    """Arguments of gate, up and down of `ExpertLinear`."""
    if not moe.fused:
        return tuple({"hf": f"{hf}.{{expert}}.{name}"} for name in moe.projections)
    fused = {"fused": moe.fused, "bias": moe.bias}
    parts = [(0, 2), (1, 2)] if moe.fused == "turns" else [(0, 1), (moe.F, 1)]
    gate, up = (fused | {"hf": f"{hf}.gate_up_proj", "part": (*part, 2 * moe.F)} for part in parts)
    return gate, up, fused | {"hf": f"{hf}.down_proj"}


class MoE(nnx.Module):
    """Experts in place of the MLP of a layer."""

    def __init__(self, spec: DecoderSpec, hf: str, norm: RMSNorm | None = None):
        """norm: of what the experts read, and the router does not."""
        moe = spec.moe
        assert moe is not None, "a layer with experts needs DecoderSpec.moe"
        self.gate = Router(spec.D, moe, hf=hf, eps=spec.norm_eps)
        self.experts = Experts(spec.D, moe, hf=f"{hf}.experts", activation=spec.activation)
        self.norm = norm
        self.shared = MLP(spec, f"{hf}.{moe.shared_name}", F=moe.shared) if moe.shared else None
        self.shared_gate = (
            Linear((spec.D, 1), axes=("embed", None), hf=f"{hf}.{moe.shared_name}_gate")
            if moe.shared_gate
            else None
        )
        self.moe = moe

    def __call__(
        self,
        x: Float[Array, "B T D"],
        dropout_key: jax.Array | None = None,
        layout: Layout | None = None,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """The output, and the load of the experts by the `counted` tokens, see `load_of`."""
        routed = self._routed if layout is None else self._routed_on_mesh
        y, load = routed(x, dropout_key, layout, counted)
        if self.shared is not None:
            shared = self.shared(x, dropout_key)
            y += (
                shared
                if self.shared_gate is None
                else shared * jax.nn.sigmoid(self.shared_gate(x, dropout_key))
            )
        return y, load

    def token_flops(self) -> TokenFlops:
        """A token takes k of the E experts."""
        flops = token_flops(self.gate)
        flops += self.experts.token_flops().scaled(self.moe.k / self.moe.E)
        if self.shared is not None:
            flops += self.shared.token_flops()
        if self.shared_gate is not None:
            flops += token_flops(self.shared_gate)
        return flops

    def _routed(self, x, dropout_key, layout, counted):
        """The sum of each token's experts, and the load, on one device."""
        # Reshaped twice, which fixes the order in which the gradients of x are summed.
        routing = self.gate(x.reshape(-1, x.shape[-1]))
        read = x if self.norm is None else self.norm(x)
        y = combine(
            self.experts,
            read.reshape(-1, x.shape[-1]),
            routing,
            dropout_key,
            E=self.moe.E,
            on_input=self.moe.on_input,
            platform=jax.default_backend(),
        )
        return y.astype(x.dtype).reshape(x.shape), load_of(routing, counted)

    def _routed_on_mesh(self, x, dropout_key, layout, counted):
        """`_routed` with E / n experts on each of the n devices of the mesh axis `expert`.

        Every device gathers the tokens of the n devices, computes its experts for them, and the
        sums are scattered back. That is exact, and its traffic does not depend on the routing. An
        exchange that sends a token only to the devices of its experts needs room for all tokens of
        all devices on each (or a ragged exchange, which not every backend has), and sends no less
        while n <= k.
        """
        mesh, n = layout.mesh, layout.mesh.shape["expert"]
        graphdef, weights = nnx.split((self.gate, self.experts, self.norm))

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            check_vma=False,
            out_specs=CUT,
            in_specs=(_weight_specs(weights, mesh), CUT, PartitionSpec(), CUT),
        )
        def run(weights, x, key, counted):
            gate, experts, norm = nnx.merge(graphdef, weights)
            bias = experts.down_proj.bias
            if bias is not None:  # every device of `tensor` adds it
                bias.set_value(bias[...] / mesh.shape["tensor"])
            tokens = x.reshape(-1, x.shape[-1])
            routing = gate(tokens)
            load = load_of(routing, counted)
            if norm is not None:
                tokens = norm(x).reshape(-1, x.shape[-1])
            if key is not None:  # the same on the devices that share a token's hidden units
                key = jax.random.fold_in(key, jax.lax.axis_index((*ROWS, TOKENS)))
            if n > 1:
                tokens, weights, chosen = (
                    jax.lax.all_gather(a, "expert", tiled=True)
                    for a in (tokens, routing.weights, routing.experts)
                )
                routing = routing._replace(weights=weights, experts=chosen)
            y = combine(
                experts,
                tokens,
                routing,
                key,
                E=self.moe.E // n,
                on_input=self.moe.on_input,
                platform=layout.platform,
                share=jax.lax.axis_index("expert"),
                shares=n,
            ).astype(x.dtype)
            if n > 1:
                y = jax.lax.psum_scatter(y, "expert", tiled=True)
            y = jax.lax.psum(y, "tensor") if mesh.shape["tensor"] > 1 else y
            return y.reshape(x.shape), load

        return run(weights, x, dropout_key, counted)


class ExpertsBesideMLP(MoE):
    """Experts and the MLP of a layer, which both read the residual; see `BesideNorms`."""

    def __init__(self, spec: DecoderSpec, layer: str, hf: str):
        """layer, hf: the prefixes of the layer and of the block with the experts."""
        assert spec.moe is not None and spec.moe.beside is not None, "see MoESpec.beside"
        norms = spec.moe.beside

        def norm(name: str) -> RMSNorm:
            return RMSNorm(spec.D, spec.norm_eps, hf=f"{layer}.{name}", plus_one=spec.norm_plus_one)

        super().__init__(spec, hf, norm(norms.before_experts))
        self.dense = MLP(spec, f"{layer}.{spec.mlp.block}", F=spec.F)
        self.before_mlp, self.after_mlp = norm(norms.before_mlp), norm(norms.after_mlp)
        self.after_experts = norm(norms.after_experts)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        dropout_key: jax.Array | None = None,
        layout: Layout | None = None,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """x: the residual."""
        y, load = super().__call__(x, dropout_key, layout, counted)
        dense = self.dense(self.before_mlp(x), dropout_key)
        return self.after_mlp(dense) + self.after_experts(y), load

    def token_flops(self) -> TokenFlops:
        return super().token_flops() + self.dense.token_flops()


def _weight_specs(weights: nnx.State, mesh: Mesh) -> Any:
    """How the weights of one layer are cut on the mesh to compute with."""

    def cut(variable):
        value = variable.get_value()
        # The metadata of a stacked layer begins with an axis that the value of one layer lacks.
        axes = variable.get_metadata("axes")[-len(value.shape) :]
        return variable.replace(
            map_arrays(lambda x, axes: weight_spec(mesh, axes, x.shape, stored=False), value, axes)
        )

    return jax.tree.map(cut, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))
