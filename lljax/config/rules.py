"""Which values go together. `validate` refuses the rest before anything is read."""

import dataclasses

from lljax.config.access import Config, flat, get, total_steps
from lljax.config.checks import INT32
from lljax.config.field import EMPTY, GIVEN, Conditions, differs, equals, hold
from lljax.config.tree import ADAPTER_ROLES, FIELDS, KINDS, OBJECTIVES, OPTIMIZERS, REWARDS, ROLES
from lljax.errors import ConfigError, short


@dataclasses.dataclass(frozen=True)
class Conflict:
    """Values that do not go together: all of the conditions hold. advice: why, and the way out."""

    conditions: Conditions
    advice: str

    def __call__(self, config: Config) -> None:
        if hold(self.conditions, config):
            values = [f"{field}={short(get(config, field))}" for field in self.conditions]
            raise ConfigError(f"{' and '.join(values)}: {self.advice}")


FULL, LORA = equals("full"), equals("lora")
CONFLICTS = (
    Conflict(
        {"data.valid": GIVEN, "data.valid_fraction": GIVEN},
        "both hold documents out: set data.valid_fraction to 0 or data.valid to ()",
    ),
    Conflict(
        {
            "training.eval_every": GIVEN,
            "training.eval_tasks": EMPTY,
            "data.valid": EMPTY,
            "data.valid_fraction": EMPTY,
        },
        "there is nothing to evaluate: set data.valid, data.valid_fraction or training.eval_tasks",
    ),
    *(
        Conflict(
            {field: GIVEN, "training.eval_tasks": EMPTY},
            "nothing reads the file: name a task that does, or no file",
        )
        for field in FIELDS
        if field.startswith("training.eval_files.")
    ),
    Conflict(
        {"training.eval_tasks": GIVEN, "mesh.sequence": differs(1)},
        "answers are written a token at a time, which does not spread over tokens: use "
        "mesh.sequence=1, or lljax evaluate afterwards",
    ),
    Conflict(
        {"model.init": equals("random"), "train_type": LORA},
        "an adapter on a frozen random base learns nothing of use: use train_type='full' or "
        "model.init='pretrained'",
    ),
    Conflict(
        {"lora.init": equals("loftq"), "model.quantize": equals("none")},
        "LoftQ makes up for the error of quantization, and there is none: set "
        "model.quantize='nf4', or lora.init='default'",
    ),
    Conflict(
        {"lora.dora": GIVEN, "train_type": FULL},
        "DoRA is for adapters, and train_type='full' has none: use lora.dora=False, or "
        "train_type='lora'",
    ),
    Conflict(
        {"lora.init": differs("default"), "train_type": FULL},
        "it is for adapters, and train_type='full' has none: use lora.init='default', or "
        "train_type='lora'",
    ),
    Conflict(
        {"lora.adapter": GIVEN, "lora.init": differs("default")},
        "both give the adapter its initial values: use lora.init='default'",
    ),
    Conflict(
        {"lora.adapter": GIVEN, "train_type": FULL},
        "there is no adapter to continue: use train_type='lora'",
    ),
    Conflict(
        {"model.quantize": differs("none"), "train_type": FULL},
        "only frozen kernels are quantized, and train_type='full' has none: use train_type='lora' "
        "or model.quantize='none'",
    ),
    Conflict(
        {"model.matmul": differs("default"), "train_type": FULL},
        "it is for frozen kernels, and train_type='full' has none: use train_type='lora' or "
        "model.matmul='default'",
    ),
    Conflict(
        {"memory.remat": equals("none"), "model.quantize": differs("none")},
        "every layer's dequantized kernels would be kept: use memory.remat='full' or 'attention'",
    ),
    Conflict(
        {"memory.remat": equals("none"), "optimizer.name": equals("q_galore")},
        "every layer's dequantized weights would be kept: use memory.remat='full' or 'attention'",
    ),
    Conflict(
        {"memory.remat": equals("none"), "memory.offload": GIVEN},
        "everything is kept on the device, so nothing is offloaded: use memory.remat='full'",
    ),
    Conflict(
        {"memory.remat": equals("none"), "memory.layers_per_residual": differs(1)},
        "everything is kept on the device, not single residuals: use memory.remat='full'",
    ),
    Conflict(
        {"mesh.context_parallel": differs("auto"), "mesh.sequence": equals(1)},
        "nothing is spread over tokens: set mesh.sequence, or mesh.context_parallel='auto'",
    ),
    Conflict(
        {"context.rope.factor": differs("auto"), "context.rope.type": equals("keep")},
        "a kept RoPE takes no factor: set context.rope.factor='auto' or another type",
    ),
)


