"""llm-compressor's part of compress.py; needs llmcompressor and torch, and nothing of lljax.

python scripts/bench/compress_peer.py --model=FOLDER --rows=rows.npy --method=gptq --out=OUT

Quantizes every Linear but the head to four bits, symmetric, in groups of inputs, calibrated on the
token rows int32 [rows, T] of a .npy file, and writes OUT in compressed-tensors. Prints JSON on the
last line: {"seconds": of calibration and rounding, "peak_rss": bytes, "loaded_rss": its value when
the model was loaded, "version"}.
"""

import argparse
import importlib.metadata
import json
import resource
import time
from pathlib import Path

import datasets  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
import transformers
from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]
    GPTQModifier,
    QuantizationModifier,
)
from llmcompressor.modifiers.transform.awq import (  # pyright: ignore[reportMissingImports]
    AWQModifier,
)


def recipe(method: str, group: int) -> list:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    rounding = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return [AWQModifier(), rounding] if method == "awq" else [rounding]


def peak_rss() -> int:
    """Bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder as transformers saves it")
    parser.add_argument("--rows", required=True, help="a .npy file of token rows, int32 [rows, T]")
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), required=True)
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--dtype", default="float32", help="of the weights while they calibrate")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    flags = parser.parse_args()

    if not torch.accelerator.is_available():  # AWQ pins its activations for one
        torch.Tensor.pin_memory = lambda self, device=None: self
    if flags.threads:
        torch.set_num_threads(flags.threads)
    rows = np.load(flags.rows)
    if rows.ndim != 2 or rows.dtype != np.int32:
        raise SystemExit(f"{flags.rows}: {rows.dtype} {list(rows.shape)}; int32 [rows, T] needed")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        flags.model, dtype=getattr(torch, flags.dtype)
    )
    calibration = datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    )
    loaded = peak_rss()
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=None if flags.method == "rtn" else calibration,
        recipe=recipe(flags.method, flags.group),
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        batch_size=1,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    model.save_pretrained(flags.out, save_compressed=True)
    for file in Path(flags.model).glob("token*"):
        (Path(flags.out) / file.name).write_bytes(file.read_bytes())
    measured = {"seconds": seconds, "peak_rss": peak_rss(), "loaded_rss": loaded}
    print(json.dumps(measured | {"version": importlib.metadata.version("llmcompressor")}))


if __name__ == "__main__":
    main()
