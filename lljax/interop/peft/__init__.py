"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from lljax.interop.peft.config import AdapterConfig, adapter_errors, read_adapter_config
from lljax.interop.peft.read import adapter_fingerprint, load_adapter, under_adapter, unties_head
from lljax.interop.peft.tensors import PREFIX, WEIGHTS
from lljax.interop.peft.write import write_adapter

__all__ = [
    "PREFIX",
    "WEIGHTS",
    "AdapterConfig",
    "adapter_fingerprint",
    "load_adapter",
    "adapter_errors",
    "read_adapter_config",
    "under_adapter",
    "unties_head",
    "write_adapter",
]
