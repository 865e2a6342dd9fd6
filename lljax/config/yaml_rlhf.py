"""The names that ms-swift has for preference and policy training, in the flat YAML."""

from typing import Any

from lljax.config.access import Config
from lljax.errors import ConfigError, short

# Fields of the YAML that this module reads; others of preferences and policies are `Field.yaml`.
NAMES = (
    *("rlhf_type", "loss_type", "importance_sampling_level", "beta"),
    *("reward_funcs", "reward_weights", "log_completions", "truncation_strategy"),
)
DPO_LOSSES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    **{name: name for name in ("ipo", "hinge", "robust", "apo_zero", "sppo_hard", "nca_pair")},
    "bco_pair": "bco_pair",
}
GRPO_LOSSES = {name: name for name in ("grpo", "dr_grpo", "bnpo", "dapo", "cispo")}
# rlhf_type -> the values of objective.name by loss_type, the first of which is the default.
RLHF_TYPES: dict[str, dict[str, str]] = {
    "dpo": DPO_LOSSES,
    **{name: {name: name} for name in ("orpo", "simpo", "cpo", "kto", "rloo")},
    "grpo": GRPO_LOSSES,
}
REWARDS = {"soft_overlong": "overlong"}  # ms-swift's names of rewards that we have
TRUNCATION = {"delete": "drop", "middle": "truncate"}


def set_objective(path: str, c: Config, given: dict[str, Any]) -> None:
    """Sets the objective of `rlhf_type` and what belongs to it.

    Raises:
      ConfigError: a value is unknown, or is given without the field that it belongs to.
    """
    kind = given.get("rlhf_type")
    if kind is None:
        for name in NAMES:
            if name in given:
                raise ConfigError(
                    f"{path}: {name}={short(given[name])} and no rlhf_type: add rlhf_type, one of "
                    f"{', '.join(RLHF_TYPES)}, or leave it out"
                )
        return
    losses = _choice(path, "rlhf_type", kind, RLHF_TYPES)
    loss = given.get("loss_type", next(iter(losses)))
    c.objective.name = _choice(path, "loss_type", loss, losses)
    level = given.get("importance_sampling_level", "token")
    if _choice(path, "importance_sampling_level", level, {"token": False, "sequence": True}):
        if c.objective.name != "grpo":
            raise ConfigError(
                f"{path}: importance_sampling_level='sequence' and objective "
                f"{c.objective.name!r}: it needs rlhf_type: grpo with loss_type: grpo"
            )
        c.objective.name = "gspo"
    if "beta" in given:
        policy = kind in ("grpo", "rloo")
        name = "kl_beta" if policy else "beta"
        c.objective[name] = _number(path, "beta", given["beta"])
    strategy = given.get("truncation_strategy", "delete")
    c.data.overlong = _choice(path, "truncation_strategy", strategy, TRUNCATION)
    if "reward_funcs" in given or "reward_weights" in given:
        c.reward.functions = _rewards(path, given)
    logs = given.get("log_completions", False)
    c.rollout.log = (
        "texts" if _choice(path, "log_completions", logs, {True: 1, False: 0}) else ("none")
    )


def _rewards(path: str, given: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    names = given.get("reward_funcs") or ()
    names = [names] if isinstance(names, str) else names
    weights = given.get("reward_weights", [1.0] * len(names))
    lists = isinstance(names, list | tuple) and isinstance(weights, list | tuple)
    if not lists or len(weights) != len(names) or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f"{path}: reward_funcs={short(names)} and reward_weights={short(weights)}: give a list "
            "of names, and a weight for each or none"
        )
    return tuple(
        (REWARDS.get(name, name), _number(path, "reward_weights", weight))
        for name, weight in zip(names, weights, strict=True)
    )


def _number(path: str, name: str, value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-2 as a text
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: {name}={short(value)} is no number") from None


def _choice(path: str, name: str, value: Any, choices: dict[Any, Any]) -> Any:
    if not isinstance(value, str | bool) or value not in choices:
        raise ConfigError(
            f"{path}: {name}={short(value)} is none of {', '.join(map(str, choices))}"
        )
    return choices[value]
