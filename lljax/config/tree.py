"""The table of config fields. Every run is the tree of their defaults with some fields changed."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lljax.config.access import Config, get
from lljax.config.checks import (
    BELOW_ONE,
    TOKENS,
    Several,
    above_zero,
    any_of,
    flag,
    number,
    one_of,
    pair,
    path,
    required,
    share,
    text,
    whole,
)
from lljax.config.field import Field, differs, equals, hold
from lljax.config.field_checks import lora_init, rope_factor, stage
from lljax.config.shipped import absolute_path

LEAST_HISTORY = 20  # values from which a median is reliable
ADAPTER_ROLES = ("lora_a", "lora_b", "lora_magnitude")
WHOLE_ROLES = ("embed", "norm", "head")  # may train whole beside an adapter
ROLES = (*ADAPTER_ROLES, *WHOLE_ROLES, "kernel", "bias", "router")
EVAL_FILES = {  # the files that tasks of training.eval_tasks read
    "haystack": "text to hide needles in, instead of Python's reference",
    "squad": "SQuAD 2.0, dev, for ruler/qa_1",
    "hotpotqa": "HotpotQA, dev, for ruler/qa_2",
    "longbench": "folder of LongBench's files",
    "longbench_config": "folder of LongBench's prompts, if it is another",
    "longbench2": "file of LongBench v2",
    "zeroscrolls": "folder of ZeroSCROLLS",
}

KINDS = one_of(owner="lljax.data.kinds:KINDS")  # of rows in the files of data.train
REWARDS = one_of(owner="lljax.evaluation.rewards:REWARDS")
OBJECTIVES = one_of(owner="lljax.objectives.table:OBJECTIVES")
OPTIMIZERS = one_of(owner="lljax.training.optimizer:OPTIMIZERS")
_RANK, _ALPHA = whole(1, 65_536), above_zero(1e6)
_FILES = Several(required(path(), "name a file or a folder"))
_DEVICES = any_of(whole(-1, -1), whole(1, why="devices, or -1 for all that the others leave"))


def _yaml(name: str, others: str) -> str:
    """The name in the flat YAML of a field of preferences or policies: the first that others have
    for it; "" for those that lljax/config/yaml_rlhf.py sets.
    """
    return "" if name in ("reference", "beta", "kl_beta", "log") else (others.split() or [""])[0]


# fmt: off
_ROWS = (
    Field("seed", 0, "random seed of initialization, shuffling and dropout",
          check=whole(0), identity=True, yaml="seed"),
    Field("train_type", "lora", "an adapter on the frozen base, or every weight",
          check=one_of("lora", "full"), identity=True),

    Field("model.path", "", "hub id, folder with config.json and safetensors, or a GGUF file",
          check=path(), identity=False, yaml="model", other_names="model model_name_or_path",
          path=True, required="name a hub id, a folder with config.json, or a GGUF file"),
    Field("model.revision", "main", "branch, tag or commit, if path is a hub id",
          check=text(), identity=False),
    Field("model.init", "pretrained", "random weights need config.json and the tokenizer only",
          check=one_of("pretrained", "random"), identity=True),
    Field("model.dtype", "bfloat16", "frozen weights and compute; trainable weights are float32",
          check=one_of("bfloat16", "float32"), identity=True,
          yaml="dtype", other_names="torch_dtype bf16 fp16 precision"),
    Field("model.matmul", "default", "fp8 multiplies with frozen kernels in 8 bits, except experts",
          check=one_of("default", "fp8"), identity=True),
    Field("model.quantize", "none", "frozen kernels in 8 or 4 bits, such as int8 or nf4",
          check=one_of("none", owner="lljax.models.quantize:FORMS"), identity=True, yaml="quantize",
          other_names="load_in_4bit load_in_8bit quantization quantization_bit"),

    Field("context.length", 8192, "tokens that the finished model reads",
          check=whole(2, TOKENS), identity=True, yaml="context_length",
          other_names="max_length max_seq_length max_seq_len seq_len cutoff_len context_length"),
    Field("context.schedule", ((1000, 8192, "full"),),
          "stages: (until_step, length, full | shifted | window)",
          check=required(Several(stage), "give stages such as ((1000, 8192, 'shifted'),)"),
          identity=True, other_names=(
              "steps max_steps total_steps epochs num_epochs num_train_epochs attention")),
    Field("context.rope.type", "yarn",
          "linear, dynamic, yarn; llama3 and longrope on a base of that kind",
          check=one_of("keep", owner="lljax.models.rope:EXTENDABLE"), identity=True,
          yaml="rope.type", other_names="rope_scaling"),
    Field("context.rope.factor", "auto",
          "a number >= 1; auto: ceil(length / original length)",
          check=rope_factor, identity=True, yaml="rope.factor", text_or_number=True),
    Field("context.group", 0.25,
          "shifted attention: group size in tokens, or below 1 as a share of the row",
          check=any_of(number(1e-6, BELOW_ONE),
                       number(2, TOKENS, "tokens; below 1 a share of the row")),
          identity=True, other_names="group_size_ratio group_size"),
    Field("context.window", 4096, "window attention: keys visible to a token, including its own",
          check=whole(1, TOKENS), identity=True, other_names="sliding_window"),
    Field("context.anchors", 64,
          "window attention: first tokens of a document, visible to all later ones",
          check=whole(0, TOKENS), identity=True),
    Field("context.implementation", "auto",
          "attention implementation; auto: the first that supports the run",
          check=one_of("auto", owner="lljax.attention.attend:IMPLEMENTATIONS"), identity=False),
    Field("context.anchor_markers", (),
          "window attention: strings of one token each that are anchors too",
          check=Several(text()), identity=True),

    Field("lora.rank", 8, "columns of A, rows of B",
          check=_RANK, identity=True, yaml="lora_rank", other_names="r lora_r lora_rank"),
    Field("lora.alpha", 16.0, "the update is alpha / rank * A B",
          check=_ALPHA, identity=True, yaml="lora_alpha", other_names="lora_alpha"),
    Field("lora.dropout", 0.0, "share of the adapter's inputs that is dropped",
          check=share(), identity=True, yaml="lora_dropout", other_names="lora_dropout"),
    Field("lora.rank_pattern", (),
          "ranks of single modules: ((name or regular expression, rank), ...), first match",
          check=Several(pair(text(), _RANK, ("q_proj", 16))), identity=True),
    Field("lora.alpha_pattern", (), "alphas of single modules, in the same form",
          check=Several(pair(text(), _ALPHA, ("q_proj", 32.0))), identity=True),
    Field("lora.rslora", False, "scale by alpha / sqrt(rank) instead of alpha / rank",
          check=flag(), identity=True, other_names="use_rslora"),
    Field("lora.dora", False, "DoRA (arXiv 2402.09353): train a magnitude for every output too",
          check=flag(), identity=True, other_names="use_dora"),
    Field("lora.init", "default",
          "default (no change at first) | pissa | pissa_niter_N (N iterations) | olora | loftq",
          check=lora_init, identity=True, other_names="init_lora_weights"),
    Field("lora.targets", ("q_proj", "k_proj", "v_proj", "o_proj"),
          "short names or regular expressions", check=Several(text()), identity=True,
          yaml="target_modules", other_names="target_modules lora_target"),
    Field("lora.also_train", ("embed", "norm"), "roles trained whole beside the adapter",
          check=Several(one_of(*WHOLE_ROLES)), identity=True,
          other_names="modules_to_save"),
    Field("lora.adapter", "", "folder of a PEFT adapter to continue from",
          check=path(), identity=True, path=True),

    Field("data.train", (), "JSONL files, folders of them, or JSON arrays; also .gz",
          check=_FILES, identity=False, yaml="dataset.train",
          other_names="dataset train_file train_files", path=True,
          required="name JSONL files or folders (lljax data makes them)"),
    Field("data.valid", (), "held-out documents; empty: split off train by valid_fraction",
          check=_FILES, identity=False, yaml="dataset.valid", path=True),
    Field("data.valid_fraction", 0.0, "share of train held out, by hash of the document",
          check=share(), identity=False, yaml="dataset.valid_fraction"),
    Field("data.loss_on", "assistant", "assistant is replies, completions and plain text",
          check=one_of("assistant", "everything"), identity=False,
          other_names="train_on_inputs train_on_prompt"),
    Field("data.packing", True, "pack several documents into a row; otherwise one document per row",
          check=flag(), identity=True),
    Field("data.overlong", "split", "treatment of documents longer than the row",
          check=one_of("split", "truncate", "drop"), identity=True),
    Field("data.max_bad_fraction", 0.01, "share of unusable rows above which the run stops",
          check=share(), identity=False),
    Field("data.max_row_bytes", 16 << 20,
          "largest usable row; tokenizers take 260 bytes of memory per character",
          check=whole(1024), identity=False),

    Field("optimizer.name", "adamw",
          "adafactor, lion, muon, adamw8bit; galore and q_galore, which need train_type=full",
          check=OPTIMIZERS, identity=True, other_names="optim"),
    Field("optimizer.learning_rate", 2e-4,
          "learning rate after warm-up; for lion a third to a tenth of the usual",
          check=above_zero(), identity=True, yaml="learning_rate", other_names="lr"),
    Field("optimizer.schedule", "cosine", "decay of the learning rate after warm-up",
          check=one_of("linear", "cosine", "constant"), identity=True,
          yaml="scheduler.type", other_names="lr_scheduler_type lr_scheduler"),
    Field("optimizer.warmup_steps", -1,
          "steps to the full learning rate; -1: one step in 25, at most 20",
          check=whole(-1), identity=True,
          yaml="scheduler.warmup_steps", other_names="warmup warmup_ratio"),
    Field("optimizer.beta1", 0.9, "decay rate of the first moment; not for adafactor",
          check=number(0, BELOW_ONE), identity=True, other_names="adam_beta1"),
    Field("optimizer.beta2", 0.95, "decay rate of the second moment; not for adafactor",
          check=number(0, BELOW_ONE), identity=True, other_names="adam_beta2"),
    Field("optimizer.eps", 1e-8, "added to the denominator of an update; not for adafactor or lion",
          check=above_zero(), identity=True, other_names="adam_epsilon"),
    Field("optimizer.galore.rank", 128, "galore, q_galore: dimensions of a matrix's subspace",
          check=_RANK, identity=True),
    Field("optimizer.galore.update_every", 200,
          "galore, q_galore: steps between two subspaces (q_galore: at first)",
          check=whole(1), identity=True),
    Field("optimizer.galore.scale", 0.25, "galore, q_galore: factor of a projected update",
          check=above_zero(), identity=True),
    Field("optimizer.clip_norm", 1.0, "largest global norm of the gradient; 0: no clipping",
          check=number(0), identity=True, other_names="max_grad_norm grad_clip"),
    *(Field(f"optimizer.learning_rate_ratio.{role}", 1.0,
            "factor on the learning rate; LoRA+ (arXiv 2402.12354) is lora_b = 16",
            check=number(0, 1e4), identity=True) for role in ROLES),
    *(Field(f"optimizer.weight_decay.{role}", 0.0, "decoupled weight decay",
            check=number(0, 1e4), identity=True) for role in ROLES),

    Field("objective.name", "sft", "the loss that is minimized",
          check=OBJECTIVES,
          identity={"objective.name": differs("sft")}, other_names="rlhf_type loss_type"),
    *(Field(f"objective.{name}", default, comment, check=check,
            identity={f"objective.{name}": differs(default)},
            yaml=_yaml(name, others), other_names=others)
      for name, default, comment, check, others in (
        ("reference", "adapter_off",
         "log-probabilities of the reference: a forward pass a step, or kept with the tokens",
         one_of("adapter_off", "precomputed"), "precompute_ref_log_probs"),
        ("beta", 0.1, "preferences: strength of the tie to the reference, or inverse temperature",
         above_zero(1e6), "beta"),
        ("label_smoothing", 0.0, "dpo, dpo_norm, robust, simpo, cpo: share of pairs labeled wrong",
         number(0, 0.499), "label_smoothing"),
        ("simpo_gamma", 0.5, "simpo: reward margin", number(0, 1e6), "simpo_gamma"),
        ("sft_weight", 0.0, "weight of the chosen answers' cross-entropy beside the pair loss",
         number(0, 1e6), "rpo_alpha cpo_alpha"),
        ("desirable_weight", 1.0, "kto: weight of desirable answers", number(0, 1e6),
         "desirable_weight"),
        ("undesirable_weight", 1.0, "kto: weight of undesirable answers", number(0, 1e6),
         "undesirable_weight"),
        ("clip_low", 0.2, "policies: a probability ratio counts from 1 - clip_low",
         number(0, 1), "epsilon"),
        ("clip_high", 0.2, "policies: ... to 1 + clip_high; cispo: to clip_high",
         above_zero(1e6), "epsilon_high"),
        ("delta", 0.0, "policies: largest ratio of a negative advantage; 0: no limit",
         number(0, 1e6), "delta"),
        ("kl_beta", 0.0, "policies: weight of the KL divergence from the reference",
         number(0, 1e6), "kl_coef"),
        ("top_entropy", 1.0, "policies: share of tokens that train, by entropy",
         number(1e-6, 1), "top_entropy_quantile"),
        ("scale_rewards", "group", "policies: advantages are divided by a standard deviation of "
         "the prompt's answers, of the batch, or not",
         one_of("group", "batch", "none"), "scale_rewards"),
        ("mask_truncated", False, "policies: answers that reach rollout.tokens do not train",
         flag(), "overlong_filter mask_truncated_completions"),
      )),

    *(Field(f"rollout.{name}", default, comment, check=check,
            identity=identity and {f"rollout.{name}": differs(default)},
            yaml=_yaml(name, others), other_names=others)
      for name, default, comment, check, identity, others in (
        ("answers", 8, "answers to a prompt", whole(2, 1024), True, "num_generations"),
        ("tokens", 256, "tokens of an answer at most", whole(1, TOKENS), True,
         "max_completion_length"),
        ("temperature", 1.0, "of sampling, and of the trained log-probabilities", above_zero(100),
         True, "temperature"),
        ("top_p", 1.0, "sampling: share of the probability that may be drawn",
         number(1e-6, 1), True, "top_p"),
        ("top_k", 0, "sampling: number of tokens that may be drawn; 0: all", whole(0), True,
         "top_k"),
        ("updates", 1, "optimizer steps on the answers of a rollout", whole(1, 1024), True,
         "num_iterations"),
        ("cache", "auto", "keys and values while answers are written: in model.dtype, or 8 bits",
         one_of("auto", "int8"), True, ""),
        ("log", "none", "rollouts.jsonl: nothing, the rewards of every answer, its text too",
         one_of("none", "rewards", "texts"), False, "log_completions"),
      )),

    Field("reward.functions", (("contains", 1.0),),
          "((name, weight), ...): of lljax.evaluation.rewards:REWARDS, package.module:function or "
          "file.py:function", check=Several(pair(text(), number(-1e6, 1e6), ("contains", 1.0))),
          identity={"reward.functions": differs((("contains", 1.0),))},
          other_names="reward_funcs reward_weights"),
    Field("reward.timeout", 60.0, "seconds for a reward function to judge the answers of a rollout",
          check=above_zero(1e6), identity=False),
    Field("reward.processes", 1, "processes that judge answers", check=whole(1, 256),
          identity=False),

    Field("training.rows", 1, "rows of a forward pass, over all devices",
          check=whole(1), identity=True, yaml="batch_size",
          other_names="batch_size per_device_train_batch_size micro_batch_size"),
    Field("training.accumulate", 1, "forward passes of an optimizer step",
          check=whole(1), identity=True, yaml="gradient_accumulation",
          other_names="gradient_accumulation gradient_accumulation_steps"),
    Field("training.neftune_alpha", 0.0,
          "noise on the embeddings (NEFTune, arXiv 2310.05914; 5 is usual); 0: none",
          check=number(0, 1e6), identity=True),
    Field("training.router_aux_loss_coef", 0.0,
          "coefficient of the experts' load-balancing loss, which is always reported",
          check=number(0, 1e6), identity=True),
    Field("training.eval_every", 0, "steps between evaluations; 0: at the end of the run only",
          check=whole(0), identity=False, other_names="eval_steps"),
    Field("training.eval_rows", 16, "held-out rows per evaluation, and examples per task",
          check=whole(1), identity=False),
    Field("training.eval_tasks", (),
          "tasks of an evaluation: ((name as in `lljax evaluate --tasks`, tokens), ...)",
          check=Several(pair(text(), whole(1, TOKENS), ("passkey/tokens", 4096))),
          identity=False),
    *(Field(f"training.eval_files.{name}", "", comment,
            check=path(), identity=False, path=True) for name, comment in EVAL_FILES.items()),
    Field("training.report_every", 0,
          "steps between writes of report.html; 0: at the end of the run only",
          check=whole(0), identity=False),

    Field("memory.remat", "full",
          "saved for the backward pass: a residual per layer, attention's output too, or all",
          check=one_of("full", "attention", "none"), identity=False,
          other_names="gradient_checkpointing"),
    Field("memory.offload", False, "keep residuals in host memory until the backward pass",
          check=flag(), identity=False),
    Field("memory.layers_per_residual", 1,
          "layers that share a saved residual; more than 1 costs another forward pass",
          check=whole(1), identity=False),
    Field("memory.tile", 0, "tokens of a device that are projected and go through the MLP at a "
          "time; 0: all", check=whole(0, TOKENS), identity=False),
    Field("memory.loss_chunk", 1024, "tokens whose logits exist at one time",
          check=whole(1, TOKENS), identity=False),
    Field("memory.refuse", True, "stop before the first step if the plan exceeds the device",
          check=flag(), identity=False),

    Field("alarm.nonfinite", "skip", "response to a NaN or Inf gradient, which is never applied",
          check=one_of("skip", "stop"), identity=True),
    Field("alarm.spike", "warn", "response to a loss or gradient norm far above its recent median",
          check=one_of("warn", "skip", "stop", "rollback"), identity=True),
    Field("alarm.spike_z", 6.0, "robust standard deviations of the logarithm that count as a spike",
          check=above_zero(1e6, "every second step would be an alarm"), identity=True),
    Field("alarm.history", 128,
          f"recent steps of a stage in the median; no spike alarm in its first {LEAST_HISTORY}",
          check=whole(LEAST_HISTORY, 2**20), identity=True),
    Field("alarm.max_bad_steps", 5,
          "steps skipped in a row, or rollbacks to one checkpoint, after which the run stops",
          check=whole(1), identity=True),
    Field("alarm.stall_minutes", 30.0,
          "minutes without a finished step, batch or save before the process ends; 0: no limit",
          check=any_of(number(0, 0), number(1, 1e6, (
              "below, a step that is merely slow would count as stalled; 0: no watch"))),
          identity=False),

    Field("checkpoint.every_steps", 100, "steps between two checkpoints",
          check=whole(1), identity={"alarm.spike": equals("rollback")}, other_names="save_steps"),
    Field("checkpoint.every_minutes", 30.0, "also save if this many minutes have passed",
          check=above_zero(1e9, "every step would be saved; for that there is "
                                "checkpoint.every_steps=1"), identity=False),
    Field("checkpoint.keep", 3, "newest checkpoints that are kept",
          check=whole(1), identity=False, other_names="save_total_limit"),

    Field("mesh.data", 1, "copies of the weights, each with its own rows; -1: the devices left",
          check=_DEVICES, identity=False),
    Field("mesh.fsdp", -1, "devices that share the weights, and the rows",
          check=_DEVICES, identity=False),
    Field("mesh.expert", 1, "devices that share a layer's experts; otherwise as fsdp",
          check=_DEVICES, identity=False),
    Field("mesh.sequence", 1, "devices that share the tokens of a row, and the weights",
          check=_DEVICES, identity=False, other_names="sequence_parallel sequence_parallel_size"),
    Field("mesh.tensor", 1, "devices that share heads, MLP and vocabulary",
          check=_DEVICES, identity=False, other_names="tensor_parallel_size"),
    Field("mesh.context_parallel", "auto", "allgather, ulysses, ring or halo, if sequence > 1",
          check=one_of("auto", owner="lljax.attention.context_parallel:MODES"), identity=False),
    Field("mesh.peer_timeout", 100.0,
          "seconds without a sign of life after which a process counts as lost",
          check=number(10, 86_400, (
              "seconds; with fewer a process that is merely busy would count as lost")),
          identity=False),
)
# fmt: on
FIELDS = {field.name: field for field in _ROWS}


def default_config() -> Config:
    """The tree of the defaults, as a locked ConfigDict."""
    untyped = {f.name.rpartition(".")[0] for f in FIELDS.values() if f.text_or_number}
    config: Config = ConfigDict()
    for field in FIELDS.values():
        *groups, last = field.name.split(".")
        group = config
        for depth, name in enumerate(groups):
            if name not in group:
                group[name] = ConfigDict(type_safe=".".join(groups[: depth + 1]) not in untyped)
            group = group[name]
        group[last] = field.default
    return config.lock()


def value_or_default(config: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field of a run's config.json; of an older run, which lacks it, the
    default."""
    value: Any = config
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return FIELDS[field].default
        value = value[name]
    return value


def identity(config: Config) -> dict[str, Any]:
    """The values that a resumed run must share with its beginning, by dotted name, so that it ends
    as if it had not been interrupted."""
    return {
        field.name: get(config, field.name)
        for field in FIELDS.values()
        if field.identity is True or (field.identity and hold(field.identity, config))
    }


def with_absolute_paths(config: Config) -> Config:
    """A copy for config.json that can be used from another folder: existing paths are absolute."""
    copy: Config = config.copy_and_resolve_references()
    with copy.unlocked():
        for field in FIELDS.values():
            if field.path:
                group, _, last = field.name.rpartition(".")
                get(copy, group)[last] = _absolute(get(copy, field.name))
    return copy


def _absolute(paths: Any) -> Any:
    """`paths`, a path or several, with the existing ones made absolute."""
    return absolute_path(paths) if isinstance(paths, str) else tuple(map(absolute_path, paths))
