"""Bases that are quantized on disk, written here by their formats' definitions, against the values
those define.
"""

import functools
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from lljax.build import load_base
from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.export import export_merged
from lljax.interop.layouts import form_of
from lljax.interop.open import open_base
from lljax.models.declare import declared
from lljax.models.families import spec_from_hf
from lljax.models.quantize import DYNAMIC, NF4, Quantized, dequantize
from lljax.parallel.rounding import cdiv

RNG = np.random.default_rng(0)
F16, BF16, E4M3 = np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def words(codes, bits, axis):
    """int32 words of codes along an axis, low bits first."""
    codes = np.moveaxis(np.asarray(codes, np.uint32), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    packed = np.bitwise_or.reduce(codes << np.arange(0, 32, bits, dtype=np.uint32), axis=-1)
    return np.moveaxis(packed, -1, axis).view(np.int32)


# Each: (out, in) -> (tensors by the end of their name, the kernel [out, in] that they stand for).
def bnb(out, rows, nested=False):
    codes = RNG.integers(0, 16, (out, rows))
    scales = RNG.uniform(0.5, 2, out * rows // 64).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, rows]}
    tensors = {
        ".weight": (codes.reshape(-1, 2) << [4, 0]).sum(1, keepdims=True).astype(np.uint8),
        ".weight.quant_map": NF4,
        ".weight.absmax": scales,
    }
    if nested:
        q, outer = (
            RNG.integers(0, 256, len(scales)).astype(np.uint8),
            RNG.uniform(0.5, 2, cdiv(len(scales), 256)),
        )
        outer, offset = outer.astype(np.float32), np.float32(1.25)
        tensors |= {
            ".weight.absmax": q,
            ".weight.nested_absmax": outer,
            ".weight.nested_quant_map": DYNAMIC,
        }
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
        scales = DYNAMIC[q] * np.repeat(outer, 256)[: len(q)] + offset
    tensors[".weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(
        json.dumps(state).encode(), np.uint8
    )
    return tensors, (NF4[codes].reshape(-1, 64) * scales[:, None]).reshape(out, rows)


def gptq(out, rows, bits=4, group=32, sym=True, version=1):
    count = rows // group if group > 0 else 1
    codes, scales = (
        RNG.integers(0, 2**bits, (rows, out)),
        RNG.uniform(0.01, 0.1, (count, out)).astype(F16),
    )
    zeros = (
        np.full((count, out), 2 ** (bits - 1)) if sym else RNG.integers(1, 2**bits, (count, out))
    )
    groups = np.arange(rows) // (rows // count)
    return {
        ".qweight": words(codes, bits, 0),
        ".qzeros": words(zeros - (version == 1), bits, 1),
        ".scales": scales,
        ".g_idx": groups.astype(np.int32),
    }, ((codes - zeros[groups]) * scales.astype(np.float32)[groups]).T


def awq(out, rows, group=32):
    codes, zeros = RNG.integers(0, 16, (rows, out)), RNG.integers(0, 16, (rows // group, out))
    scales = RNG.uniform(0.01, 0.1, zeros.shape).astype(F16)

    def pack(x):
        return words(x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape), 4, 1)

    groups = np.arange(rows) // group
    return {".qweight": pack(codes), ".qzeros": pack(zeros), ".scales": scales}, (
        (codes - zeros[groups]) * scales.astype(np.float32)[groups]
    ).T


def packed(out, rows, bits=4, group=32, symmetric=True):
    half, count = 2 ** (bits - 1), rows // group if group else 1
    values, scales = (
        RNG.integers(-half, half, (out, rows)),
        RNG.uniform(0.01, 0.1, (out, count)).astype(BF16),
    )
    zeros = np.zeros((out, count), int) if symmetric else RNG.integers(-half, half, (out, count))
    tensors = {
        ".weight_packed": words(values + half, bits, 1),
        ".weight_scale": scales,
        ".weight_shape": np.array([out, rows], np.int64),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = words(zeros + half, bits, 0)
    groups = np.arange(rows) // (rows // count)
    return tensors, (values - zeros[:, groups]) * scales.astype(np.float32)[:, groups]


def fp8(out, rows, tall=128, wide=128, name=".weight_scale_inv"):
    weight = RNG.normal(size=(out, rows)).astype(E4M3)
    scale = RNG.uniform(0.5, 2, (cdiv(out, tall), cdiv(rows, wide))).astype(np.float32)
    whole = np.repeat(np.repeat(scale, tall, 0), wide, 1)[:out, :rows]
    return {".weight": weight, name: scale}, weight.astype(np.float32) * whole


def scheme(format, **weights):
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {"dynamic": False, "actorder": None, "symmetric": True} | weights,
            }
        },
    }


BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
KINDS = {  # name: (writer, quantization_config, the format that holds it)
    "bnb": (bnb, BNB, "nf4"),
    "bnb double": (
        functools.partial(bnb, nested=True),
        BNB | {"bnb_4bit_use_double_quant": True},
        "nf4-double",
    ),
    "gptq": (gptq, GPTQ, "int4"),
    "gptq 8 bits, asymmetric": (
        functools.partial(gptq, bits=8, sym=False),
        GPTQ | {"bits": 8, "sym": False},
        "int8",
    ),
    "gptq one group, v2": (
        functools.partial(gptq, group=-1, version=2),
        GPTQ | {"group_size": -1, "checkpoint_format": "gptq_v2"},
        "int4",
    ),
    "awq": (awq, AWQ, "int4"),
    "W4A16": (packed, scheme("pack-quantized", **INT4), "int4"),
    "W4A16 asymmetric": (
        functools.partial(packed, symmetric=False),
        scheme("pack-quantized", **INT4 | {"symmetric": False}),
        "int4",
    ),
    "W8A16 by channel": (
        functools.partial(packed, bits=8, group=None),
        scheme("pack-quantized", num_bits=8, type="int", strategy="channel", group_size=None),
        "int8",
    ),
    "fp8 by tensor": (
        functools.partial(fp8, tall=999, wide=999, name=".weight_scale"),
        scheme("float-quantized", num_bits=8, type="float", strategy="tensor"),
        "fp8",
    ),
    "fp8 by channel": (
        functools.partial(fp8, tall=1, wide=999, name=".weight_scale"),
        scheme("float-quantized", num_bits=8, type="float", strategy="channel"),
        "fp8",
    ),
    "fp8 in blocks": (fp8, FP8, "fp8"),
}


@pytest.fixture
def quantized(hf_folder):
    """make(kind) -> (a folder whose kernels are quantized, {name: the kernel that each stands
    for}).
    """

    def make(kind, **changes):
        writer, config, _ = KINDS[kind]
        # blocks that a side does not fill
        D, F, N = (96, 160, 6) if "fp8" in kind else (128, 192, 4)
        folder = hf_folder(
            hidden_size=D,
            intermediate_size=F,
            num_attention_heads=N,
            num_key_value_heads=2,
            name=kind,
        )
        base, tensors, dense = open_base(str(folder)), {}, {}
        for name in base.names():
            if name.endswith("_proj.weight"):
                parts, dense[name] = writer(*base.shape(name))
                tensors |= {
                    name.removesuffix(".weight") + end: np.ascontiguousarray(part)
                    for end, part in parts.items()
                }
            else:
                tensors[name] = np.array(base.read(name))
        tensors |= {
            name: change(tensors[name]) for name, change in changes.pop("tensors", {}).items()
        }
        safetensors.write(
            folder / "model.safetensors",
            safetensors.layout(tensors.items()),
            lambda name: tensors[name],
        )
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(content | {"quantization_config": config | changes})
        )
        return folder, dense

    return make


