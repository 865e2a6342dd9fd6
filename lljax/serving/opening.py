"""Opens the models that a server offers, and builds their engine."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lljax.build import adapted_spec, generation_layout
from lljax.data.template import with_template
from lljax.errors import ConfigError, ModelError
from lljax.generation.engine import Engine
from lljax.interop.open import end_tokens
from lljax.interop.peft import under_adapter
from lljax.models.by_layer import split_layers
from lljax.models.declare import LoraWeight, declared
from lljax.models.decoder import Decoder
from lljax.run.open import BASE, TRAINED, ComparedModels, open_base_models, open_run_models
from lljax.run.restore import load_adapted_base, restore_run, trained_template
from lljax.serving.models import Models, Served, served

PLAIN = "plain"  # the value of --chat_template for lljax's own


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """rows: requests that an engine serves at once. longest: tokens of a prompt and its answer, if
    fewer than the model reads. cache_dtype: None for the dtype of the computation. prefix_bytes: of
    the prefix cache. chat_template: in place of the model's; "plain" for lljax's own
    where the model has none.
    """

    rows: int = 8
    longest: int | None = None
    cache_dtype: Any = None
    prefix_bytes: int = 1 << 30
    chat_template: str | None = None


class Library:
    """The models of one base, on one engine; their equal weights are in memory once."""

    def __init__(self, source: ComparedModels, options: EngineOptions):
        self._source, self._base, self._dtype = source, source.base, source.dtype
        self._options = options
        self._engine: Engine | None = None
        self._decoders: dict[str, Decoder] = {}

    def add(self, name: str, decoder: Decoder, template: str | None = None, **more: Any) -> Served:
        """Offers a decoder under a name, and takes its arrays (`split_layers`). template: of a
        chat, if the model has none. more: fields of Served.
        """
        decoder = split_layers(decoder)  # nobody else has it
        for other in self._decoders.values():
            share_weights(decoder, other)
        tokenizer, options = self._tokenizer(template), self._options
        if self._engine is None:
            self._engine = Engine(
                decoder,
                tokenizer,
                rows=options.rows,
                dtype=self._dtype,
                cache_dtype=options.cache_dtype,
                prefix_bytes=options.prefix_bytes,
                layout=generation_layout(decoder.spec),
            )
        else:
            self._engine.add_adapter(name, decoder)
            more |= {"adapter": name}
        self._decoders[name] = decoder
        longest = min(decoder.spec.max_length, options.longest or decoder.spec.max_length)
        ends = end_tokens(self._base, tokenizer)
        return served(name, self._engine, tokenizer, ends=ends, longest=longest, **more)

    def compile(self, longest: int) -> None:
        """See `Engine.compile`.

        Raises:
          ConfigError: no model reads so much.
        """
        assert self._engine is not None, "there is a model"
        most = max(decoder.spec.max_length for decoder in self._decoders.values())
        most = min(most, self._options.longest or most)
        if longest > most:
            raise ConfigError(f"--compile={longest}: requests have up to {most:,} tokens")
        self._engine.compile(longest)

    def read_adapter(self, name: str, path: str) -> Callable[[], Served]:
        """Reads an adapter from disk; returns what puts it on the engine, to be called between two
        steps.

        Raises:
          ConfigError: as `load_adapter`.
        """
        decoder = load_adapter(self._source, Path(path))
        return lambda: self.add(name, decoder, root=path, parent=BASE)

    def remove_adapter(self, model: Served) -> None:
        """Frees what an adapter takes."""
        assert self._engine is not None and model.adapter is not None, "the base stays"
        self._engine.remove_adapter(model.adapter)
        del self._decoders[model.adapter]

    def _tokenizer(self, template: str | None) -> Any:
        tokenizer, wanted = self._base.tokenizer(), self._options.chat_template
        if wanted == PLAIN:
            return with_template(tokenizer)
        if wanted or template:
            tokenizer.chat_template = wanted or template
        return tokenizer


def open_run(workdir: Path, options: EngineOptions) -> tuple[Models, Library]:
    """The base of a run as "base", unless it began at random, and the trained model under the name
    of the run's folder.
    """
    source = open_run_models(workdir)
    library, models = Library(source, options), Models()
    name = workdir.resolve().name
    template = trained_template(workdir, source.base)
    for candidate in source.models:
        if candidate.name == BASE:
            models.add(library.add(BASE, candidate.load(), root=source.base.path))
        elif candidate.name == TRAINED:
            name = TRAINED if name in ("", BASE) else name
            parent = BASE if BASE in models.names else None
            more = {"root": str(workdir), "parent": parent}
            models.add(library.add(name, candidate.load(), template, **more))
    return models, library


def open_adapters(
    path: str, adapters: dict[str, str], options: EngineOptions
) -> tuple[Models, Library]:
    """A base as "base", and adapters of it under their names.

    Raises:
      ConfigError: an adapter is called "base".
    """
    if BASE in adapters:
        raise ConfigError(f"--adapter={BASE}=...: that is the name of the base: use another")
    source = open_base_models(path, None)
    library = Library(source, options)
    models = Models(library.add(BASE, source.models[0].load(), root=path))
    for name, folder in adapters.items():
        models.add(library.read_adapter(name, folder)())
    return models, library


def load_adapter(source: ComparedModels, path: Path) -> Decoder:
    """The base with an adapter: the newest checkpoint of a run, or a folder in PEFT's format, which
    comes on the weights that are served.

    Raises:
      ConfigError: there is neither, it belongs to another base, or a value is not finite.
    """
    decoder = _load_adapter(source, path)
    for name, variable in declared(decoder):
        changed = isinstance(variable, LoraWeight) or variable.get_metadata().get("trainable")
        if changed and not all(jnp.isfinite(x).all() for x in jax.tree.leaves(variable[...])):
            raise ConfigError(f"{path}: {'.'.join(map(str, name))} has values that are not finite")
    return decoder


def _load_adapter(source: ComparedModels, path: Path) -> Decoder:
    base = source.base
    if (path / "checkpoints").is_dir():
        _, decoder, its_base = restore_run(path)
        if its_base.fingerprint() != base.fingerprint():
            raise ModelError(f"{path}: a run of another base, {its_base.path}")
        if layout := generation_layout(decoder.spec):
            _, decoder, _ = restore_run(path, layout=layout)
        return decoder
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(f"{path}: neither a run nor an adapter in PEFT's format")
    base = under_adapter(base, path)
    layout = generation_layout(adapted_spec(base, path))
    weights = {"quantize": source.quantize, "matmul": source.matmul}
    return load_adapted_base(base, path, source.dtype, layout, **weights)


def share_weights(decoder: Decoder, other: Decoder) -> None:
    """Replaces the weights of `decoder` that equal those of `other` by the same arrays."""
    theirs = {path: variable.get_value() for path, variable in declared(other)}
    for path, variable in declared(decoder):
        if path in theirs and _equal(variable.get_value(), theirs[path]):
            variable.set_value(theirs[path])


def _equal(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        and bool(jnp.array_equal(x, y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
