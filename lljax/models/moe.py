"""Mixture of experts: a router sends each token to k of E experts (Shazeer et al. 2017, arXiv
1701.06538).

No token is dropped: tokens are sorted by expert and multiplied group by group (`grouped_dot`),
  however many an expert gets. Formulas follow transformers `models/qwen2_moe/modeling_qwen2_moe.py`
  and `models/deepseek_v3/modeling_deepseek_v3.py`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lljax.models.declare import declare
from lljax.models.grouped import grouped_dot
from lljax.models.linear import MLP, Linear
from lljax.models.probe import times
from lljax.models.spec import DecoderSpec, MoESpec
from lljax.parallel.sharding import ROWS, TOKENS, Layout, each, token_parts, weight_spec

CUT = PartitionSpec(ROWS, TOKENS)


class Router(nnx.Module):
    """Which experts a token goes to, and what each counts for."""

    def __init__(self, D: int, moe: MoESpec, *, hf: str):
        self.weight = declare(
            (D, moe.E), axes=("embed", None), hf=f"{hf}.weight", role="router", transpose=True
        )
        self.bias = (
            declare((moe.E,), axes=(None,), hf=f"{hf}.bias", role="router", init="zeros")
            if moe.bias
            else None
        )
        self.correction = (
            declare(
                (moe.E,),
                axes=(None,),
                hf=f"{hf}.e_score_correction_bias",
                role="router",
                init="zeros",
            )
            if moe.correction
            else None
        )
        self.moe = moe

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights float32 [M, k] and experts int32 [M, k] of tokens x [M, D]; and probabilities
        float32 [M, E], the scores of a token made to sum to 1, see `load_of`.

        float32 throughout: the low bits of a logit decide which expert is taken.
        """
        moe = self.moe
        logits = jnp.matmul(
            x.astype(jnp.float32), self.weight[...].astype(jnp.float32), precision="highest"
        )
        if self.bias is not None:
            logits += self.bias[...]
        score = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[moe.score]
        scores = logits if moe.best_first else score(logits)
        ranks = scores if self.correction is None else scores + self.correction[...]
        if moe.best_groups < moe.groups:
            grouped = ranks.reshape(-1, moe.groups, moe.E // moe.groups)
            of_groups = jax.lax.top_k(grouped, 2)[0].sum(-1)
            best = jax.nn.one_hot(
                jax.lax.top_k(of_groups, moe.best_groups)[1], moe.groups, dtype=bool
            ).any(1)
            ranks = jnp.where(best[..., None], grouped, -jnp.inf).reshape(ranks.shape)
        choice = jax.lax.top_k(jax.lax.stop_gradient(ranks), moe.k)[1]
        weights = jnp.take_along_axis(scores, choice, axis=1)
        if moe.best_first:
            weights = score(weights)
        if moe.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        probabilities = score(logits) if moe.best_first else scores
        if moe.score == "sigmoid":
            probabilities = probabilities / (probabilities.sum(-1, keepdims=True) + 1e-20)
        return weights * moe.scale, choice, probabilities


class ExpertLinear(Linear):
    """A `Linear` of each expert: kernel [E, in, out], and so are the factors of its `lora`. part:
    see `Linear`.
    """

    def __init__(
        self,
        E: int,
        shape: tuple[int, int],
        *,
        axes: tuple,
        hf: str,
        fused: bool = False,
        bias: bool = False,
        **part,
    ):
        self.kernel = declare(
            (E, *shape),
            axes=("experts", *axes),
            hf=hf if fused else f"{hf}.weight",
            role="kernel",
            transpose=not fused,
            **part,
        )
        self.bias = (
            declare(
                (E, shape[1]),
                axes=("experts", axes[1]),
                hf=f"{hf}_bias",
                role="bias",
                init="zeros",
                **part,
            )
            if bias
            else None
        )
        self.lora = nnx.data(None)

    def __call__(self, x: jax.Array, dropout_key, dot) -> jax.Array:
        """dot: product of the rows with the matrices [E, in, out] of their experts."""
        y = times(x, self.kernel.get_value(), dot)
        if self.bias is not None:
            y += dot(jnp.ones((len(x), 1), x.dtype), self.bias[...][:, None])
        return y if self.lora is None else self.lora(x, y, self.kernel[...], dropout_key, dot)


class Experts(nnx.Module):
    """The SwiGLU of every expert, see lljax.models.linear.MLP; or a clamped one, see `MoESpec`."""

    def __init__(self, D: int, moe: MoESpec, *, hf: str):
        if moe.fused:
            halves = [(0, 1), (moe.F, 1)] if moe.fused == "halves" else [(0, 2), (1, 2)]
            gate, up = (
                {
                    "hf": f"{hf}.gate_up_proj",
                    "fused": True,
                    "bias": moe.bias,
                    "part": (*half, 2 * moe.F),
                }
                for half in halves
            )
            down = {"hf": f"{hf}.down_proj", "fused": True, "bias": moe.bias}
        else:
            gate, up, down = ({"hf": f"{hf}.{{expert}}.{name}"} for name in moe.projections)
        self.gate_proj = ExpertLinear(moe.E, (D, moe.F), axes=("embed", "mlp"), **gate)
        self.up_proj = ExpertLinear(moe.E, (D, moe.F), axes=("embed", "mlp"), **up)
        self.down_proj = ExpertLinear(moe.E, (moe.F, D), axes=("mlp", "embed"), **down)
        self.clamp = moe.clamp

    def __call__(self, x: jax.Array, sizes: jax.Array, dropout_key, platform: str) -> jax.Array:
        """x [M, D], sorted by expert; sizes int32 [E], tokens of each."""
        dot = functools.partial(grouped_dot, sizes=sizes, platform=platform)
        gate, up = self.gate_proj(x, dropout_key, dot), self.up_proj(x, dropout_key, dot)
        if self.clamp is None:
            hidden = jax.nn.silu(gate) * up
        else:
            alpha, limit = self.clamp
            gate = jnp.minimum(gate, limit)
            hidden = gate * jax.nn.sigmoid(alpha * gate) * (jnp.clip(up, -limit, limit) + 1)
        return self.down_proj(hidden, dropout_key, dot)


class MoE(nnx.Module):
    """What stands in the place of the MLP."""

    def __init__(self, spec: DecoderSpec, hf: str):
        moe = spec.moe
        self.gate = Router(spec.D, moe, hf=f"{hf}.{moe.router}")
        self.experts = Experts(spec.D, moe, hf=f"{hf}.experts")
        self.shared = MLP(spec, f"{hf}.{moe.shared_name}", F=moe.shared) if moe.shared else None
        self.shared_gate = (
            Linear((spec.D, 1), axes=("embed", None), hf=f"{hf}.{moe.shared_name}_gate")
            if moe.shared_gate
            else None
        )
        self.moe = moe

    def __call__(
        self,
        x: jax.Array,
        dropout_key=None,
        layout: Layout | None = None,
        counted: jax.Array | None = None,
    ):
        """x [B, T, D] -> [B, T, D]; where bool [B, T] says what tokens are counted also their load,
        see `load_of`.
        """
        y, load = self._routed(x, dropout_key, layout, counted)
        if self.shared is not None:
            shared = self.shared(x, dropout_key)
            y += (
                shared
                if self.shared_gate is None
                else shared * jax.nn.sigmoid(self.shared_gate(x, dropout_key))
            )
        return y if counted is None else (y, load)

    def _routed(self, x, dropout_key, layout, counted):
        """The sum of each token's experts, and the load.

        Over the mesh axis `expert` every device holds E / n experts. It gathers the tokens of the n
        devices, computes what its own experts say of them, and the sums are scattered back. That is
        exact and its traffic does not depend on where the
        tokens go: an exchange that sends a token only where its experts are needs room for all
          tokens of all devices at each (or a ragged exchange, which not every backend has), and
          sends no less while n <= k.
        """
        if layout is None:
            weights, choice, probabilities = self.gate(x.reshape(-1, x.shape[-1]))
            y = combine(
                self.experts,
                x.reshape(-1, x.shape[-1]),
                weights,
                choice,
                dropout_key,
                on_input=self.moe.on_input,
                platform=jax.default_backend(),
            )
            return y.astype(x.dtype).reshape(x.shape), load_of(choice, probabilities, counted)
        mesh, n = layout.mesh, layout.mesh.shape["expert"]
        graphdef, weights = nnx.split((self.gate, self.experts))

        # metadata of a stacked layer begins with an axis that its value has no more
        def cut(variable):
            value = variable.get_value()
            axes = variable.get_metadata("axes")[-len(value.shape) :]
            return variable.replace(
                each(lambda x, axes: weight_spec(mesh, axes, x.shape, kept=False), value, axes)
            )

        specs = jax.tree.map(cut, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            check_vma=False,
            out_specs=CUT,
            in_specs=(specs, CUT, PartitionSpec(), CUT),
        )
        def run(weights, x, key, counted):
            gate, experts = nnx.merge(graphdef, weights)
            if self.moe.bias:  # each device of `tensor` adds it
                experts.down_proj.bias.set_value(experts.down_proj.bias[...] / mesh.shape["tensor"])
            tokens = x.reshape(-1, x.shape[-1])
            weight, choice, probabilities = gate(tokens)
            load = load_of(choice, probabilities, counted)
            if key is not None:  # the same on the devices that share a token's hidden units
                key = jax.random.fold_in(key, jax.lax.axis_index((*ROWS, TOKENS)))
            if n > 1:
                tokens, weight, choice = (
                    jax.lax.all_gather(a, "expert", tiled=True) for a in (tokens, weight, choice)
                )
            y = combine(
                experts,
                tokens,
                weight,
                choice,
                key,
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


def load_of(choice, probabilities, counted):
    """float32 [B, 1, 2, E] of choice [B * T, k], probabilities [B * T, E] and counted bool [B, T],
    None without the latter: how many tokens of a row chose each expert, and the sum of its
    probabilities.

    Over a mesh the second axis has an entry for each device that holds a piece of the row, so that
    nothing is sent to count.
    """
    if counted is None:
        return None
    E, k = probabilities.shape[1], choice.shape[1]
    chosen = sum((choice[:, j, None] == jnp.arange(E)).astype(jnp.float32) for j in range(k))

    def total(x):
        return jnp.sum(jnp.where(counted[..., None], x.reshape(*counted.shape, E), 0), axis=1)

    return jnp.stack([total(chosen), total(probabilities)], axis=1)[:, None]


def no_load(moe: MoESpec, counted: jax.Array, layout: Layout | None) -> jax.Array:
    """The load of no token, to add to."""
    return jnp.zeros((counted.shape[0], token_parts(layout), 2, moe.E), jnp.float32)


def combine(
    experts, x, weights, choice, key, *, on_input: bool, platform: str, share=0, shares: int = 1
) -> jax.Array:
    """float32 [M, D]: the weighted sum of what the experts at hand say of each token of x [M, D].

    experts: the `share`-th of `shares` equal parts of all. weights, choice: [M, k], see Router.
      However many of the M k pairs of a token and an expert fall to this part, M k / shares of them
      exist at one time.
    """
    M, k = choice.shape
    E = experts.gate_proj.kernel.get_value().shape[0]
    rows = M * k // shares
    here = choice.reshape(-1) - share * E
    here = jnp.where((here >= 0) & (here < E), here, E)  # E: the experts of others, sorted last
    order = jnp.argsort(here, stable=True)  # place -> pair
    place = (
        jnp.zeros_like(order).at[order].set(jnp.arange(M * k), unique_indices=True).reshape(M, k)
    )
    ends = jnp.cumsum(jnp.bincount(here, length=E + 1)[:E])

    def piece(first):
        at = first + jnp.arange(rows)
        pair = jnp.where(at < ends[-1], jax.lax.dynamic_slice_in_dim(order, first, rows), M * k)
        row = jnp.where(
            (place >= first) & (place < jnp.minimum(first + rows, ends[-1])), place - first, rows
        )
        sizes = jnp.diff(jnp.clip(ends - first, 0, rows), prepend=0)
        inside = spread(x, pair, row)
        if on_input:
            inside = (
                inside * weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)[:, None]
            ).astype(x.dtype)
        outside = experts(inside, sizes, key, platform)
        return collect(outside, jnp.ones_like(weights) if on_input else weights, pair, row)

    if shares == 1:
        return piece(0)
    # Balanced experts fill one piece and a little of a second one.
    piece = jax.checkpoint(piece, prevent_cse=False)

    def add(total, first):
        return jax.lax.cond(first < ends[-1], lambda: total + piece(first), lambda: total), None

    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), jnp.arange(shares) * rows)[0]


