"""Evaluation on tasks during training: `training.eval_tasks`."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from lljax.config.tree import Config
from lljax.data.kinds import DOCUMENTS
from lljax.data.tokens import prepare
from lljax.errors import ConfigError
from lljax.evaluation import perplexity, registry
from lljax.evaluation.batched_generation import (
    EvalModel,
    EvalSettings,
    score_tasks,
    too_short,
)
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.task import Sources, Task, refuse_beyond
from lljax.interop.open import end_tokens, tokenizer_fingerprint
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout
from lljax.run.inputs import kind_of
from lljax.run.open import model_key

FIELD = "training.eval_tasks"


@dataclasses.dataclass(frozen=True)
class EvalHook:
    """Called by the training loop: hook(model, step, layout, look) -> {"task@length": score}.

    tasks: the tasks of each name in `training.eval_tasks`, and its length. texts: held-out tokens
      by (protocol of perplexity, length).
    """

    config: Config
    base: Any
    settings: EvalSettings
    tasks: tuple[tuple[list[Task], int], ...]
    texts: dict[tuple[str, int], np.ndarray]
    predictions: Path

    def __call__(
        self, model: Decoder, step: int, layout: Layout | None, look: Callable[[], None]
    ) -> dict[str, float]:
        """look() is called before every example, and may raise to stop: the answers so far are in
        `predictions`.
        """

        def looking(items: Iterable, title: str) -> Iterator:
            for item in items:
                look()
                yield item

        config, dtype = self.config, jnp.dtype(self.config.model.dtype)
        scores = {
            f"{name}@{length}": perplexity.measure(
                name, model, looking(windows, name), length, dtype=dtype, layout=layout
            )
            for (name, length), windows in self.texts.items()
        }
        settings = config.model.to_json_best_effort(), config.lora.to_json_best_effort()
        key = model_key(f"step {step}", self.base, model, *settings)
        evaluated = EvalModel(model=model, name=f"step {step}", key=key, dtype=dtype, layout=layout)
        with Predictions(self.predictions) as predictions:
            for tasks, length in self.tasks:
                for score in score_tasks(
                    evaluated, tasks, [length], self.settings, predictions, progress=looking
                ):
                    scores[f"{score.task}@{score.length}"] = score.score
        return scores


def make_eval_hook(config: Config, base: Any, tokenizer: Any, workdir: Path) -> EvalHook:
    """The hook of a run; its answers are kept in `workdir`/eval_predictions.jsonl.

    Raises:
      ConfigError: an unknown task, a task whose file is not named in `training.eval_files`, or a
        length that is too short for a task or far beyond the length the model is trained for.
      DataError: a benchmark's file or the held-out documents do not serve the task.
    """
    pairs = tuple(config.training.eval_tasks)
    if jax.process_count() > 1:
        raise ConfigError(
            f"{FIELD}={pairs}: a run of several processes cannot answer tasks; evaluate its "
            "checkpoints with `lljax evaluate`"
        )
    for _, length in pairs:
        refuse_beyond(length, config.context.length, FIELD)
    settings = EvalSettings(
        tokenizer=tokenizer,
        samples=config.training.eval_rows,
        seed=config.seed,
        stop=end_tokens(base, tokenizer),
    )
    files = config.training.eval_files
    sources = Sources(**{field: Path(path) for field, path in files.items() if path})
    tasks = tuple(
        (registry.find([name], sources, FIELD), length)
        for name, length in pairs
        if name not in PROTOCOLS
    )
    for members, length in tasks:
        _check_fit(members, length, settings)
    return EvalHook(
        config=config,
        base=base,
        settings=settings,
        tasks=tasks,
        texts=_held_out(config, base, tokenizer, workdir),
        predictions=workdir / "eval_predictions.jsonl",
    )


def _check_fit(tasks: list[Task], length: int, settings: EvalSettings) -> None:
    try:
        reasons = too_short(tasks, [length], settings)
    except ConfigError as error:
        raise ConfigError(
            f"{FIELD}: {error} (a run has training.eval_files for such flags)"
        ) from None
    for reason in reasons.values():
        raise ConfigError(f"{FIELD}: {reason}")


def _held_out(
    config: Config, base: Any, tokenizer: Any, workdir: Path
) -> dict[tuple[str, int], np.ndarray]:
    """The held-out tokens of each (protocol of perplexity, length) of `training.eval_tasks`."""
    pairs = [pair for pair in config.training.eval_tasks if pair[0] in PROTOCOLS]
    if not pairs:
        return {}
    if any(name == "perplexity" for name, _ in pairs):
        raise ConfigError(
            f"{FIELD}: a run reports 'perplexity' anyway: leave it out, or name "
            "perplexity/longlora or perplexity/new_tokens"
        )
    if (kind := kind_of(config)).name != DOCUMENTS.name:
        raise ConfigError(
            f"{FIELD}={tuple(pairs)}: perplexity needs documents, and the run reads {kind.noun}: "
            "use lljax evaluate with --held_out"
        )
    store = prepare(
        config.data,
        tokenizer,
        base.config["vocab_size"],
        workdir / "data",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        progress=lambda items, title: iter(track(items, title, transient=True)),
    ).valid
    return {
        (name, length): perplexity.read(
            name,
            store,
            length,
            max(n for other, n in pairs if other == name),
            config.training.eval_rows,
        )
        for name, length in pairs
    }
