"""vLLM's own code on our exports: the commands that we print, which layers it holds quantized, the
weights that it loads, and the adapters that it takes. See vllm_judge.py.

`make .venv/vllm` makes the environment; LLJAX_VLLM_PYTHON names another interpreter.
"""

import json
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from quantized_folders import quantize_folder

from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.layouts import Scheme

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LLJAX_VLLM_PYTHON", str(ROOT / ".venv" / "vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(PYTHON).exists(), reason="needs vLLM: `make .venv/vllm`, or LLJAX_VLLM_PYTHON"
    ),
]
INT4 = Scheme(4, group=128)
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = ("llama", SIZES | {"intermediate_size": 256})
MOE = ("qwen3_moe", SIZES | {"moe_intermediate_size": 64, "head_dim": 32})
QUANTIZED = {  # family and sizes, layout, scheme, vLLM's class of kernels, of down_proj or experts
    "W4A16": (
        LLAMA,
        "compressed-tensors",
        INT4,
        "CompressedTensorsWNA16",
        "CompressedTensorsWNA16",
    ),
    "W8A16": (
        LLAMA,
        "compressed-tensors",
        Scheme(8, group=-1),
        "CompressedTensorsWNA16",
        "CompressedTensorsWNA16",
    ),
    "fp8": (
        LLAMA,
        "compressed-tensors",
        Scheme(8, "float", -1),
        "CompressedTensorsW8A8Fp8",
        "CompressedTensorsW8A8Fp8",
    ),
    "gptq": (LLAMA, "gptq", INT4, "AutoGPTQLinearMethod", "AutoGPTQLinearMethod"),
    "gptq of 8 bits": (
        LLAMA,
        "gptq",
        Scheme(8, group=64),
        "AutoGPTQLinearMethod",
        "AutoGPTQLinearMethod",
    ),
    "awq": (
        LLAMA,
        "awq",
        Scheme(4, group=128, symmetric=False),
        "AutoAWQMarlinLinearMethod",
        "AutoAWQMarlinLinearMethod",
    ),
    "experts W4A16": (
        MOE,
        "compressed-tensors",
        Scheme(4, group=32),
        "CompressedTensorsWNA16",
        "CompressedTensorsWNA16MoEMethod",
    ),
    "experts fp8": (
        MOE,
        "compressed-tensors",
        Scheme(8, "float", -1),
        "CompressedTensorsW8A8Fp8",
        "CompressedTensorsW8A8Fp8MoEMethod",
    ),
    "experts gptq": (
        MOE,
        "gptq",
        Scheme(4, group=64),
        "AutoGPTQLinearMethod",
        "AutoGPTQMoEMethod",
    ),
    "experts awq": (
        MOE,
        "awq",
        Scheme(4, group=64, symmetric=False),
        "AutoAWQMarlinLinearMethod",
        "AutoAWQMoEMethod",
    ),
}
O_PROJ = "model.layers.1.self_attn.o_proj"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
ROPES = {  # name: (type in the run, changes to the base's config)
    "linear": ("linear", {}),
    "yarn": ("yarn", {}),
    "dynamic": ("dynamic", {}),
    "llama3": ("keep", {"rope_parameters": LLAMA3, "max_position_embeddings": 256}),
}


def served(text):
    """The line that serves an export."""
    (line,) = [line for line in text.splitlines() if "vllm serve" in line]
    return line


def export_cases(folder, write_folder, train):
    """Commands by name, as exports print them, and some that vLLM has to refuse."""
    cases = {}
    for rope, (kind, changes) in ROPES.items():
        base, model = train(write_folder(folder / rope, tied=False, **changes), kind)
        command = served(export_merged(model, base, folder / f"{rope} merged"))
        cases[f"{rope} merged"] = {"command": command}
        bare = command.partition(" --max-model-len")[0]
        cases[f"{rope} derived"] = {"command": bare, "parse_only": True}
        beyond = f"{bare} --max-model-len 193"
        cases[f"{rope} beyond"] = {"command": beyond, "parse_only": True}
        base, model = train(folder / rope, kind, also_train=(), targets=("all-linear",))
        command = served(export_peft(model, base, folder / f"{rope} peft"))
        cases[f"{rope} peft"] = {"command": command}
    base, model = train(folder / "linear", targets=("all-linear",), rank=9)
    command = served(export_split(model, base, folder / "split"))
    cases["split"] = {"command": command}
    cases["rank too high"] = {"command": command.replace("--max-lora-rank 16", "--max-lora-rank 8")}
    adapter = str(folder / "split" / "adapter")
    for name, options in {
        "trained embeddings": {},
        "dora": {"also_train": (), "dora": True},
        "pissa": {"also_train": (), "init": "pissa", "rslora": True},
    }.items():
        base, model = train(folder / "linear", **options)
        export_peft(model, base, folder / name)
        cases[name] = {"command": command.replace(adapter, f"'{folder / name}'")}
        cases[name]["command"] = cases[name]["command"].replace(
            f"adapter='{folder / name}'", f"'adapter={folder / name}'"
        )
    return cases