def assert_equal_bits(got, wanted):
    got = np.asarray(got)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.asarray(wanted, np.float32))


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_what_the_format_defines_dense_and_as_they_are_stored(quantized, kind):
    folder, dense = quantized(kind)
    base = open_base(str(folder))
    plain = {name for name in base.names() if name not in dense}
    assert set(dense) <= set(base.names()) and all(
        name.endswith("norm.weight") or "embed" in name for name in plain
    )
    for name, wanted in dense.items():
        assert base.shape(name) == wanted.shape and base.dtype(name) == np.float32
        assert_equal_bits(base.read(name), wanted)
    format = KINDS[kind][2]
    model = load_base(base, spec_from_hf(base.config), jnp.float32, format)
    held = 0
    for _, variable in declared(model):
        value = variable.get_value()
        if isinstance(value, Quantized):
            held += 1
            assert value.form == form_of(format, base.config)
            for i, kernel in enumerate(np.asarray(dequantize(value, jnp.float32))):
                wanted = dense[variable.get_metadata("hf").format(layer=i)].T
                if format == "nf4-double":  # the compiler may round a product and a sum once
                    np.testing.assert_allclose(kernel, wanted, rtol=3e-6, atol=1e-6)
                else:
                    assert_equal_bits(kernel, wanted)
    assert held == 7


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(hf_folder):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = hf_folder("gpt_oss", False, hidden_size=64, intermediate_size=32)
    base, tensors, dense = open_base(str(folder)), {}, {}
    for name in base.names():
        if name.endswith(("gate_up_proj", "experts.down_proj")):
            E, rows, out = base.shape(name)
            packed = {
                "_blocks": RNG.integers(0, 256, (E, out, rows // 32, 16), np.uint8),
                "_scales": RNG.integers(120, 130, (E, out, rows // 32), np.uint8),
            }
            tensors |= {name + part: array for part, array in packed.items()}
            dense[name] = convert_moe_packed_tensors(
                *(torch.from_numpy(array) for array in packed.values())
            )
        else:
            tensors[name] = np.array(base.read(name))
    safetensors.write(
        folder / "model.safetensors",
        safetensors.layout(tensors.items()),
        lambda name: tensors[name],
    )
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    base = open_base(str(folder))
    for name, wanted in dense.items():
        assert base.shape(name) == wanted.shape
        np.testing.assert_array_equal(base.read(name).astype(np.float32), wanted.float().numpy())
    experts = load_base(base, spec_from_hf(base.config), jnp.float32, "none").layers[0].mlp.experts
    both = dense["model.layers.0.mlp.experts.gate_up_proj"].float().numpy()
    np.testing.assert_array_equal(experts.gate_proj.kernel[0], both[..., ::2])
    np.testing.assert_array_equal(experts.up_proj.kernel[0], both[..., 1::2])


def test_another_format_quantizes_anew_and_none_is_dense(quantized):
    folder, dense = quantized("gptq")
    base = open_base(str(folder))
    values = {
        format: load_base(base, spec_from_hf(base.config), jnp.float32, format)
        .layers[0]
        .mlp.up_proj.kernel.get_value()
        for format in ("none", "int8")
    }
    wanted = dense["model.layers.0.mlp.up_proj.weight"].T
    assert_equal_bits(values["none"][0], wanted)
    assert (
        0
        < np.abs(dequantize(values["int8"], jnp.float32)[0] - wanted).max()
        < np.abs(wanted).max() / 127
    )


def test_merging_into_a_quantized_base_writes_a_dense_one(quantized, trained, logits, tmp_path):
    folder, _ = quantized("W4A16")
    base, model = trained(folder, also_train=())
    export_merged(model, base, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    np.testing.assert_allclose(logits(merged), logits(model), atol=2e-3)


@pytest.mark.parametrize(
    "kind,changes,line",
    [
        ("gptq", {"bits": 3}, "GPTQ of 3 bits is not supported"),
        ("gptq", {"desc_act": True}, "act-order"),
        (
            "gptq",
            {"tensors": {"model.layers.0.mlp.up_proj.g_idx": lambda x: x[::-1].copy()}},
            "g_idx is out of order",
        ),
        (
            "gptq",
            {"tensors": {"model.layers.0.mlp.up_proj.qweight": lambda x: x[:-1]}},
            "up_proj.*(needs int32|makes it)",
        ),
        (
            "gptq",
            {"tensors": {"model.layers.0.mlp.up_proj.qzeros": lambda x: x[:-1]}},
            "up_proj.qzeros'.*needs int32",
        ),
        ("gptq", {"quant_method": "hqq"}, "quant_method='hqq' is none of"),
        ("awq", {"bits": 8}, "AWQ of 8 bits"),
        ("bnb", {"load_in_4bit": False, "load_in_8bit": True}, "this is 8 bits"),
        ("bnb", {"bnb_4bit_quant_type": "fp4"}, "this is 'fp4'"),
        (
            "bnb",
            {"tensors": {"model.layers.1.mlp.down_proj.weight": lambda x: x[:-7]}},
            "down_proj.weight'.*needs uint8",
        ),
        ("W4A16", {"format": "marlin-24"}, "'marlin-24'.*is not supported"),
        ("W4A16", scheme("pack-quantized", **INT4 | {"actorder": "group"}), "act-order"),
        ("W4A16", scheme("pack-quantized", **INT4 | {"num_bits": 2}), "2 bits.*is not supported"),
        ("fp8 in blocks", {"weight_block_size": None}, "weight_block_size=None is not supported"),
        (
            "fp8 in blocks",
            {
                "tensors": {
                    "model.layers.0.self_attn.q_proj.weight_scale_inv": lambda x: np.repeat(x, 2, 0)
                }
            },
            "weight_scale_inv'.*needs float32",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(quantized, kind, changes, line):
    with pytest.raises(ModelError, match=line) as error:
        base = open_base(str(quantized(kind, **dict(changes))[0]))
        load_base(base, spec_from_hf(base.config), jnp.float32, KINDS[kind][2])
    assert "\n" not in str(error.value)


def test_a_head_beside_a_tied_embedding_is_the_head_of_a_quantized_base_too(quantized):
    folder, _ = quantized("gptq")
    file = safetensors.File(folder / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.entries}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    safetensors.write(
        folder / "model.safetensors",
        safetensors.layout(tensors.items()),
        lambda name: tensors[name],
    )
    base = open_base(str(folder))
    model = load_base(base, spec_from_hf(base.config), jnp.float32, "int4")
    np.testing.assert_array_equal(model.head, tensors["lm_head.weight"])
