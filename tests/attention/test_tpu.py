"""The tables and the cost of the TPU kernels; and, slowly, the kernels compiled for TPUs. Their
values: test_attend.py; the blocks that they visit: test_blocks.py.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from attention.cases import B, make

from lljax.attention import AttentionOptions, attend, causal, tpu_kernels, tpu_visits
from lljax.attention.blocks import block_pairs
from lljax.attention.mask import Mask


def call_of(q, k, v, mask, blocks):
    return tpu_kernels.Call(q, k, v, mask, scale=1.0, softcap=None, interpret=True, blocks=blocks)


def test_anchors_do_not_lengthen_every_visit():
    """One marker every 40 tokens; a late query visits its window and the anchors, nothing
    between.
    """
    mask = causal(B, 2048).replace(
        window=64, anchors=jnp.broadcast_to(jnp.arange(2048) % 40 == 0, (B, 2048))
    )
    q, k, v = make(2048, 1, 1)
    call = call_of(q, k, v, mask, (64, 64))
    visits = tpu_visits.of_queries(call.q_extremes, call.k_extremes)
    assert visits.longest <= 1 + 3  # 52 anchors fill one block; a window of 64 touches two or three


@pytest.mark.parametrize("changes", [{}, {"window": 96}, {"group": 128}])
def test_the_cost_counts_the_pairs_of_blocks_that_are_computed(changes):
    mask = causal(B, 512).replace(**changes)
    call = call_of(*make(512, 4, 2), mask, (64, 32))
    pairs = int(block_pairs(mask, 64, 32)[0].sum())
    assert tpu_kernels._cost(call, 2, []).flops == pairs * 64 * 32 * 4 * (2 * 2 * 16)


def test_a_million_tokens_take_little_scalar_memory():
    """The kernels' tables for window, groups, segments and branches at once, at 1M tokens; 1 MB is
    all there is.
    """
    x = jax.ShapeDtypeStruct((1, 2**20), jnp.int32)
    mask = Mask(x, x, x, x, q_trunks=x, window=512, group=8192)
    q = jax.ShapeDtypeStruct((1, 2**20, 4, 128), jnp.bfloat16)

    def table(q, mask):
        call = call_of(q, q, q, mask, None)
        return tpu_visits.of_queries(call.q_extremes, call.k_extremes).table

    assert jax.eval_shape(table, q, mask).size * 4 < 400_000


# ---------------------------------------------------------------- compiled
def compile_for(target: str) -> dict:
    """Temporary bytes of the gradient of attention under four masks, compiled for one chip of a
    TPU target.
    """
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    shape = functools.partial(
        jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    T, N, K, H = 32768, 32, 8, 128
    q, k, tokens = (
        shape((1, T, N, H), jnp.bfloat16),
        shape((1, T, K, H), jnp.bfloat16),
        shape((1, T), jnp.int32),
    )

    options = AttentionOptions(scale=H**-0.5, implementation="tpu", platform="tpu")

    def total(q, k, v, mask):
        return attend(q, k, v, mask, options).astype(jnp.float32).sum()

    cases = {
        "packed": Mask(tokens, tokens, tokens, tokens),
        "anchors": Mask(tokens, tokens, tokens, tokens, shape((1, T), jnp.bool_), window=4096),
        "branches": Mask(tokens, tokens, tokens, tokens, q_trunks=tokens),
        "shifted": Mask(tokens, tokens, group=8192, shift=4096),
    }
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    return {
        name: gradient.lower(q, k, k, mask).compile().memory_analysis().temp_size_in_bytes
        for name, mask in cases.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
def test_compiles_for_tpu_in_memory_linear_in_tokens(target):
    pytest.importorskip("libtpu")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, __file__, target], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # bytes; a byte for each of 32768 x 32768 pairs would be four times that
    queries = 32768 * 32 * 128 * 2
    temp = json.loads(done.stdout.splitlines()[-1])
    assert all(bytes < 3 * queries for bytes in temp.values()), temp


if __name__ == "__main__":
    print(json.dumps(compile_for(sys.argv[1])))