def validate(config: Config) -> None:
    """Refuses a configuration that cannot work, in one line that names the fields and the way out.

    Raises:
      ConfigError: a value or a combination of values is illegal.
    """
    names = flat(config).keys()
    if missing := sorted(FIELDS.keys() - names):
        raise ConfigError(
            f"the configuration has no field {missing[0]}: begin get_config() with "
            "c = lljax.config.default_config()"
        )
    if unknown := sorted(names - FIELDS.keys()):
        raise ConfigError(f"there is no config field {short(unknown[0])}")
    for field in FIELDS.values():
        field(field.name, get(config, field.name))
    for field in FIELDS.values():
        if field.required and not get(config, field.name):
            raise ConfigError(f"{field.name} is empty: {field.required}")
    for rule in (*CONFLICTS, *RULES):
        rule(config)


# ---------------------------------------------------------------- rules that compute
def _stages_grow(config: Config) -> None:
    end, longest = 0, 0
    for index, (until, length, _) in enumerate(config.context.schedule):
        stage = f"context.schedule[{index}]={tuple(config.context.schedule[index])}"
        if until <= end:
            raise ConfigError(
                f"{stage}: a stage ends after the one before it; the previous ends at step {end}"
            )
        if length < longest:
            raise ConfigError(
                f"{stage}: stages do not get shorter; the previous has {longest} tokens"
            )
        end, longest = until, length
    if longest > config.context.length:
        raise ConfigError(
            f"context.schedule reaches {longest} tokens but context.length="
            f"{config.context.length}: raise context.length (the RoPE factor follows it) or "
            "shorten the stage"
        )


def _groups_are_even(config: Config) -> None:
    group = config.context.group
    shifted = any(attention == "shifted" for _, _, attention in config.context.schedule)
    if shifted and group >= 2 and group % 2:
        raise ConfigError(
            f"context.group={group} is odd, and shifted attention moves by half a group: "
            f"use an even number of tokens such as {int(group) // 2 * 2 + 2}"
        )


def _tasks_fit_the_context(config: Config) -> None:
    for index, (task, tokens) in enumerate(config.training.eval_tasks):
        if tokens > config.context.length:
            raise ConfigError(
                f"training.eval_tasks[{index}]={short((task, tokens))} has more tokens than "
                f"context.length={config.context.length}, which the model is trained to read: "
                "use fewer"
            )


def _warmup_ends(config: Config) -> None:
    warmup, steps = config.optimizer.warmup_steps, total_steps(config)
    if warmup >= max(steps, 2):
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} and context.schedule, which ends at step {steps}: "
            "the learning rate would still rise at the last step; use fewer, or -1 for a step in 25"
        )


def _something_trains(config: Config) -> None:
    if config.train_type == "full":
        trained = [role for role in ROLES if role not in ADAPTER_ROLES]
    else:
        adapter = [r for r in ADAPTER_ROLES if config.lora.dora or r != "lora_magnitude"]
        trained = [*(adapter if config.lora.targets else ()), *config.lora.also_train]
    if not trained:
        raise ConfigError(
            "lora.targets=() and lora.also_train=(): nothing would train; name layers such as "
            "('q_proj', 'v_proj')"
        )
    if all(config.optimizer.learning_rate_ratio[role] == 0 for role in trained):
        raise ConfigError(
            f"optimizer.learning_rate_ratio is 0 for every role that trains ({', '.join(trained)}):"
            " nothing would be learned"
        )


