"""The names of the fields of a configuration: which one was meant, and what each is for."""

import difflib
import inspect
import re

from lljax.config import CHECKS, default_config
from lljax.errors import short

ALSO_CALLED = {                              # what other trainers call a field, in lower case
    "lr": "optimizer.learning_rate", "max_grad_norm": "optimizer.clip_norm", "warmup": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps", "lr_scheduler_type": "optimizer.schedule",
    "adam_beta1": "optimizer.beta1", "adam_beta2": "optimizer.beta2", "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.name", "batch_size": "training.rows", "per_device_train_batch_size": "training.rows",
    "micro_batch_size": "training.rows", "gradient_accumulation_steps": "training.accumulate",
    "gradient_accumulation": "training.accumulate", "eval_steps": "training.eval_every",
    "steps": "context.schedule", "max_steps": "context.schedule", "total_steps": "context.schedule",
    "epochs": "context.schedule", "num_train_epochs": "context.schedule", "context_schedule": "context.schedule",
    "max_length": "context.length", "max_seq_length": "context.length", "seq_len": "context.length",
    "cutoff_len": "context.length", "context_length": "context.length", "rope_scaling": "context.rope.type",
    "attention": "context.schedule", "group_size_ratio": "context.group", "sliding_window": "context.window",
    "r": "lora.rank", "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "target_modules": "lora.targets", "modules_to_save": "lora.also_train",
    "use_dora": "lora.dora", "use_rslora": "lora.rslora", "init_lora_weights": "lora.init",
    "model": "model.path", "model_name_or_path": "model.path", "torch_dtype": "model.dtype", "bf16": "model.dtype",
    "precision": "model.dtype", "load_in_4bit": "model.quantize", "quantization": "model.quantize",
    "dataset": "data.train", "train_file": "data.train", "train_on_inputs": "data.loss_on",
    "gradient_checkpointing": "memory.remat", "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep", "sequence_parallel": "mesh.sequence",
    "sequence_parallel_size": "mesh.sequence", "tensor_parallel_size": "mesh.tensor",
}


def unknown_field(name: str) -> str:
    """The line about a field that there is not: with the field that was probably meant."""
    last = name.rpartition(".")[2]
    likely = ALSO_CALLED.get(last.lower()) or next(iter([
        *[field for field in CHECKS if field.rpartition(".")[2] == last],
        *difflib.get_close_matches(name, CHECKS, 1, 0.75), *_alike(last)]), None)
    hint = f"did you mean {likely!r}?" if likely else "--help lists all of them"
    return f"there is no config field {short(name)}: {hint}"


def _alike(last: str) -> list[str]:
    """The field whose last part is most like `last`, if any is."""
    by_last = {field.rpartition(".")[2]: field for field in CHECKS}
    return [by_last[near] for near in difflib.get_close_matches(last, by_last, 1)]


def comments() -> dict[str, str]:
    """What the source of `default_config` says of each field, by its dotted name."""
    found = re.findall(r"^    c\.([\w.]+) = .*?  # (.+)$", inspect.getsource(default_config), re.MULTILINE)
    return {field: comment for field, comment in found}