# A token's rows and a row's token, each by a gather: the gradient of one is the other. (That of
# jax's own gather is a scatter, which a GPU sums in no fixed order.) pair int32 [R]: token * k + j
# of each row; row int32 [M, k]: row of each pair. Either is out of range where there is none, and
# reads zeros.


@jax.custom_vjp
def spread(x, pair, row):
    """x [M, D] -> [R, D]."""
    return _take(x, pair // row.shape[1])


@jax.custom_vjp
def collect(y, weights, pair, row):
    """float32 [M, D] of y [R, D]: the sum of each token's rows, weighted by float32 [M, k]."""
    return _sum(y, weights, row)


def _take(x, at):
    return x.at[at].get(mode="fill", fill_value=0)


def _sum(y, weights, row):
    total = 0
    for j in range(row.shape[1]):  # one [M, D] at a time
        total += _take(y, row[:, j]) * weights[:, j, None]
    return total


def _spread_backward(saved, dy):
    pair, row, like = saved
    return _sum(dy, jnp.ones(row.shape, jnp.float32), row).astype(like.dtype), None, None


def _collect_backward(saved, dx):
    y, weights, pair, row = saved
    own = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)
    dy = (_take(dx, pair // row.shape[1]) * own[:, None]).astype(y.dtype)
    d_weights = jnp.stack(
        [jnp.sum(_take(y, row[:, j]) * dx, axis=-1) for j in range(row.shape[1])], axis=1
    )
    return dy, d_weights, None, None


spread.defvjp(
    lambda x, pair, row: (spread(x, pair, row), (pair, row, jnp.zeros(0, x.dtype))),
    _spread_backward,
)
collect.defvjp(
    lambda y, weights, pair, row: (collect(y, weights, pair, row), (y, weights, pair, row)),
    _collect_backward,
)
