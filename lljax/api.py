"""The Python face: prepare a model, train it, use it."""

from collections.abc import Mapping

import jax.numpy as jnp

from lljax.build import load_base, stretched
from lljax.config import default_config
from lljax.errors import ConfigError
from lljax.host_memory import set_pinned_limit
from lljax.interop.base import open_base
from lljax.models import lora, spec
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.initialise import initialise
from lljax.models.quantize import FORMS
from lljax.training import loop

# The fields of `lora_config` and what they are where they are not given.
LORA_CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
               "task_type": "CAUSAL_LM", "use_longlora": False, "longlora_sequence_length": None,
               "longlora_scaling_factor": None}


def prepare_model(model, lora_config=None, *, dtype: str = "float32", quantize: str = "none"):
    """`prepare_model(path)` -> (model, tokenizer); `prepare_model(model, lora_config)` -> the model with adapters.

    path: a hub id, a folder, or a GGUF file. quantize: as `model.quantize`. lora_config: a mapping (or an object with such
    attributes) of r, lora_alpha, target_modules, task_type, use_longlora, longlora_sequence_length and
    longlora_scaling_factor. With `use_longlora` embeddings and norms train too, and RoPE is interpolated linearly, by the
    factor, or so that it reaches the length.

    Raises:
      ConfigError: an unknown field or an illegal value. ModelError: the base cannot be read.
    """
    if lora_config is None:
        set_pinned_limit()
        if quantize not in ("none", *FORMS):
            raise ConfigError(f"prepare_model: quantize={quantize!r} is none of none, {', '.join(FORMS)}")
        base = open_base(model)
        decoder = load_base(base, spec.from_hf(base.config), jnp.dtype(dtype), quantize)
        decoder.settings = (("model.path", model), ("model.dtype", dtype), ("model.quantize", quantize))
        return decoder, base.tokenizer()
    return _adapt(model, _read(lora_config))


def train(model: Decoder, *, data, workdir: str, steps: int, length: int | None = None, **fields) -> Decoder:
    """Trains a prepared model on JSONL `data` for `steps` and returns it; the same script again resumes.

    The arrays of `model` are given away: use the model that is returned. length: tokens a row, by default all the model
    reads. Attention is shifted for the first three quarters of the steps of a LongLoRA model, then full. Further fields
    of the configuration go by their dotted names with "__" for ".", for example optimizer__learning_rate=1e-4.
    """
    settings = dict(model.settings)
    if "lora.rank" not in settings:
        raise ConfigError("this model has no adapters: call prepare_model(model, lora_config) first")
    length = length or model.spec.max_length
    bulk = 3 * steps // 4 if settings.pop("longlora") else 0
    schedule = ((bulk, length, "shifted"),) if bulk else ()
    c = default_config()
    settings |= {"data.train": (data,) if isinstance(data, str) else tuple(data),
                 "alarm.stall_minutes": 0.0,                    # what hangs may be interrupted here, and the process lives on
                 "context.length": model.spec.max_length, "context.schedule": (*schedule, (steps, length, "full"))}
    settings |= {name.replace("__", "."): value for name, value in fields.items()}
    try:
        c.update_from_flattened_dict(settings)
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"lljax.train: {str(error).splitlines()[0][:160]}") from None
    from lljax.evaluation.during import examiner  # here: nothing else of lljax needs the benchmarks to start
    return loop.train(c, workdir, model=model, examiner=examiner)


def _read(lora_config) -> dict:
    given = dict(lora_config) if isinstance(lora_config, Mapping) else {
        name: getattr(lora_config, name) for name in LORA_CONFIG if hasattr(lora_config, name)}
    for name in given:
        if name not in LORA_CONFIG:
            raise ConfigError(f"lora_config: unknown field {name!r}; there are {', '.join(LORA_CONFIG)}")
    c = LORA_CONFIG | given
    if str(getattr(c["task_type"], "value", c["task_type"])) != "CAUSAL_LM":
        raise ConfigError(f"lora_config: task_type={c['task_type']!r}; CAUSAL_LM is what is trained here")
    extras = [name for name in ("longlora_sequence_length", "longlora_scaling_factor") if c[name] is not None]
    if extras and not c["use_longlora"]:
        raise ConfigError(f"lora_config: {extras[0]}={c[extras[0]]} needs use_longlora=True")
    return c


def _adapt(model: Decoder, c: dict) -> Decoder:
    targets = (c["target_modules"],) if isinstance(c["target_modules"], str) else tuple(c["target_modules"])
    also_train = ("embed", "norm") if c["use_longlora"] else ()
    length, factor = c["longlora_sequence_length"], c["longlora_scaling_factor"]
    if length is None:
        length = int(model.spec.rope.original_length * factor) if factor else model.spec.max_length
    kind = "linear" if c["use_longlora"] and (factor or length > model.spec.max_length) else "keep"
    model.spec = stretched(model.spec, type=kind, factor=factor or "auto", length=length)
    lora.attach(model, rank=c["r"], alpha=float(c["lora_alpha"]), targets=targets, also_train=also_train)
    for _, variable in declared(model):
        if variable.get_metadata("role") in also_train:
            variable.set_value(variable.get_value().astype(jnp.float32))
    initialise(model, seed=0)
    model.settings += (("lora.rank", c["r"]), ("lora.alpha", float(c["lora_alpha"])), ("lora.targets", targets),
                       ("lora.also_train", also_train), ("context.rope.type", kind),
                       ("context.rope.factor", factor or "auto"), ("longlora", c["use_longlora"]))
    return model
