"""cuDNN's attention: the folding of groups against the dense reference, around XLA's attention
without a GPU; the refusals; the residuals of the backward pass; and, slowly, the program
for GPUs that are not there.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import OPTIONS, B, assert_equal, make, value_and_gradients
from attention.test_gpu import cuda_plugin
from jax.ad_checkpoint import checkpoint_policies

import lljax
from lljax.attention import attend, causal, cudnn, reference
from lljax.attention.attend import UnsupportedAttention, select
from lljax.attention.pattern import FULL
from lljax.attention.saved import SAVED, name_residuals
from lljax.models.decoder import Decoder

T = 300
ON_GPU = jax.default_backend() == "gpu"
GPU = OPTIONS.replace(platform="gpu")


def fold(q, k, v, mask, options):
    backend = "cudnn" if ON_GPU else "xla"
    return cudnn.attend(q, k, v, mask, options, implementation=backend)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "changes,N,K",
    [
        ({"window": 50}, 8, 2),
        ({"group": 70}, 9, 3),
        ({"group": 70, "shift": 35}, 6, 1),
        ({"group": 128, "shift": 64, "window": 30}, 8, 8),
        ({"group": 1000, "shift": 100}, 8, 2),
        ({"group": 1000, "shift": 500, "window": 1}, 8, 2),
    ],
    ids=str,
)
def test_groups_folded_into_the_batch_equal_the_dense_reference(changes, N, K):
    operands, mask = make(T, N, K), causal(B, T).replace(**changes)
    # cuDNN has no more bits
    here = [x.astype(jnp.bfloat16) for x in operands] if ON_GPU else operands
    there = [x.astype(jnp.float32) for x in here]
    assert_equal(
        value_and_gradients(fold, *here, mask),
        value_and_gradients(reference.attend, *there, mask),
        tolerance=0.05 if ON_GPU else 2e-5,
    )


# ---------------------------------------------------------------- the choice
def operands(H=64, dtype=jnp.bfloat16):
    return (
        jax.ShapeDtypeStruct((B, 8, 4, H), dtype),
        jax.ShapeDtypeStruct((B, 8, 2, H), dtype),
        causal(B, 8),
    )


def chosen(platform, q, k, mask):
    return select(q, k, mask, OPTIONS.replace(platform=platform))


def test_the_first_that_serves_is_taken():
    q, k, mask = operands()
    assert (
        chosen("gpu", q, k, mask)
        == chosen("gpu", q, k, mask.replace(window=2, group=4, shift=2))
        == "cudnn"
    )
    assert chosen("gpu", q, k, causal(B, 8, mask.q_index)) == "triton"
    assert chosen("tpu", q, k, mask) == "tpu"
    assert chosen("cpu", q, k, mask) == "blockwise"


@pytest.mark.parametrize(
    "reason,change",
    [
        ("float32, only bfloat16", {"dtype": jnp.float32}),
        ("heads of 192, only", {"H": 192}),
        ("heads of 12, only", {"H": 12}),
        ("out of order", lambda mask: mask.replace(k_index=mask.k_index)),
        (
            "several documents",
            lambda mask: mask.replace(q_segments=mask.q_index, k_segments=mask.q_index),
        ),
        ("anchors", lambda mask: mask.replace(window=2, anchors=mask.q_index < 1)),
    ],
)
def test_a_named_one_that_cannot_serve_says_why(reason, change):
    q, k, mask = operands(**change) if isinstance(change, dict) else operands()
    mask = mask if isinstance(change, dict) else change(mask)
    assert chosen("gpu", q, k, mask) == "triton"
    with pytest.raises(UnsupportedAttention, match=f"='cudnn' cannot serve .*{reason}"):
        attend(q, k, k, mask, GPU.replace(implementation="cudnn"))


@pytest.mark.parametrize(
    "flags,taken",
    [
        ("--xla_gpu_exclude_nondeterministic_ops=true --xla_x=1", "triton"),
        ("--xla_gpu_deterministic_ops", "triton"),
        ("--xla_gpu_deterministic_ops=false", "cudnn"),
    ],
)
def test_a_reproducible_program_does_without(flags, taken, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert chosen("gpu", *operands()) == taken


def test_the_decoder_promises_order_for_its_own_index_only():
    tokens = jnp.zeros((1, 6), jnp.int32)
    mask = functools.partial(Decoder._mask, None, tokens, tokens, None, pattern=FULL)
    assert mask(index=None).ordered
    assert not mask(index=tokens).ordered


# ---------------------------------------------------------------- memory.remat = "attention"
@jax.custom_vjp
def stand_in(q, k, v):
    """Attention whose gradient needs its output and statistics, like cuDNN's; `erf` marks
    a forward pass.
    """
    return _stand_in_forward(q, k, v)[0]


def _stand_in_forward(q, k, v):
    out = jax.lax.erf(q * k + v)
    return out, (q, k, v, jnp.zeros(0), out.sum((1, 3)), out)


def _stand_in_backward(saved, d_out):
    q, k, v, _, lse, out = saved
    return d_out * k * out, d_out * q * lse[:, None, :, None], d_out


stand_in.defvjp(_stand_in_forward, _stand_in_backward)


@pytest.mark.sample(2)
@pytest.mark.parametrize("names,passes", [((), 2), (SAVED, 1)])
def test_what_is_kept_by_name_is_not_computed_again(names, passes):
    q, k, v = make(16, 4, 4)

    def layer(x):
        return jnp.sin(name_residuals(stand_in, jnp.cos(x), 2 * k, 3 * v))

    policy = checkpoint_policies.save_only_these_names(*names)
    remat = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    gradient = jax.grad(lambda x: remat(x).sum())
    assert str(jax.make_jaxpr(gradient)(q)).count(" erf ") == passes
    np.testing.assert_allclose(gradient(q), jax.grad(lambda x: layer(x).sum())(q), rtol=1e-6)
    _, pullback = jax.vjp(remat, q)
    large = [x for x in jax.tree.leaves(pullback) if x.size >= q.size]
    assert len(large) == 3 + bool(names)  # q, k, v, and the output once


# ---------------------------------------------------------------- compiled without a GPU
COMPILE = """
import json, re, sys
import jax, jax.numpy as jnp
from lljax.attention import AttentionOptions, attend, attend_shifted, causal
from lljax.attention.pattern import Groups
from lljax.hardware.targets import target

