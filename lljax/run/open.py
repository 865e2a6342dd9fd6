"""The models that an evaluation compares: a base, the base with its RoPE stretched, the trained
model. Each is loaded when its turn comes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.build import adapted_spec, extended_spec, generation_layout, load_base, open_run_base
from lljax.errors import ConfigError
from lljax.interop.open import end_tokens, open_base, tokenizer_fingerprint
from lljax.interop.peft import read_adapter_config, under_adapter
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import Layout
from lljax.run.checksums import describe
from lljax.run.restore import load_adapted_base, read_config, restore_run

# The names of the models in scores and tables.
BASE, STRETCHED, TRAINED = "base", "base, RoPE stretched", "trained"


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A model to compare.

    settings: everything that changes its answers besides the base, the spec and the trained leaves.
    """

    name: str
    load: Callable[[], Decoder]
    settings: str


@dataclasses.dataclass(frozen=True)
class ComparedModels:
    """The models to compare, the trained one last.

    base: the base of all of them.
    extended: the spec of the last model, which reads the most tokens.
    dtype: the dtype of the computation.
    layout: the layout of the last model, see lljax.build.generation_layout.
    quantize, matmul: of the run, see lljax.build.load_base.
    """

    base: Any
    models: list[NamedModel]
    extended: DecoderSpec
    dtype: Any
    layout: Layout | None
    quantize: str = "none"
    matmul: str = "default"

    def key(self, candidate: NamedModel, model: Decoder, tokenizer: Any) -> str:
        """A name for the answers of `model` through the tokenizer and its chat template: another
        model has another key.

        It covers the checksums of the frozen weights: other weights may have been written to the
        folder of the base.
        """
        frozen = nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[2])
        return model_key(
            candidate.name,
            self.base,
            model,
            str(jnp.dtype(self.dtype)),
            candidate.settings,
            describe(frozen),
            tokenizer_fingerprint(tokenizer),
            sorted(end_tokens(self.base, tokenizer)),
        )


def model_key(name: str, base: Any, model: Decoder, *settings: Any) -> str:
    """The name with a digest of the base (headers and sizes), the spec, the trained leaves and the
    settings.
    """
    trained = nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1])
    content = [base.path, base.fingerprint(), repr(model.spec), describe(trained), *settings]
    return f"{name} {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


def open_run_models(workdir: Path) -> ComparedModels:
    """The models of a run: its base (unless it began at random), the base under the RoPE of the
    run, and the trained model.

    Raises:
      ConfigError: the folder holds no run, or a run without a checkpoint.
    """
    config = read_config(workdir)
    # Checked now: the trained model is loaded last.
    if not any(child.name.isdigit() for child in (workdir / "checkpoints").glob("*")):
        raise ConfigError(f"--workdir={workdir}: the run has no checkpoint yet")
    base = open_run_base(config)
    extended, dtype = extended_spec(base.config, config.context), jnp.dtype(config.model.dtype)
    settings = json.dumps(
        [json.loads(part.to_json_best_effort()) for part in (config.model, config.lora)]
    )
    models = []
    if config.model.init != "random":
        models = _bases(base, extended, dtype, settings, config.model.quantize, config.model.matmul)
    layout = generation_layout(extended)
    trained = NamedModel(TRAINED, lambda: restore_run(workdir, layout=layout)[1], settings)
    return ComparedModels(
        base=base,
        models=[*models, trained],
        extended=extended,
        dtype=dtype,
        layout=layout,
        quantize=config.model.quantize,
        matmul=config.model.matmul,
    )


def open_base_models(path: str, adapter: Path | None) -> ComparedModels:
    """A base; with an adapter in PEFT's format also the base under the adapter's RoPE, and the base
    with the adapter.

    They compute in bfloat16, on a CPU in float32.
    """
    base = open_base(path)
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if not adapter:
        plain = spec_from_hf(base.config)
        models = _bases(base, plain, dtype)
        return ComparedModels(
            base=base, models=models, extended=plain, dtype=dtype, layout=generation_layout(plain)
        )
    base = under_adapter(base, adapter)
    settings, extended = repr(read_adapter_config(adapter)), adapted_spec(base, adapter)
    layout = generation_layout(extended)
    trained = NamedModel(TRAINED, lambda: load_adapted_base(base, adapter, dtype, layout), settings)
    models = [*_bases(base, extended, dtype), trained]
    return ComparedModels(base=base, models=models, extended=extended, dtype=dtype, layout=layout)


def open_export(path: str, dtype: Any) -> NamedModel:
    """An exported checkpoint, named by its folder and the size of its weights.

    Raises:
      ModelError: there is none.
    """
    base = open_base(path)
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    spec = spec_from_hf(base.config)
    return NamedModel(
        f"{Path(path).name} ({size / 1e6:,.1f} MB)",
        lambda: load_base(base, spec, dtype, layout=generation_layout(spec)),
        path,
    )


def _bases(
    base: Any, extended: DecoderSpec, dtype: Any, settings: str = "", *weights: str
) -> list[NamedModel]:
    """The base, and the base under `extended` if that is another spec.

    weights: model.quantize and model.matmul, see `load_base`.
    """
    specs = {BASE: spec_from_hf(base.config), STRETCHED: extended}
    return [
        NamedModel(
            name,
            lambda under=under: load_base(
                base, under, dtype, *weights, layout=generation_layout(under)
            ),
            settings,
        )
        for name, under in specs.items()
        if name == BASE or under != specs[BASE]
    ]
