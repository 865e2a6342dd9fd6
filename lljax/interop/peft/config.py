"""adapter_config.json: the settings of an adapter."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lljax.errors import ConfigError, ModelError, short
from lljax.interop.folder import read_json
from lljax.interop.peft.tensors import MODULES, text_name
from lljax.models.decoder import Decoder
from lljax.models.lora import attach
from lljax.models.values import FLAG, LARGEST, WORD, Value, check, dict_of, list_of, optional, whole

# Fields that change the mathematics and are not read here, with the values that mean "not used".
UNSUPPORTED = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layers_to_transform": (None, []),
    "lora_bias": (None, False),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    # pissa, olora, corda and loftq change the base's weights when they start.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
MERGE_FIRST = "merge this adapter with PEFT and use the merged model as the base"

# The values that fields may hold.
ALPHA = Value(lambda x: type(x) in (int, float) and abs(x) <= LARGEST, "a number")
RANK = whole(1, 1 << 20)
NAMES = list_of(WORD)
CHECKS = {
    "peft_type": WORD,
    "r": RANK,
    "lora_alpha": ALPHA,
    "modules_to_save": optional(NAMES),
    "target_modules": Value(lambda x: WORD.holds(x) or NAMES.holds(x), "a word or a list of words"),
    "rank_pattern": optional(dict_of(RANK)),
    "alpha_pattern": optional(dict_of(ALPHA)),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "ensure_weight_tying": FLAG,
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")


class AdapterConfig(NamedTuple):
    """The settings of an adapter, as lora.attach takes them, and `ties`: a tied head and its
    embedding stay one table.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    also_train: tuple[str, ...]
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    dora: bool = False
    ties: bool = False

    def attach(self, model: Decoder) -> None:
        """Attaches adapters with these settings to a model, or to the text model that it is."""
        family = model.spec.family
        settings = {name: value for name, value in self._asdict().items() if name != "ties"}
        settings["targets"] = tuple(text_name(target, family) for target in self.targets)
        attach(model, **settings)


def read_adapter_config(folder: Path | str) -> AdapterConfig:
    """Reads the settings of an adapter, of lljax or of PEFT.

    Raises:
      ModelError: there is no adapter, or it is of an unsupported kind.
    """
    path = Path(folder) / "adapter_config.json"
    c = read_json(path)
    check({**dict.fromkeys(REQUIRED), **c}, CHECKS, str(path))
    if c["peft_type"] != "LORA":
        raise ModelError(f"{path}: peft_type is {short(c['peft_type'])}, and LORA is supported")
    for field, unused in UNSUPPORTED.items():
        if c.get(field) not in unused:
            raise ModelError(f"{path}: {field}={short(c[field])} is not supported; {MERGE_FIRST}")
    targets, alphas = c["target_modules"], c.get("alpha_pattern") or {}
    return AdapterConfig(
        rank=c["r"],
        alpha=float(c["lora_alpha"]),
        rslora=bool(c.get("use_rslora")),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        also_train=_roles(path, c.get("modules_to_save") or ()),
        rank_pattern=tuple((c.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((name, float(alpha)) for name, alpha in alphas.items()),
        dora=bool(c.get("use_dora")),
        ties=bool(c.get("ensure_weight_tying")),
    )


def _roles(path: Path, modules: list[str] | tuple) -> tuple[str, ...]:
    """The roles (`lora.also_train`) of modules_to_save."""
    names = {name.rpartition(".")[2] for name in modules}
    for name in sorted(names - set(MODULES.values())):
        if not name.endswith("norm"):
            raise ModelError(
                f"{path}: modules_to_save holds {short(name)}; embeddings, heads and norms are "
                "supported"
            )
    roles = {role for role, name in MODULES.items() if name in names}
    roles |= {"norm"} if any(name.endswith("norm") for name in names) else set()
    return tuple(sorted(roles))


@contextlib.contextmanager
def adapter_errors(folder: Path | str) -> Iterator[None]:
    """Turns a ConfigError about settings of an adapter into a ModelError that names its file."""
    try:
        yield
    except ConfigError as error:
        raise ModelError(f"{folder}/adapter_config.json: {error}") from None
