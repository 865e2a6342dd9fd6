"""Tasks that a run puts to its model while it trains: `training.eval_tasks`."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lljax.errors import ConfigError
from lljax.evaluation import registry
from lljax.evaluation.answer import Asking, answer, too_short
from lljax.evaluation.candidates import model_key
from lljax.evaluation.results import Predictions
from lljax.evaluation.task import Sources
from lljax.interop.base import end_tokens


def examiner(config, base, tokenizer, workdir: Path) -> Callable:
    """examine(model, step, layout, look) -> {"task@length": score}, as `lljax.training.loop.train` calls it.

    look() is called before every example, and may leave: the answers so far are in `workdir`/eval_predictions.jsonl.

    Raises:
      ConfigError: an unknown task, one that is read from files, or too short a length for it.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"training.eval_tasks={tuple(config.training.eval_tasks)}: a run of several processes cannot answer "
                          "tasks; evaluate its checkpoints with scripts/evaluate.py")
    asking = Asking(tokenizer, config.training.eval_rows, config.seed, stop=end_tokens(base, tokenizer))
    pairs = [(registry.find([name], Sources(), "training.eval_tasks"), length) for name, length in config.training.eval_tasks]
    for tasks, length in pairs:
        for reason in too_short(tasks, [length], asking).values():
            raise ConfigError(f"training.eval_tasks: {reason}")

    def examine(model, step: int, layout, look: Callable[[], None]) -> dict[str, float]:
        def looking(items, title):
            for item in items:
                look()
                yield item
        key = model_key(f"step {step}", base, model, config.model.to_json_best_effort(), config.lora.to_json_best_effort())
        with Predictions(workdir / "eval_predictions.jsonl") as made:
            return {f"{score.task}@{score.length}": score.score for tasks, length in pairs
                    for score in answer(model, f"step {step}", key, tasks, [length], asking, made, layout=layout,
                                        dtype=jnp.dtype(config.model.dtype), progress=looking)}
    return examine
