"""What vLLM makes of exports, on a CPU: vllm_judge.py IN.json OUT.npz.

See test_vllm_reads.py. vLLM parses the commands, builds the models for an H100, loads their weights
and reads the adapters; nothing is computed, since its kernels need the device.
"""

import importlib.machinery
import json
import os
import shlex
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch


class Kernels:
    """In place of vLLM's compiled operators: each is there, and says yes if asked for support."""

    importing = True

    def __getattr__(self, name):
        if self.importing and "support" not in name:
            raise AttributeError(name)
        kernel = lambda *_, **__: True
        kernel.default = kernel
        return kernel


KERNELS = Kernels()
torch.ops._C = torch.ops._moe_C = KERNELS
for name in (
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)

import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class H100(CudaPlatformBase):
    """The device that vLLM plans for."""

    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100")
    get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
    num_compute_units = classmethod(lambda cls, device_id=0: 132)
    log_warnings = classmethod(lambda cls: None)
    is_pin_memory_available = classmethod(lambda cls: False)


vllm.platforms._current_platform = H100()

from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.distributed import (  # noqa: E402
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.entrypoints.common.cli_args import make_arg_parser  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.utils import (  # noqa: E402
    get_supported_lora_modules,
    process_packed_modules_mapping,
)
from vllm.lora.worker_manager import WorkerLoRAManager  # noqa: E402
from vllm.model_executor.layers.quantization.auto_awq import (  # noqa: E402
    _convert_awq_to_standard_format,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    unpack_quantized_values_into_int32,
)
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.scalar_type import scalar_types  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

PARSER = make_arg_parser(FlexibleArgumentParser())


def parse(command: str):
    """The arguments and model configuration of `[NAME=VALUE ...] vllm serve ...`."""
    words = shlex.split(command.removeprefix("# "))
    start = words.index("vllm")
    os.environ.pop("VLLM_ALLOW_LONG_MAX_MODEL_LEN", None)
    os.environ.update(word.split("=", 1) for word in words[:start])
    assert words[start + 1] == "serve", words
    arguments = PARSER.parse_args(words[start + 2 :] + ["--enforce-eager"])
    arguments.model = arguments.model_tag
    return arguments, AsyncEngineArgs.from_cli_args(arguments).create_model_config()


def build(model_config):
    """The model with its weights, and the parameters that the checkpoint did not have."""
    config = VllmConfig(
        model_config=model_config,
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(),
    )
    KERNELS.importing = False
    torch.set_default_dtype(model_config.dtype)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        destroy_model_parallel()  # groups of experts exist for models that have them
        initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config)
        named = {name for name, _ in model.named_parameters()}
        loader = get_model_loader(config.load_config)
        missing = named - set(model.load_weights(loader.get_all_weights(model_config, model)))
    return model, missing


def methods(model) -> dict[str, str]:
    """How each module holds its weights."""
    return {
        name: type(getattr(module, "scheme", module.quant_method)).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


def values(layer) -> np.ndarray:
    """The kernel [out, in] of a linear layer, by vLLM's own unpacking of what it loaded."""
    part = dict(layer.named_parameters())
    if "weight_packed" in part:
        packed, scale, zero = part["weight_packed"], part["weight_scale"], None
        bits = 32 * packed.shape[1] // layer.input_size
        kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
        codes = unpack_quantized_values_into_int32(packed, kind, 1) - kind.bias
    elif "qweight" in part and len(part["qweight"]) < layer.input_size:
        # gptq, whose zero points are not read
        bits = 32 * part["qweight"].shape[0] // layer.input_size
        kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
        codes = unpack_quantized_values_into_int32(part["qweight"], kind, 0).T - kind.bias
        scale, zero = part["scales"].T, None
    elif "qweight" in part:
        _convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
        kind = scalar_types.uint4
        codes = unpack_quantized_values_into_int32(layer.qweight, kind, 0).T
        zero = unpack_quantized_values_into_int32(layer.qzeros, kind, 0)
        scale = part["scales"].T
    else:
        codes, zero = part["weight"].float(), None
        scale = part["weight_scale"] if "weight_scale" in part else torch.ones(len(codes), 1)
    group = codes.shape[1] // scale.shape[1]
    if zero is not None:
        codes = codes - zero.repeat_interleave(group, 1)
    return (codes.float() * scale.float().repeat_interleave(group, 1)).detach().numpy()


def read_adapter(model, model_config, arguments) -> dict:
    """The factors that vLLM takes from the command's adapter: {module: [shapes, scale]}."""
    manager = types.SimpleNamespace(
        supported_lora_modules=get_supported_lora_modules(model),
        packed_modules_mapping=process_packed_modules_mapping(model),
        model=model,
        moe_ep_load_spec=None,
        _validate_moe_lora_format=lambda lora: None,
        _validate_classification_head_lora=lambda lora: None,
    )
    lora_config = LoRAConfig(max_lora_rank=arguments.max_lora_rank, lora_dtype=torch.float32)
    worker = types.SimpleNamespace(
        _adapter_manager=manager,
        _lora_model_cls=LoRAModel,
        lora_config=lora_config,
        max_position_embeddings=model_config.max_model_len,
        vocab_size=model_config.get_vocab_size(),
    )
    (module,) = arguments.lora_modules
    lora = WorkerLoRAManager._load_adapter(worker, LoRARequest(module.name, 1, module.path))
    fused = {
        name.replace(last, part)
        for name, _ in model.named_modules()
        for last in [name.rpartition(".")[2]]
        for part in manager.packed_modules_mapping.get(last, [last])
    }
    return {
        "unknown": sorted(set(lora.loras) - fused),
        "factors": {
            name: [list(weights.lora_a.shape), list(weights.lora_b.shape), weights.scaling]
            for name, weights in lora.loras.items()
        },
    }


def judge(case: dict) -> tuple[dict, dict[str, np.ndarray]]:
    arguments, model_config = parse(case["command"])
    report: dict = {"max_model_len": model_config.max_model_len}
    if case.get("parse_only"):
        return report, {}
    model, missing = build(model_config)
    report |= {"methods": methods(model), "missing": sorted(missing)}
    if arguments.lora_modules:
        report["adapter"] = read_adapter(model, model_config, arguments)
    return report, {name: values(model.get_submodule(name)) for name in case.get("values", [])}


reports, arrays = {}, {}
for name, case in json.load(open(sys.argv[1])).items():
    try:
        reports[name], kernels = judge(case)
        arrays |= {f"{name} {module}": kernel for module, kernel in kernels.items()}
    except Exception as error:
        reports[name] = {"error": f"{type(error).__name__}: {error}"}
np.savez(sys.argv[2], reports=json.dumps(reports), **arrays)
