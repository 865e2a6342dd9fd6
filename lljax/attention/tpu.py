"""Flash attention for TPU: three Pallas (Mosaic) kernels that visit only the blocks which the mask
leaves active.

The same mathematics as `lljax.attention.blockwise`: a running softmax (Dao et al. 2022, arXiv
2205.14135, algorithm 1), and a backward pass that recomputes the weights from the log-sum-exp (Dao
2023, arXiv 2307.08691, algorithm 2). Nothing of the size T x S exists anywhere: see
`lljax.attention.tpu_visits` for the blocks that are visited, `lljax.attention.tpu_kernels` for the
kernels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lljax.attention import tpu_kernels
from lljax.attention.mask import Mask
from lljax.attention.tpu_kernels import Call


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
    blocks: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of q over k and v: the output, like q, and the log-sum-exp of each query's scores,
    float32. A query that sees nothing gets zeros, and FLOOR.

    interpret: run the kernels as plain XLA, on any platform; slow. blocks: (queries, keys) of a
      block, for tests.
    """
    call = Call(q, k, v, mask, scale=scale, softcap=softcap, interpret=interpret, blocks=blocks)
    out, lse = tpu_kernels.forward(call)
    return call.rows(out), call.rows(jnp.swapaxes(lse, 3, 4))[..., 0]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    results: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
    d_out: Float[Array, "B T N H"],
    *,
    scale: float,
    softcap: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward` for q, k and v, given its results (output and log-sum-exp) and the
    gradient of its output.

    The results may be of attention over more keys than `k`: gradients over parts of the keys then
    add up to the whole.
    dtype: the dtype of the gradients; the sums are float32 in any case.
    """
    call = Call(q, k, v, mask, scale=scale, softcap=softcap, interpret=interpret, blocks=blocks)
    d_out, out = call.heads(d_out), call.heads(results[0])
    # float32: it is subtracted from large sums. In the kernels' layout: in the rows' layout the
    # compiler makes float32 copies of both, each twice the size of the residual.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, :, None]
    operands = d_out, call.statistic(results[1]), delta
    dq = tpu_kernels.backward_queries(call, *operands, dtype)
    dk, dv = tpu_kernels.backward_keys(call, *operands, dtype)
    return call.rows(dq), call.keys(dk), call.keys(dv)
