"""Tasks that a run puts to its model while it trains: `training.eval_tasks`."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.progress import track

from lljax.data.tokens import prepare
from lljax.errors import ConfigError
from lljax.evaluation import perplexity, registry
from lljax.evaluation.batched_generation import Asking, answer, too_short
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.results import Predictions
from lljax.evaluation.task import Sources, refuse_beyond
from lljax.interop.open import end_tokens, tokenizer_fingerprint
from lljax.run.open import model_key


def examiner(config, base, tokenizer, workdir: Path) -> Callable:
    """examine(model, step, layout, look) -> {"task@length": score}, as `lljax.run.loop.train` calls
    it.

    look() is called before every example, and may leave: the answers so far are in
    `workdir`/eval_predictions.jsonl.

    Raises:
      ConfigError: an unknown task, one whose file is not named in `training.eval_files`, or a
        length too short for it or far beyond what the model is trained to read.
      DataError: a file, or what is held out, is not what the task needs.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"training.eval_tasks={tuple(config.training.eval_tasks)}: a run of several processes cannot answer "
            "tasks; evaluate its checkpoints with scripts/evaluate.py"
        )
    for _, length in config.training.eval_tasks:
        refuse_beyond(length, config.context.length, "training.eval_tasks")
    asking = Asking(
        tokenizer, config.training.eval_rows, config.seed, stop=end_tokens(base, tokenizer)
    )
    sources = Sources(
        **{field: Path(path) for field, path in config.training.eval_files.items() if path}
    )
    pairs = [
        (registry.find([name], sources, "training.eval_tasks"), length)
        for name, length in config.training.eval_tasks
        if name not in PROTOCOLS
    ]
    for tasks, length in pairs:
        try:
            reasons = too_short(tasks, [length], asking)
        except ConfigError as error:
            raise ConfigError(
                f"training.eval_tasks: {error} (a run has training.eval_files for such flags)"
            ) from None
        for reason in reasons.values():
            raise ConfigError(f"training.eval_tasks: {reason}")
    texts = _held_out(config, base, tokenizer, workdir)
    dtype = jnp.dtype(config.model.dtype)

    def examine(model, step: int, layout, look: Callable[[], None]) -> dict[str, float]:
        def looking(items, title):
            for item in items:
                look()
                yield item

        key = model_key(
            f"step {step}",
            base,
            model,
            config.model.to_json_best_effort(),
            config.lora.to_json_best_effort(),
        )
        found = {
            f"{name}@{length}": perplexity.measure(
                name, model, looking(windows, name), length, dtype=dtype, layout=layout
            )
            for (name, length), windows in texts.items()
        }
        with Predictions(workdir / "eval_predictions.jsonl") as made:
            return found | {
                f"{score.task}@{score.length}": score.score
                for tasks, length in pairs
                for score in answer(
                    model,
                    f"step {step}",
                    key,
                    tasks,
                    [length],
                    asking,
                    made,
                    layout=layout,
                    dtype=dtype,
                    progress=looking,
                )
            }

    return examine


def _held_out(config, base, tokenizer, workdir: Path) -> dict:
    """What the protocols of perplexity among the tasks read, by (protocol, length)."""
    asked = [pair for pair in config.training.eval_tasks if pair[0] in PROTOCOLS]
    if not asked:
        return {}
    if any(name == "perplexity" for name, _ in asked):
        raise ConfigError(
            "training.eval_tasks: 'perplexity' is what a run reports anyway: leave it out, or name "
            "perplexity/longlora or perplexity/new_tokens"
        )
    store = prepare(
        config.data,
        tokenizer,
        base.config["vocab_size"],
        workdir / "data",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        progress=lambda items, title: track(items, title, transient=True),
    ).valid
    return {
        (name, length): perplexity.read(
            name,
            store,
            length,
            max(n for other, n in asked if other == name),
            config.training.eval_rows,
        )
        for name, length in asked
    }