one = jax.sharding.SingleDeviceSharding(target(sys.argv[1]).devices()[0])
T, N, K, H = 32768, 32, 8, 128
array = lambda heads: jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16, sharding=one)

def compiled(group=None, **changes):
    def loss(q, k, v):
        mask = causal(1, T).replace(**changes)
        options = AttentionOptions(scale=H ** -0.5, platform="gpu")
        if group is None:
            out = attend(q, k, v, mask, options)
        else:
            out = attend_shifted(q, k, v, mask, Groups(group, group // 2), options)
        return out.astype(jnp.float32).sum()
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    program = gradients.lower(array(N), array(K), array(K)).compile()
    calls = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
    return program.memory_analysis().temp_size_in_bytes, calls
changes = {}, {"window": 4096}, {"group": 8192}, {"group": 6000, "window": 1024}
print(json.dumps([compiled(**of) for of in changes]))
"""
STEP = """
import json, re, sys
import jax
from lljax.config import default_config
from lljax.interop.open import open_config
from lljax.planning import hlo, plan
from lljax.hardware.targets import target

def calls(device, kind, **changes):
    c = default_config()
    c.model.path, c.memory.remat = sys.argv[1], "attention"
    c.context.length, c.context.schedule = 4096, ((9, 4096, kind),)
    c.update_from_flattened_dict(changes)
    texts, read = [], hlo.collective_bytes
    hlo.collective_bytes = lambda text: texts.append(text) or read(text)
    plan.plan(c, open_config(c.model.path, "main"), target(device), plan.Options())
    hlo.collective_bytes = read
    return re.findall(r'custom_call_target="(__[^"]+)"', texts[0])
single = {"data.packing": False}
two = {"mesh.sequence": 2, "mesh.fsdp": 1, "mesh.context_parallel": "ulysses"}
print(json.dumps([
    calls("h100-80g", "full", **single), calls("h100-80g:2", "full", **single | two),
    calls("h100-80g", "shifted", **single), calls("h100-80g", "full"),
]))
"""
FORWARD, BACKWARD, TRITON = (
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward",
    "__gpu$xla.gpu.triton",
)


def in_another_process(program, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": str(Path(lljax.__file__).parents[1]),
    }
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


needs_compiler = pytest.mark.skipif(cuda_plugin() is None, reason="jax has no CUDA plugin here")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("device", ["h100-80g", "a100-80g"])
def test_compiles_for_a_gpu_with_nothing_dense(device):
    for temp, calls in in_another_process(COMPILE, device):
        assert sorted(set(calls)) == [FORWARD, BACKWARD] and calls.count(FORWARD) == calls.count(
            BACKWARD
        )
        # four arrays like q; scores of one head would be 8 of them
        assert temp < 4 * 32768 * 32 * 128 * 2


@pytest.mark.slow
@needs_compiler
def test_the_real_step_takes_it_for_rows_of_one_document():
    """And computes no forward pass twice where memory.remat keeps attention's results."""
    full, ulysses, shifted, packed = in_another_process(
        STEP, str(Path(lljax.__file__).parent / "assets" / "tiny-512")
    )
    assert sorted(full) == sorted(ulysses) == [FORWARD, BACKWARD]
    assert (
        set(shifted) == {FORWARD, BACKWARD}
        and shifted.count(FORWARD) == shifted.count(BACKWARD) > 1
    )
    assert set(packed) == {TRITON}
