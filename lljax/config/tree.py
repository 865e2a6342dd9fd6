"""The default configuration tree. Every run is this tree with some fields changed; `validate()`
refuses the rest.
"""

import os
import re
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from lljax.config.checks import (
    BELOW_ONE,
    INT32,
    TOKENS,
    above_zero,
    any_of,
    flag,
    number,
    one_of,
    pair,
    path,
    required,
    several,
    share,
    text,
    whole,
)
from lljax.config.shipped import shipped_asset
from lljax.errors import ConfigError, short

# A ConfigDict with the fields of default_config; type checkers know none of its attributes.
Config: TypeAlias = Any


def default_config() -> Config:
    c = ConfigDict()
    c.seed = 0                               # of initialisation, shuffling and dropout
    c.train_type = "lora"                    # lora | full (every weight)

    c.model = ConfigDict()
    c.model.path = ""                        # hub id, folder with config.json and safetensors, or a GGUF file
    c.model.revision = "main"                # branch, tag or commit, where path is a hub id
    c.model.init = "pretrained"              # pretrained | random (config.json and tokenizer are all that is read)
    c.model.dtype = "bfloat16"               # bfloat16 | float32: frozen weights and compute; trainable ones stay float32
    c.model.matmul = "default"               # default | fp8: products with frozen kernels in eight bits, not those of experts
    c.model.quantize = "none"                # none | nf4 | nf4-double | int4 | int8 | fp8: how the frozen kernels are held

    c.context = ConfigDict()
    c.context.length = 8192                  # tokens the finished model is to read
    c.context.schedule = ((1000, 8192, "full"),)  # stages (until_step, length, full | shifted | window)
    c.context.rope = ConfigDict(type_safe=False)  # so that factor takes a word or a number
    c.context.rope.type = "yarn"             # keep (as it is) | linear | dynamic | yarn; on such a base: llama3 | longrope
    c.context.rope.factor = "auto"           # auto: ceil(length / original length), or a number >= 1
    c.context.group = 0.25                   # shifted: below 1 a share of the row, from 2 up a number of tokens
    c.context.window = 4096                  # window: tokens each token sees behind it, itself included
    c.context.anchors = 64                   # window: first tokens of each document that every later one sees
    c.context.anchor_markers = ()            # window: strings, one token each, whose every occurrence is seen too

    c.lora = ConfigDict()
    c.lora.rank = 8                          # columns of A, rows of B
    c.lora.alpha = 16.0                      # the update is alpha / rank * A B
    c.lora.dropout = 0.0                     # share of the inputs of the factors that is left out
    c.lora.rank_pattern = ()                 # ranks of single modules: ((name or regular expression, rank), ...), first match
    c.lora.alpha_pattern = ()                # alphas of single modules, likewise
    c.lora.rslora = False                    # scale alpha / sqrt(rank) instead of alpha / rank
    c.lora.dora = False                      # DoRA (arXiv 2402.09353): a trained magnitude for every output beside the factors
    c.lora.init = "default"                  # default (no change at first) | pissa | pissa_niter_N (N rounds) | olora | loftq
    c.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj")  # short names or regular expressions
    c.lora.also_train = ("embed", "norm")    # roles trained whole beside the factors: embed, norm, head
    c.lora.adapter = ""                      # folder of a PEFT adapter to continue from

    c.data = ConfigDict()
    c.data.train = ()                        # JSONL files, or folders of them, or JSON arrays; also .gz
    c.data.valid = ()                        # the same, held out; empty: split off train by valid_fraction
    c.data.valid_fraction = 0.0              # share of the documents of train held out, chosen by their hash
    c.data.loss_on = "assistant"             # assistant (replies, completions, plain text) | everything
    c.data.packing = True                    # several documents a row, or one
    c.data.overlong = "split"                # split | truncate | drop documents longer than the row
    c.data.max_bad_fraction = 0.01           # share of unreadable rows above which the run stops
    c.data.max_row_bytes = 16 << 20          # a longer row is unreadable: tokenizers take 260 bytes of memory a character

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"               # adamw | adafactor | lion | muon | adamw8bit; train_type full: galore | q_galore
    c.optimizer.learning_rate = 2e-4         # at the end of the warm-up; lion wants a third to a tenth of what the others do
    c.optimizer.schedule = "cosine"          # linear | cosine | constant, after the warm-up
    c.optimizer.warmup_steps = -1            # steps to the full learning rate; -1: a step in 25, at most 20
    c.optimizer.beta1 = 0.9                  # all but adafactor
    c.optimizer.beta2 = 0.95                 # all but adafactor
    c.optimizer.eps = 1e-8                   # all but adafactor and lion
    c.optimizer.galore = ConfigDict()        # galore, q_galore
    c.optimizer.galore.rank = 128            # of the subspace in which a matrix has moments
    c.optimizer.galore.update_every = 200    # steps between two subspaces (q_galore: at first)
    c.optimizer.galore.scale = 0.25          # of the update of a matrix, beside its learning rate
    c.optimizer.clip_norm = 1.0              # largest global norm of the gradient; 0: no clipping
    c.optimizer.learning_rate_ratio = ConfigDict({  # by role; LoRA+ (arXiv 2402.12354) is lora_b = 16
        "lora_a": 1.0, "lora_b": 1.0, "lora_magnitude": 1.0, "embed": 1.0, "norm": 1.0, "head": 1.0, "kernel": 1.0,
        "bias": 1.0, "router": 1.0})
    c.optimizer.weight_decay = ConfigDict({  # by role
        "lora_a": 0.0, "lora_b": 0.0, "lora_magnitude": 0.0, "embed": 0.0, "norm": 0.0, "head": 0.0, "kernel": 0.0,
        "bias": 0.0, "router": 0.0})

    c.training = ConfigDict()
    c.training.rows = 1                      # rows a forward pass, over all devices
    c.training.accumulate = 1                # forward passes an optimizer step
    c.training.neftune_alpha = 0.0           # noise on the embeddings (NEFTune, arXiv 2310.05914; 5 is usual); 0: none
    c.training.router_aux_loss_coef = 0.0    # of the load-balancing loss of experts, which is reported in any case
    c.training.eval_every = 0                # steps; 0: at the end of the run only
    c.training.eval_rows = 16                # held-out rows an evaluation reads, and examples of each of eval_tasks
    c.training.eval_tasks = ()               # asked then as well: ((name as in evaluate.py's --tasks, tokens), ...)
    c.training.eval_files = ConfigDict({     # which some of them are read from: paths, as evaluate.py's flags of these names
        "haystack": "", "squad": "", "hotpotqa": "", "longbench": "", "longbench_config": "", "longbench2": "",
        "zeroscrolls": ""})
    c.training.report_every = 0              # steps; 0: report.html at the end of the run only

    c.memory = ConfigDict()
    c.memory.remat = "full"                  # full: keep one residual per layer | attention: its output too | none: all
    c.memory.offload = False                 # residuals wait for the backward pass in the host's memory
    c.memory.layers_per_residual = 1         # keep the residual of every so many layers only, for one more forward pass
    c.memory.tile = 0                        # tokens a device projects and puts through the MLP at a time; 0: all
    c.memory.loss_chunk = 1024               # tokens whose logits exist at one time
    c.memory.refuse = True                   # stop before the first step where the plan exceeds the device; False: try it

    c.alarm = ConfigDict()
    c.alarm.nonfinite = "skip"               # skip | stop: a NaN or Inf gradient (never applied)
    c.alarm.spike = "warn"                   # warn | skip | stop | rollback: loss or gradient norm far above its recent median
    c.alarm.spike_z = 6.0                    # robust standard deviations of the logarithm that count as far
    c.alarm.history = 128                    # recent steps of the stage the median is taken over; no alarm in its first 20
    c.alarm.max_bad_steps = 5                # skipped in a row, or rollbacks to one checkpoint; then the run stops, state saved
    c.alarm.stall_minutes = 30.0             # without a finished step, evaluation batch or save, and the process ends; 0: waits

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 100           # steps between two checkpoints
    c.checkpoint.every_minutes = 30.0        # minutes after which there is one before that
    c.checkpoint.keep = 3                    # newest checkpoints that stay

    c.mesh = ConfigDict()
    c.mesh.data = 1                          # copies of the weights, each with its own rows; -1: what is left
    c.mesh.fsdp = -1                         # devices the weights are spread over; rows are spread over them too
    c.mesh.expert = 1                        # devices the experts of a layer are spread over; otherwise as fsdp
    c.mesh.sequence = 1                      # devices the tokens of a row are spread over; the weights are spread too
    c.mesh.tensor = 1                        # devices the heads, MLP and vocabulary are computed on in parallel
    c.mesh.context_parallel = "auto"         # auto | allgather | ulysses | ring | halo, where sequence > 1
    c.mesh.peer_timeout = 100.0              # seconds without a sign of life after which a process counts as lost
    return c.lock()


