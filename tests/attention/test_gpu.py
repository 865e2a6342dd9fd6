"""The Triton kernels compiled for GPUs that are not here. Their values: test_attend.py; the blocks
that they visit: test_blocks.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lljax.attention import gpu

COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from lljax.attention import AttentionOptions, Mask, attend
from lljax.hardware.targets import target
from lljax.parallel.sharding import make_mesh, replicated

one = replicated(make_mesh(devices=target(sys.argv[1]).devices()))

def temp(T, N=32, K=8, H=128):
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
    index = array(1, T, dtype=jnp.int32)
    options = AttentionOptions(scale=H ** -0.5, implementation="triton", platform="gpu")
    loss = lambda q, k, v, mask: attend(q, k, v, mask, options).astype(jnp.float32).sum()
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    operands = array(1, T, N, H), array(1, T, K, H), array(1, T, K, H), Mask(index, index)
    compiled = step.lower(*operands).compile()
    return compiled.memory_analysis().temp_size_in_bytes
# Pallas asks it what kind of GPU there is.
with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
    print(json.dumps([temp(32768), temp(65536)]))
"""


def cuda_plugin() -> int | None:
    """The major version of CUDA that jax's plugin here is for."""
    return next(
        (major for major in (13, 12) if importlib.util.find_spec(f"jax_cuda{major}_plugin")), None
    )


@pytest.mark.slow
@pytest.mark.skipif(cuda_plugin() is None, reason="jax has no CUDA plugin here")
@pytest.mark.parametrize("device", ["h100-80g", "a10-24g"])
def test_compiles_for_a_gpu_in_memory_that_grows_with_T_only(device):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": str(Path(gpu.__file__).parents[2]),
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, device], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    short, long = json.loads(run.stdout.splitlines()[-1])
    # three arrays like q; scores of one head would be 16 of them
    assert short < 3 * 32768 * 32 * 128 * 2
    assert long < 2.05 * short
