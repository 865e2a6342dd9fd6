"""Writers of quantized kernels, against our readers and against unpackers written from the
descriptions of the formats.
"""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantized_folders import quantize_folder, random_codes, write_kernels

from lljax.build import load_base
from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.layouts import (
    WRITERS,
    Codes,
    Kernel,
    Scheme,
    layout_of,
)
from lljax.interop.open import open_base
from lljax.models.families import spec_from_hf
from lljax.models.quantize import Quantized, dequantize

F16, BF16 = np.float16, ml_dtypes.bfloat16
INT4, INT8, FP8 = Scheme(4, group=32), Scheme(8, group=32), Scheme(8, "float", -1)
SCHEMES = {  # name: (layout, scheme, out, in)
    "W4A16": ("compressed-tensors", INT4, 24, 96),
    "W8A16": ("compressed-tensors", INT8, 24, 96),
    "W4A16, odd outputs": ("compressed-tensors", INT4, 7, 64),
    "W8A16 by channel, words that are not full": (
        "compressed-tensors",
        Scheme(8, group=-1),
        5,
        99,
    ),
    "W4A16 by channel, words that are not full": (
        "compressed-tensors",
        Scheme(4, group=-1),
        5,
        99,
    ),
    "fp8": ("compressed-tensors", FP8, 7, 99),
    "gptq": ("gptq", INT4, 24, 96),
    "gptq of 8 bits": ("gptq", INT8, 12, 96),
    "gptq by channel": ("gptq", Scheme(4, group=-1), 24, 96),
    "awq": ("awq", Scheme(4, group=32, symmetric=False), 24, 96),
    "awq, symmetric": ("awq", INT4, 16, 64),
    "awq by channel": ("awq", Scheme(4, group=-1, symmetric=False), 24, 96),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_our_reader_gives_back_every_bit(tmp_path, name):
    layout, scheme, out, rows = SCHEMES[name]
    codes, values = random_codes(layout, scheme, out, rows)
    parts = WRITERS[layout].tensors(codes, scheme)
    assert all(part.flags.c_contiguous for part in parts.values())
    write_kernels(
        tmp_path,
        layout,
        scheme,
        {"a.q_proj" + end: part for end, part in parts.items()},
        ["a.q_proj"],
    )
    config = json.loads((tmp_path / "config.json").read_text())
    reader = layout_of(config)
    kernel = Kernel(str(tmp_path), "a.q_proj", safetensors.Folder(tmp_path))
    assert set(parts) <= set(reader.parts) and set(reader.marks) <= set(parts)
    assert reader.shape(kernel) == (out, rows)
    np.testing.assert_array_equal(reader.dense(kernel), values)
    held = reader.stored(kernel, reader.form)
    np.testing.assert_array_equal(dequantize(held, jnp.float32), values.T)


def bits_of(words, bits):
    """The codes of int32 words, low bits first, along a new last axis."""
    return words.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (
        (1 << bits) - 1
    )


@pytest.mark.parametrize("name", [name for name in SCHEMES if "gptq" in name])
def test_gptq_is_what_autogptq_unpacks(name):
    """AutoGPTQ `QuantLinear.forward`: qweight packed along in, qzeros along out and less one."""
    layout, scheme, out, rows = SCHEMES[name]
    codes, values = random_codes(layout, scheme, out, rows)
    parts = WRITERS[layout].tensors(codes, scheme)
    q = bits_of(parts[".qweight"], scheme.bits).transpose(0, 2, 1).reshape(rows, out)
    zeros = bits_of(parts[".qzeros"], scheme.bits).reshape(-1, out) + 1
    groups = parts[".g_idx"]
    dense = (q.astype(np.float32) - zeros[groups]) * parts[".scales"].astype(np.float32)[groups]
    assert parts[".scales"].dtype == F16 and groups.dtype == np.int32
    np.testing.assert_array_equal(dense.T, values)
    if scheme.bits == 4:
        assert set(parts[".qzeros"].view(np.uint32).reshape(-1)) == {0x77777777}


@pytest.mark.parametrize("name", [name for name in SCHEMES if "awq" in name])
def test_awq_is_what_autoawq_unpacks(name):
    """AutoAWQ `WQLinear_GEMM.from_linear`: nibble i of a word is output [0,2,4,6,1,3,5,7][i]."""
    layout, scheme, out, rows = SCHEMES[name]
    codes, values = random_codes(layout, scheme, out, rows)
    parts = WRITERS[layout].tensors(codes, scheme)
    dense = np.empty((rows, out), np.float32)
    groups = np.arange(rows) // (rows if scheme.group == -1 else scheme.group)
    for column in range(0, out, 8):
        for i, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            q = bits_of(parts[".qweight"][:, column // 8], 4)[:, i].astype(np.float32)
            zero = bits_of(parts[".qzeros"][:, column // 8], 4)[:, i]
            scale = parts[".scales"][:, column + output].astype(np.float32)
            dense[:, column + output] = (q - zero[groups]) * scale[groups]
    np.testing.assert_array_equal(dense.T, values)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "family,layout,scheme,format",
    [
        ("llama", "compressed-tensors", INT4, "int4"),
        ("llama", "compressed-tensors", FP8, "fp8"),
        ("qwen3_moe", "compressed-tensors", INT4, "int4"),
        ("qwen3_moe", "gptq", INT8, "int8"),
        ("qwen3_moe", "awq", Scheme(4, group=32, symmetric=False), "int4"),
    ],
)
def test_a_folder_is_a_base_that_holds_the_codes(
    hf_folder, tmp_path, family, layout, scheme, format
):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    sizes |= {"moe_intermediate_size": 96} if family == "qwen3_moe" else {}
    folder = hf_folder(family, False, **sizes)
    values = quantize_folder(folder, tmp_path / "quantized", layout, scheme)
    base = open_base(str(tmp_path / "quantized"))
    assert set(base.names()) == set(open_base(str(folder)).names())
    for name, wanted in values.items():
        np.testing.assert_array_equal(base.read(name), wanted)
    assert not any("mlp.gate." in name or "lm_head" in name for name in values)
    if family == "qwen3_moe":
        assert sum(".experts." in name for name in values) >= 12
    model = load_base(base, spec_from_hf(base.config), jnp.float32, format)
    held = model.layers[0].self_attn.o_proj.kernel.get_value()
    assert isinstance(held, Quantized)
    np.testing.assert_array_equal(
        dequantize(held, jnp.float32)[0], values["model.layers.0.self_attn.o_proj.weight"].T
    )


@pytest.mark.parametrize(
    "layout,scheme,reason",
    [
        ("compressed-tensors", Scheme(4, group=128, symmetric=False), "symmetric"),
        ("compressed-tensors", Scheme(3), "use 4 or 8"),
        ("compressed-tensors", Scheme(4, group=16), "use 32, 64 or 128"),
        ("compressed-tensors", Scheme(8, "float", 128), "one scale for each output"),
        ("compressed-tensors", Scheme(4, "float", -1), "8 bits"),
        ("gptq", Scheme(4, symmetric=False), "layout awq"),
        ("gptq", FP8, "compressed-tensors"),
        ("gptq", Scheme(2), "use 4 or 8"),
        ("awq", Scheme(8), "4 bits"),
        ("awq", FP8, "4 bits"),
        ("awq", Scheme(4, group=256), "use 32, 64 or 128"),
    ],
)
def test_a_scheme_that_a_format_cannot_hold_is_refused(layout, scheme, reason):
    assert reason in WRITERS[layout].refuses(scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_schemes_of_this_file_are_not_refused(name):
    layout, scheme, out, rows = SCHEMES[name]
    assert WRITERS[layout].refuses(scheme) == ""
    assert WRITERS[layout].refuses_shape(out, rows, scheme) == ""


def test_shapes_that_a_format_cannot_hold_are_named():
    ct, gptq, awq = (WRITERS[name] for name in ("compressed-tensors", "gptq", "awq"))
    assert "576 inputs are no multiple" in ct.refuses_shape(64, 576, Scheme(4))
    assert ct.refuses_shape(3, 128, Scheme(4)) == ""
    assert "3 outputs" in gptq.refuses_shape(3, 128, Scheme(4))
    assert gptq.refuses_shape(4, 128, Scheme(8)) == ""
    assert "4 outputs" in gptq.refuses_shape(4, 128, Scheme(4))
    assert "99 inputs" in awq.refuses_shape(8, 99, Scheme(4, group=-1))


def test_dense_modules_have_the_names_that_each_reader_looks_for():
    quantized = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    dense = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.1.up_proj"]
    config = {name: WRITERS[name].config(INT4, quantized, dense) for name in WRITERS}
    assert config["compressed-tensors"]["ignore"] == dense
    assert "model.layers.0.mlp.experts" in config["awq"]["modules_to_not_convert"]
    rules = [rule.removeprefix("-:") for rule in config["gptq"]["dynamic"]]

    def skipped(name):
        return any(re.match(rule, name) for rule in rules)

    assert all(map(skipped, [*dense, "model.layers.0.mlp.experts"]))
    assert not any(map(skipped, [*quantized, "model.layers.0.mlp.gate_up_proj"]))
    assert config["gptq"]["modules_in_block_to_quantize"] == [["mlp.down_proj"]]
    experts = ["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.self_attn.q_proj"]
    assert WRITERS["gptq"].config(INT4, experts, dense[:2])["modules_in_block_to_quantize"] == [
        ["self_attn.q_proj", "up_proj"]
    ]
    plain = WRITERS["gptq"].config(INT4, quantized, ["lm_head"])
    assert "modules_in_block_to_quantize" not in plain
    assert WRITERS["gptq"].files(INT4, quantized, dense) == {"quantize_config.json": config["gptq"]}


def test_codes_that_are_not_of_the_scheme_are_errors():
    codes, _ = random_codes("awq", Scheme(4, group=32, symmetric=False), 8, 64)
    with pytest.raises(ValueError, match="scales and zeros of shapes"):
        WRITERS["awq"].tensors(codes, INT4)  # zeros in a symmetric scheme
    with pytest.raises(ValueError, match="scales and zeros of shapes"):
        WRITERS["awq"].tensors(Codes(codes.codes, codes.scale[:, :1]), INT4)
    with pytest.raises(ValueError, match="a code of 16 in 4 bits"):
        WRITERS["gptq"].tensors(Codes(np.full((8, 64), 16, np.uint8), codes.scale), INT4)
    with pytest.raises(ValueError, match="needs float8_e4m3fn"):
        WRITERS["compressed-tensors"].tensors(Codes(codes.codes, codes.scale[:, :1]), FP8)


def test_gptq_rules_that_change_a_kernel_are_not_read(tmp_path):
    config = WRITERS["gptq"].config(INT4, [], ["lm_head"])
    with pytest.raises(ModelError, match="alike in all"):
        layout_of({"quantization_config": config | {"dynamic": {"+:.*down_proj": {"bits": 8}}}})
