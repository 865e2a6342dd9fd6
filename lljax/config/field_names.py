"""The names of configuration fields: which one was meant, and what each is for."""

import difflib
import inspect
import re

from lljax.config.tree import CHECKS, default_config
from lljax.errors import short

OTHER_NAMES = {  # what other trainers call a field, in lower case
    "model.path": "model model_name_or_path",
    "model.dtype": "torch_dtype bf16 fp16 precision",
    "model.quantize": "load_in_4bit load_in_8bit quantization quantization_bit",
    "context.length": "context_length max_length max_seq_length max_seq_len seq_len cutoff_len",
    "context.schedule": "steps max_steps total_steps epochs num_epochs num_train_epochs attention",
    "context.rope.type": "rope_scaling",
    "context.group": "group_size_ratio group_size",
    "context.window": "sliding_window",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target",
    "lora.also_train": "modules_to_save",
    "lora.dora": "use_dora",
    "lora.rslora": "use_rslora",
    "lora.init": "init_lora_weights",
    "data.train": "dataset train_file train_files",
    "data.loss_on": "train_on_inputs train_on_prompt",
    "optimizer.name": "optim",
    "optimizer.learning_rate": "lr",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler",
    "optimizer.warmup_steps": "warmup warmup_ratio",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.clip_norm": "max_grad_norm grad_clip",
    "training.rows": "batch_size per_device_train_batch_size micro_batch_size",
    "training.accumulate": "gradient_accumulation gradient_accumulation_steps",
    "training.eval_every": "eval_steps",
    "memory.remat": "gradient_checkpointing",
    "checkpoint.every_steps": "save_steps",
    "checkpoint.keep": "save_total_limit",
    "mesh.sequence": "sequence_parallel sequence_parallel_size",
    "mesh.tensor": "tensor_parallel_size",
}
ALSO_CALLED = {name: field for field, names in OTHER_NAMES.items() for name in names.split()}


def unknown_field(name: str) -> str:
    """The error message for an unknown field; names the field that was probably meant."""
    if inside := next((field for field in CHECKS if field.startswith(f"{name}.")), None):
        return f"{name} is a group of fields: set them one by one, such as {inside}"
    last = name.rpartition(".")[2]
    likely = ALSO_CALLED.get(last.lower()) or next(
        iter(
            [
                *[field for field in CHECKS if field.rpartition(".")[2] == last],
                *difflib.get_close_matches(name, CHECKS, 1, 0.75),
                *_alike(last),
            ]
        ),
        None,
    )
    hint = f"did you mean {likely!r}?" if likely else "--help lists all of them"
    return f"there is no config field {short(name)}: {hint}"


def _alike(last: str) -> list[str]:
    """The field whose last part is most like `last`, if there is one."""
    by_last = {field.rpartition(".")[2]: field for field in CHECKS}
    return [by_last[near] for near in difflib.get_close_matches(last, by_last, 1)]


def comments() -> dict[str, str]:
    """The comment beside each field in the source of `default_config`, by its dotted name."""
    source = inspect.getsource(default_config)
    return dict(re.findall(r"^    c\.([\w.]+) = .*?  # (.+)$", source, re.MULTILINE))
