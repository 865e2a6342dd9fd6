"""Folders with kernels quantized at random by the writers of lljax.interop.layouts."""

import json

import ml_dtypes
import numpy as np

from lljax.interop import safetensors
from lljax.interop.layouts import WRITERS, Codes
from lljax.interop.open import open_base

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def random_codes(layout, scheme, out, rows, dtype=BF16, seed=0):
    """Codes of a random kernel, the extremes among them, and its values float32 [out, in]."""
    rng = np.random.default_rng(seed)
    group = rows if scheme.group == -1 else scheme.group
    largest = 448 if scheme.kind == "float" else scheme.middle
    scale = rng.uniform(0.1, 0.4, (out, rows // group)).astype(np.float32) / largest
    scale = scale.astype(dtype).astype(WRITERS[layout].scale_dtype(dtype))
    whole = np.repeat(scale.astype(np.float32), group, axis=1)
    if scheme.kind == "float":
        codes = rng.normal(scale=100, size=(out, rows)).clip(-448, 448).astype(E4M3)
        codes[0, :2] = 448, -448
        return Codes(codes, scale), codes.astype(np.float32) * whole
    codes = rng.integers(0, 1 << scheme.bits, (out, rows), np.uint8)
    codes[0, :2] = 0, (1 << scheme.bits) - 1
    zero = None if scheme.symmetric else rng.integers(0, 16, scale.shape, np.uint8)
    if zero is not None:
        zero[0, 0] = 0
    zeros = scheme.middle if zero is None else np.repeat(zero, group, 1)
    return Codes(codes, scale, zero), (codes.astype(np.float32) - zeros) * whole


def write_kernels(folder, layout, scheme, tensors, quantized, dense=("lm_head",)):
    """A folder with these tensors and the layout's configuration."""
    folder.mkdir(exist_ok=True)
    writer = WRITERS[layout]
    safetensors.write(
        folder / "model.safetensors", safetensors.layout(tensors.items()), tensors.__getitem__
    )
    file = folder / "config.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    config = {"quantization_config": writer.config(scheme, quantized, dense)}
    file.write_text(json.dumps(content | config))
    for name, extra in writer.files(scheme, quantized, dense).items():
        (folder / name).write_text(json.dumps(extra))


def quantize_folder(base, out, layout, scheme, dtype=np.float32):
    """A folder with random codes in place of its kernels, and the values of the kernels by name."""
    folder = open_base(str(base))
    shapes = {
        name.removesuffix(".weight"): folder.shape(name)
        for name in folder.names()
        if name.endswith(".weight") and len(folder.shape(name)) == 2 and "embed" not in name
    }
    never = {name for name in shapes if name == "lm_head" or name.endswith("mlp.gate")}
    tensors, values = {}, {}
    for name in folder.names():
        module = name.removesuffix(".weight")
        if module in shapes and module not in never:
            codes, values[name] = random_codes(
                layout, scheme, *shapes[module], dtype, seed=len(values)
            )
            tensors |= {
                module + end: part for end, part in WRITERS[layout].tensors(codes, scheme).items()
            }
        else:
            tensors[name] = np.array(folder.read(name))
    out.mkdir()
    (out / "config.json").write_text((base / "config.json").read_text())
    quantized = [name.removesuffix(".weight") for name in values]
    write_kernels(out, layout, scheme, tensors, quantized, sorted(never))
    for file in base.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return values