LEAST_HISTORY = 20                           # values of which a median is believed
FACTORS = ("lora_a", "lora_b", "lora_magnitude")
ROLES = (*FACTORS, "embed", "norm", "head", "kernel", "bias", "router")
READS = {                                    # fields of the optimizer that not all read, by its name
    "adamw": ("beta1", "beta2", "eps"), "adafactor": (), "lion": ("beta1", "beta2"), "muon": ("beta1", "beta2", "eps"),
    "adamw8bit": ("beta1", "beta2", "eps"),
    "galore": ("beta1", "beta2", "eps", "galore.rank", "galore.update_every", "galore.scale"),
    "q_galore": ("beta1", "beta2", "eps", "galore.rank", "galore.update_every", "galore.scale"),
}


def _stage(field, value):
    """A check: a stage of the schedule."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ConfigError(f"{field}={short(value)}: a stage is (until_step, length, 'full' | 'shifted' | 'window')")
    until, length, attention = value
    whole(1)(f"{field}: until_step", until)
    whole(2, TOKENS)(f"{field}: length", length)
    one_of("full", "shifted", "window")(f"{field}: attention", attention)


def _factor(field, value):
    """A check: "auto", or a number of at least 1, which the command line gives as text."""
    if isinstance(value, str) and value != "auto" and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{field}={short(value)} is neither 'auto' nor a number of at least 1") from None
    if value != "auto":
        number(1, TOKENS)(field, value)


def _first_factors(field, value):
    """A check: `lora.init`."""
    if not (isinstance(value, str) and re.fullmatch(r"default|pissa|pissa_niter_[1-9]\d{0,3}|olora|loftq", value)):
        raise ConfigError(f"{field}={short(value)} is none of default, pissa, pissa_niter_4 (or another number), olora, "
                          "loftq")


_RANK, _ALPHA = whole(1, 65_536), above_zero(1e6)
CHECKS = {                                   # what each field may hold; which go together: `validate`
    "seed": whole(0),
    "train_type": one_of("lora", "full"),
    "model.path": path(),
    "model.revision": text(),
    "model.init": one_of("pretrained", "random"),
    "model.dtype": one_of("bfloat16", "float32"),
    "model.matmul": one_of("default", "fp8"),
    "model.quantize": one_of("none", "nf4", "nf4-double", "int4", "int8", "fp8"),
    "context.length": whole(2, TOKENS),
    "context.schedule": required(several(_stage), "give stages such as ((1000, 8192, 'shifted'),)"),
    "context.rope.type": one_of("keep", "linear", "dynamic", "yarn", "llama3", "longrope"),
    "context.rope.factor": _factor,
    "context.group": any_of(number(1e-6, BELOW_ONE), number(2, TOKENS, "tokens; below 1 a share of the row")),
    "context.window": whole(1, TOKENS),
    "context.anchors": whole(0, TOKENS),
    "context.anchor_markers": several(text()),
    "lora.rank": _RANK,
    "lora.alpha": _ALPHA,
    "lora.dropout": share(),
    "lora.rank_pattern": several(pair(text(), _RANK, ("q_proj", 16))),
    "lora.alpha_pattern": several(pair(text(), _ALPHA, ("q_proj", 32.0))),
    "lora.rslora": flag(),
    "lora.dora": flag(),
    "lora.init": _first_factors,
    "lora.targets": several(text()),
    "lora.also_train": several(one_of("embed", "norm", "head")),
    "lora.adapter": path(),
    "data.train": several(required(path(), "name a file or a folder")),
    "data.valid": several(required(path(), "name a file or a folder")),
    "data.valid_fraction": share(),
    "data.loss_on": one_of("assistant", "everything"),
    "data.packing": flag(),
    "data.overlong": one_of("split", "truncate", "drop"),
    "data.max_bad_fraction": share(),
    "data.max_row_bytes": whole(1024),
    "optimizer.name": one_of(*READS),
    "optimizer.learning_rate": above_zero(),
    "optimizer.schedule": one_of("linear", "cosine", "constant"),
    "optimizer.warmup_steps": whole(-1),
    "optimizer.beta1": number(0, BELOW_ONE),
    "optimizer.beta2": number(0, BELOW_ONE),
    "optimizer.eps": above_zero(),
    "optimizer.galore.rank": _RANK,
    "optimizer.galore.update_every": whole(1),
    "optimizer.galore.scale": above_zero(),
    "optimizer.clip_norm": number(0),
    **{f"optimizer.learning_rate_ratio.{role}": number(0, 1e4) for role in ROLES},
    **{f"optimizer.weight_decay.{role}": number(0, 1e4) for role in ROLES},
    "training.rows": whole(1),
    "training.accumulate": whole(1),
    "training.neftune_alpha": number(0, 1e6),
    "training.router_aux_loss_coef": number(0, 1e6),
    "training.eval_every": whole(0),
    "training.eval_rows": whole(1),
    "training.eval_tasks": several(pair(text(), whole(1, TOKENS), ("passkey/tokens", 4096))),
    **{f"training.eval_files.{name}": path() for name in (
        "haystack", "squad", "hotpotqa", "longbench", "longbench_config", "longbench2", "zeroscrolls")},
    "training.report_every": whole(0),
    "memory.remat": one_of("full", "attention", "none"),
    "memory.offload": flag(),
    "memory.layers_per_residual": whole(1),
    "memory.tile": whole(0, TOKENS),
    "memory.loss_chunk": whole(1, TOKENS),
    "memory.refuse": flag(),
    "alarm.nonfinite": one_of("skip", "stop"),
    "alarm.spike": one_of("warn", "skip", "stop", "rollback"),
    "alarm.spike_z": above_zero(1e6, "every second step would be an alarm"),
    "alarm.history": whole(LEAST_HISTORY, 2**20),
    "alarm.max_bad_steps": whole(1),
    "alarm.stall_minutes": any_of(number(0, 0), number(
        1, 1e6, "below, a step that is merely slow would count as stalled; 0: no watch")),
    "checkpoint.every_steps": whole(1),
    "checkpoint.every_minutes": above_zero(1e9, "every step would be saved; for that there is "
                                                "checkpoint.every_steps=1"),
    "checkpoint.keep": whole(1),
    **{f"mesh.{axis}": any_of(whole(-1, -1), whole(1, why="devices, or -1 for all that the others leave"))
       for axis in ("data", "fsdp", "expert", "sequence", "tensor")},
    "mesh.context_parallel": one_of("auto", "allgather", "ulysses", "ring", "halo"),
    "mesh.peer_timeout": number(10, 86_400, "seconds; with fewer a process that is merely busy would count as lost"),
}


def total_steps(config: ConfigDict) -> int:
    """Optimizer steps of the whole run: the end of the last stage."""
    return config.context.schedule[-1][0]


def validate(c: ConfigDict) -> None:
    """Refuses what cannot work, in one line that names the fields and the way out.

    Raises:
      ConfigError: a value or a combination of values is illegal.
    """
    fields = flat(default_config()).keys()
    missing, unknown = sorted(fields - flat(c).keys()), sorted(flat(c).keys() - fields)
    if missing:
        raise ConfigError(f"the configuration has no field {missing[0]}: begin get_config() with "
                          "c = lljax.config.default_config()")
    if unknown:
        raise ConfigError(f"there is no config field {short(unknown[0])}")
    for field, check in CHECKS.items():
        check(field, get(c, field))
    if not c.model.path:
        raise ConfigError("model.path is empty: name a hub id, a folder with config.json, or a GGUF file")
    if not c.data.train:
        raise ConfigError("data.train is empty: name JSONL files or folders (scripts/prepare_data.py makes them)")
    if c.data.valid and c.data.valid_fraction:
        raise ConfigError(f"data.valid_fraction={c.data.valid_fraction} and data.valid={short(c.data.valid)} both hold "
                          "documents out: set data.valid_fraction to 0 or data.valid to ()")
    for field in ("training.eval_every", "training.eval_tasks"):
        if get(c, field) and not (c.data.valid or c.data.valid_fraction):
            raise ConfigError(f"{field}={get(c, field)} has nothing to evaluate: set data.valid or data.valid_fraction")
    for at, (task, tokens) in enumerate(c.training.eval_tasks):
        if tokens > c.context.length:
            raise ConfigError(f"training.eval_tasks[{at}]={short((task, tokens))} asks at more tokens than "
                              f"context.length={c.context.length}, which the model is to read: ask at fewer")
    if not c.training.eval_tasks:
        for field, file in c.training.eval_files.items():
            if file:
                raise ConfigError(f"training.eval_files.{field}={short(file)} and training.eval_tasks=(): nothing reads it; "
                                  "name a task that does, or no file")
    if c.training.eval_tasks and c.mesh.sequence != 1:
        raise ConfigError(f"training.eval_tasks and mesh.sequence={c.mesh.sequence}: answers are written a token at a time, "
                          "which does not spread over tokens; use mesh.sequence=1, or scripts/evaluate.py afterwards")
    if c.model.init == "random" and c.train_type == "lora":
        raise ConfigError("model.init='random' leaves train_type='lora' with a frozen random base: use "
                          "train_type='full' or model.init='pretrained'")
    if c.lora.init == "loftq" and c.model.quantize == "none":
        raise ConfigError("lora.init='loftq' makes up for what quantising loses and model.quantize='none' loses nothing: set "
                          "model.quantize='nf4', or lora.init='default'")
    if c.train_type == "full" and (c.lora.dora or c.lora.init != "default"):
        raise ConfigError(f"lora.dora={c.lora.dora} and lora.init={c.lora.init!r} are for adapters, and train_type='full' has "
                          "none: use lora.dora=False and lora.init='default', or train_type='lora'")
    if c.lora.adapter and c.lora.init != "default":
        raise ConfigError(f"lora.adapter={c.lora.adapter!r} and lora.init={c.lora.init!r} both give the factors their first "
                          "values: use lora.init='default'")
    if c.lora.adapter and c.train_type == "full":
        raise ConfigError(f"lora.adapter={c.lora.adapter!r} continues an adapter and train_type='full' has none: "
                          "use train_type='lora'")
    if c.model.quantize != "none" and c.train_type == "full":
        raise ConfigError(f"model.quantize={c.model.quantize!r} holds frozen kernels and train_type='full' has none: use "
                          "train_type='lora' or model.quantize='none'")
    if c.model.matmul == "fp8" and c.train_type == "full":
        raise ConfigError("model.matmul='fp8' is for frozen kernels and train_type='full' has none: use train_type='lora' or "
                          "model.matmul='default'")
    if c.model.quantize != "none" and c.memory.remat == "none":
        raise ConfigError(f"memory.remat='none' keeps every layer's kernels as model.quantize={c.model.quantize!r} makes them "
                          "dense: use memory.remat='full' or 'attention'")
    if c.memory.remat == "none" and (c.memory.offload or c.memory.layers_per_residual > 1):
        raise ConfigError(f"memory.remat='none' keeps everything on the device: with memory.offload={c.memory.offload} and "
                          f"memory.layers_per_residual={c.memory.layers_per_residual} use memory.remat='full'")
    if c.mesh.context_parallel != "auto" and c.mesh.sequence == 1:
        raise ConfigError(f"mesh.context_parallel={c.mesh.context_parallel!r} and mesh.sequence=1: nothing is spread over "
                          "tokens; set mesh.sequence, or mesh.context_parallel='auto'")
    _validate_context(c.context)
    _validate_optimizer(c)
    tokens = c.training.rows * c.training.accumulate * c.context.schedule[-1][1]
    if tokens > INT32:
        raise ConfigError(f"training.rows={c.training.rows}, training.accumulate={c.training.accumulate} and rows of "
                          f"{c.context.schedule[-1][1]:,} tokens are {tokens:,} tokens a step, which int32 does not "
                          "count: lower one of them")


def _validate_optimizer(c: ConfigDict) -> None:
    name, default = c.optimizer.name, default_config().optimizer
    if name in ("galore", "q_galore") and c.train_type != "full":
        raise ConfigError(f"optimizer.name={name!r} and train_type={c.train_type!r}: it is for training every weight; set "
                          "train_type='full', or optimizer.name='adamw'")
    if name == "q_galore" and c.memory.remat == "none":
        raise ConfigError("memory.remat='none' keeps every layer's weights as optimizer.name='q_galore' makes them dense: use "
                          "memory.remat='full' or 'attention'")
    steps, ratios = total_steps(c), c.optimizer.learning_rate_ratio
    if c.optimizer.warmup_steps >= max(steps, 2):
        raise ConfigError(f"optimizer.warmup_steps={c.optimizer.warmup_steps} and context.schedule, which ends at step "
                          f"{steps}: the learning rate would still rise at the last step; use fewer, or -1 for a step "
                          "in 25")
    if c.train_type == "full":
        trained = [role for role in ROLES if role not in FACTORS]
    else:
        factors = FACTORS if c.lora.dora else ("lora_a", "lora_b")
        trained = [*(factors if c.lora.targets else ()), *c.lora.also_train]
    if not trained:
        raise ConfigError("lora.targets=() and lora.also_train=(): nothing would train; name layers such as "
                          "('q_proj', 'v_proj')")
    if all(ratios[role] == 0 for role in trained):
        raise ConfigError(f"optimizer.learning_rate_ratio is 0 for every role that trains ({', '.join(trained)}): "
                          "nothing would be learned")
    for field in sorted(set().union(*READS.values()) - set(READS[name])):
        value, usual = get(c.optimizer, field), get(default, field)
        if value != usual:
            raise ConfigError(f"optimizer.{field}={value} and optimizer.name={name!r}, which does not read it: leave it at "
                              f"{usual}, or use another optimizer")


def _validate_context(context: ConfigDict) -> None:
    end, lengths = 0, []
    for at, (until, length, _) in enumerate(context.schedule):
        where = f"context.schedule[{at}]={tuple(context.schedule[at])}"
        if until <= end:
            raise ConfigError(f"{where}: a stage ends after the one before it; the previous ends at step {end}")
        if lengths and length < lengths[-1]:
            raise ConfigError(f"{where}: stages do not get shorter; the previous has {lengths[-1]} tokens")
        end = until
        lengths.append(length)
    if lengths[-1] > context.length:
        raise ConfigError(f"context.schedule reaches {lengths[-1]} tokens but context.length={context.length}: "
                          "raise context.length (the RoPE factor follows it) or shorten the stage")
    factor, group = context.rope.factor, context.group
    if factor != "auto" and context.rope.type == "keep":
        raise ConfigError(f"context.rope.factor={factor!r} and context.rope.type='keep': a kept RoPE takes no factor; "
                          "set context.rope.factor='auto' or another type")
    if any(attention == "shifted" for _, _, attention in context.schedule) and group >= 2 and group % 2:
        raise ConfigError(f"context.group={group} is odd, and shifted attention moves by half a group: "
                          f"use an even number of tokens such as {int(group) // 2 * 2 + 2}")


def get(config: ConfigDict, field: str):
    """The value of a dotted field."""
    for part in field.split("."):
        config = config[part]
    return config


def flat(config: ConfigDict, prefix: str = "") -> dict:
    """The values of a configuration (or a part of it) by their dotted names."""
    out = {}
    for name, value in config.items():
        full = f"{prefix}{name}"
        out |= flat(value, f"{full}.") if isinstance(value, ConfigDict) else {full: value}
    return out


def warmup_steps(optimizer: ConfigDict, steps: int) -> int:
    """Warm-up steps of a run of `steps`: `optimizer.warmup_steps`, or if that is -1 LongLoRA's 20,
    at most a step in 25."""
    return min(20, -(-steps // 25)) if optimizer.warmup_steps < 0 else optimizer.warmup_steps


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy for config.json that can be used from another folder: existing paths are absolute."""
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.model.path, c.lora.adapter = _absolute(c.model.path), _absolute(c.lora.adapter)
        c.data.train, c.data.valid = (tuple(map(_absolute, paths)) for paths in (c.data.train, c.data.valid))
        for name, file in c.training.eval_files.items():
            c.training.eval_files[name] = _absolute(file)
    return c


def _absolute(path: str) -> str:
    there = os.path.expanduser(shipped_asset(path))
    return os.path.abspath(there) if path and os.path.exists(there) else path