def _the_optimizer_serves(config: Config) -> None:
    """The optimizer trains this `train_type`, and reads the fields that are set."""
    name = config.optimizer.name
    table = OPTIMIZERS.table()
    if table[name].train_type not in (None, config.train_type):
        raise ConfigError(
            f"optimizer.name={name!r} and train_type={config.train_type!r}: it is for one way of "
            f"training: set train_type={table[name].train_type!r}, or optimizer.name='adamw'"
        )
    optional = {field for row in table.values() for field in row.reads}
    for field in sorted(optional - set(table[name].reads)):
        value, default = get(config.optimizer, field), FIELDS[f"optimizer.{field}"].default
        if value != default:
            raise ConfigError(
                f"optimizer.{field}={value} and optimizer.name={name!r}, which does not read it: "
                f"leave it at {default}, or use another optimizer"
            )


def _the_objective_reads_what_is_set(config: Config) -> None:
    name, table = config.objective.name, OBJECTIVES.table()
    for field in FIELDS.values():
        group = field.name.partition(".")[0]
        value = get(config, field.name)
        if group not in ("objective", "rollout", "reward") or value == field.default:
            continue
        readers = [
            row.name
            for row in table.values()
            if field.name in row.reads or f"{group}.*" in row.reads
        ]
        if field.name != "objective.name" and name not in readers:
            others = f"{', '.join(readers[:4])}{' and others' if len(readers) > 4 else ''}"
            raise ConfigError(
                f"{field.name}={short(value)} and objective.name={name!r}, which does not read it: "
                f"leave it at {short(field.default)}, or use {others}"
            )


def _rows_of_data_serve_the_objective(config: Config) -> None:
    name, overlong = config.objective.name, config.data.overlong
    kind = KINDS.table()[OBJECTIVES.table()[name].kind]
    if overlong not in kind.overlong:
        raise ConfigError(
            f"data.overlong={overlong!r} and objective.name={name!r}, whose {kind.noun} are never "
            f"split: use {' or '.join(map(repr, kind.overlong))}"
        )
    if config.data.loss_on not in kind.loss_on:
        raise ConfigError(
            f"data.loss_on={config.data.loss_on!r} and objective.name={name!r}, which trains "
            f"answers: use {' or '.join(map(repr, kind.loss_on))}"
        )


def _rewards_are_known(config: Config) -> None:
    name, functions = config.objective.name, config.reward.functions
    if not OBJECTIVES.table()[name].samples:
        return
    known = REWARDS.table()
    if not functions:
        raise ConfigError(
            f"reward.functions=() and objective.name={name!r}: name a reward, such as "
            "(('contains', 1.0),)"
        )
    for index, (function, _) in enumerate(functions):
        plain = function.partition("?")[0]
        if ":" not in plain and plain not in known:
            raise ConfigError(
                f"reward.functions[{index}]={short(function)} is none of {', '.join(known)}, nor "
                "package.module:function or file.py:function"
            )


def _answers_are_written_on_whole_rows(config: Config) -> None:
    name = config.objective.name
    if OBJECTIVES.table()[name].samples and config.mesh.sequence != 1:
        raise ConfigError(
            f"mesh.sequence={config.mesh.sequence} and objective.name={name!r}: answers are "
            "written a token at a time, which does not spread over tokens: use mesh.sequence=1 "
            "and mesh.tensor"
        )


def _tokens_are_counted_in_int32(config: Config) -> None:
    rows, accumulate = config.training.rows, config.training.accumulate
    length = config.context.schedule[-1][1]
    if (tokens := rows * accumulate * length) > INT32:
        raise ConfigError(
            f"training.rows={rows}, training.accumulate={accumulate} and rows of {length:,} tokens "
            f"are {tokens:,} tokens a step, more than int32 holds: lower one of them"
        )


RULES = (
    _stages_grow,
    _groups_are_even,
    _tasks_fit_the_context,
    _warmup_ends,
    _something_trains,
    _the_optimizer_serves,
    _the_objective_reads_what_is_set,
    _rows_of_data_serve_the_objective,
    _rewards_are_known,
    _answers_are_written_on_whole_rows,
    _tokens_are_counted_in_int32,
)