@pytest.fixture(scope="module")
def judged(tmp_path_factory, make_folder, trained):
    """{case: vLLM's report}, {case and module: kernel}, {case: our values by name}."""
    folder = tmp_path_factory.mktemp("vllm")
    values, cases = {}, export_cases(folder, make_folder, trained)
    for name, ((family, sizes), layout, scheme, *_) in QUANTIZED.items():
        base = make_folder(folder / f"{name} base", family, False, torch.bfloat16, **sizes)
        values[name] = quantize_folder(base, folder / name, layout, scheme, ml_dtypes.bfloat16)
        cases[name] = {"command": f"vllm serve '{folder / name}'", "values": [O_PROJ]}
    (folder / "in.json").write_text(json.dumps(cases))
    subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_judge.py"), "in.json", "out.npz"],
        cwd=folder,
        check=True,
        env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
    )
    arrays = dict(np.load(folder / "out.npz"))
    return json.loads(str(arrays.pop("reports"))), arrays, values


@pytest.mark.parametrize("name", QUANTIZED)
def test_vllm_loads_quantized_kernels_and_leaves_dense_ones(judged, name):
    reports, arrays, values = judged
    family, _, _, kernels, down = QUANTIZED[name]
    report = reports[name]
    assert "error" not in report, report
    assert not [n for n in report["missing"] if ".attn." not in n and not n.endswith("_bias")]
    held = {module.partition(".1.")[2]: kind for module, kind in report["methods"].items()}
    assert held["self_attn.qkv_proj"] == held["self_attn.o_proj"] == kernels
    assert report["methods"]["lm_head"].startswith("Unquantized")
    if family is MOE:
        assert held["mlp.gate"] == "UnquantizedLinearMethod"
        assert held["mlp.experts.routed_experts"] == down
    else:
        assert held["mlp.gate_up_proj"] == kernels and held["mlp.down_proj"].startswith(down)
    np.testing.assert_array_equal(arrays[f"{name} {O_PROJ}"], values[name][f"{O_PROJ}.weight"])


@pytest.mark.parametrize("rope", ROPES)
def test_vllm_takes_the_printed_commands_at_the_trained_length(judged, rope):
    reports = judged[0]
    assert reports[f"{rope} merged"]["missing"] == []
    assert reports[f"{rope} merged"]["max_model_len"] == 160
    assert reports[f"{rope} peft"]["max_model_len"] == 160
    factor = 3  # of 64 positions, in types whose factor vLLM multiplies by
    reach = 64 * factor if rope in ("linear", "dynamic") else 160
    assert reports[f"{rope} derived"]["max_model_len"] == reach
    assert "greater than the derived max_model_len" in reports[f"{rope} beyond"]["error"]


@pytest.mark.parametrize("name", [*(f"{rope} peft" for rope in ROPES), "split"])
def test_vllm_takes_plain_adapters(judged, name):
    adapter = judged[0][name]["adapter"]
    rank = 9 if name == "split" else 4
    assert adapter["unknown"] == [] and len(adapter["factors"]) == 2 * 7
    for (a, _), (_, b), scale in adapter["factors"].values():
        assert a == b == rank and scale == 8 / rank


def test_an_adapter_of_pissa_is_plain_lora_to_vllm(judged):
    adapter = judged[0]["pissa"]["adapter"]
    assert adapter["unknown"] == [] and len(adapter["factors"]) == 2 * 3
    assert all(a[0] == 8 for a, _, _ in adapter["factors"].values())


@pytest.mark.parametrize(
    "name,reason",
    [
        ("trained embeddings", "modules_to_save being either None"),
        ("dora", "does not yet support DoRA"),
        ("rank too high", "LoRA rank 9 is greater than max_lora_rank 8"),
    ],
)
def test_vllm_refuses_what_exports_say_it_refuses(judged, name, reason):
    assert reason in judged[0][name]["error"]
