"""The models that an evaluation sets side by side, each loaded when its turn comes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.build import adapted_spec, answering, extended_spec, load_base, open_run_base
from lljax.errors import ConfigError
from lljax.interop.open import end_tokens, open_base, tokenizer_fingerprint
from lljax.interop.peft import read_adapter_config, under_adapter
from lljax.models import lora, spec
from lljax.models.decoder import Decoder
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import Layout
from lljax.run.checksums import describe
from lljax.run.restore import adapted_base, read_config, restore_run

BASE, STRETCHED, TRAINED = "base", "base, RoPE stretched", "trained"  # models, as scores call them


@dataclasses.dataclass(frozen=True)
class Candidate:
    """settings: what changes its answers beside its base, its spec and what trained."""

    name: str
    load: Callable[[], Decoder]
    settings: str


@dataclasses.dataclass(frozen=True)
class Candidates:
    """base: what all of them stand on. extended: the spec of the last, which the others may lack
    the length of. layout: where they lie, see lljax.build.answering.
    """

    base: object
    models: list[Candidate]
    extended: DecoderSpec
    dtype: object
    layout: Layout | None

    def key(self, candidate: Candidate, model: Decoder, tokenizer) -> str:
        """A name that tells what this model answers, through the tokenizer and its chat template,
        from what any other does.

        The checksums of what is frozen are in it as well: other weights may have been written to
          the folder of the base.
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


def model_key(name: str, base, model: Decoder, *settings) -> str:
    """The name with a digest of the base, by its headers and sizes; the spec, what trained, and the
    settings.
    """
    trained = nnx.as_pure(nnx.split(model, lora.is_trainable, ...)[1])
    told = [base.path, base.fingerprint(), repr(model.spec), describe(trained), *settings]
    return f"{name} {hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"


def of_run(workdir: Path) -> Candidates:
    """The base of a run (unless it began at random), the same under the RoPE of the run, and what
    the run trained.

    Raises:
      ConfigError: the folder holds no run, or one without a checkpoint.
    """
    config = read_config(workdir)
    # now, and not after the base's turn
    if not any(child.name.isdigit() for child in (workdir / "checkpoints").glob("*")):
        raise ConfigError(f"--workdir={workdir}: the run has no checkpoint yet")
    base = open_run_base(config)
    extended, dtype = extended_spec(base.config, config.context), jnp.dtype(config.model.dtype)
    settings = json.dumps(
        [json.loads(config[part].to_json_best_effort()) for part in ("model", "lora")]
    )
    models = (
        []
        if config.model.init == "random"
        else _bases(base, extended, dtype, settings, config.model.quantize, config.model.matmul)
    )
    layout = answering(extended)
    trained = Candidate(TRAINED, lambda: restore_run(workdir, layout=layout)[1], settings)
    return Candidates(base, [*models, trained], extended, dtype, layout)


def of_base(path: str, adapter: Path | None) -> Candidates:
    """A base; with an adapter in PEFT's format also the base under the adapter's RoPE, and the two
    together.

    They compute in bfloat16, on a CPU in float32.
    """
    base, dtype = open_base(path), jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if not adapter:
        plain = spec.from_hf(base.config)
        return Candidates(base, _bases(base, plain, dtype), plain, dtype, answering(plain))
    base = under_adapter(base, adapter)
    settings, extended = repr(read_adapter_config(adapter)), adapted_spec(base, adapter)
    layout = answering(extended)
    trained = Candidate(TRAINED, lambda: adapted_base(base, adapter, dtype, layout), settings)
    return Candidates(base, [*_bases(base, extended, dtype), trained], extended, dtype, layout)


def _bases(base, extended: DecoderSpec, dtype, settings: str = "", *like) -> list[Candidate]:
    """The base, and the base under the other spec if it is another. like: see `load_base`."""
    specs = {BASE: spec.from_hf(base.config), STRETCHED: extended}
    return [
        Candidate(
            name,
            lambda under=under: load_base(base, under, dtype, *like, layout=answering(under)),
            settings,
        )
        for name, under in specs.items()
        if name == BASE or under != specs[BASE]
    ]
