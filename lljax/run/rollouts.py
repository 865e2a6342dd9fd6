"""Rollouts: the model answers prompts, rewards judge the answers, and these become the batches of a
policy objective.

A rollout depends on the weights, the seed and its number alone, so that a resumed run makes the
same one again. If a rollout trains more than one step, its batch is kept in a file: the weights
that wrote it are gone by then.
"""

import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lljax.config import Config
from lljax.data.files import atomic_write
from lljax.data.prompts import PromptPieces
from lljax.data.token_store import TokenStore
from lljax.errors import ConfigError, DataError, first_line, printable
from lljax.generation.completion import Completion, Request
from lljax.generation.sample import Sampling
from lljax.objectives.advantages import deviations
from lljax.objectives.objective import Objective
from lljax.parallel.rounding import cdiv
from lljax.run.answer_writer import AnswerWriter, columns_of, mean, reward_of, tokens_of
from lljax.run.reward_workers import Judged, names_of, weighted
from lljax.run.rollout_rows import Answer, RowPlan, batch_of
from lljax.training.curriculum import Stage
from lljax.training.rollout import longest_prompt

SCORED = "scored/"  # before the names of the arrays that lie as on the device


class Rollouts:
    """The batches of a stage, see lljax.run.inputs.Batches."""

    reads_ahead = False  # an answer needs the weights after the step before it

    def __init__(
        self,
        writer: AnswerWriter,
        store: TokenStore,
        stage: Stage,
        objective: Objective,
        folder: Path,
        score: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
        restore: Callable[[np.ndarray], jax.Array],
    ):
        """folder: of the run. score: a batch -> its scored fields, on the device. restore: puts a
        scored field on the device again.

        Raises:
          ConfigError: no prompt leaves room for its answers.
        """
        self.metrics: dict[str, float] = {}
        self._writer, self._store, self._stage, self._folder = writer, store, stage, folder
        self._objective, self._score, self._restore = objective, score, restore
        config = self._config = writer.config
        self._pieces = prompts_of(config, store, stage)
        self._columns = columns_of(store, self._pieces)
        writer.rewards.require(self._columns)
        self._taken = self._made = self._updates = 0
        self._batch: dict[str, Any] | None = None
        self._logs = False  # whether rollouts.jsonl is as this process wants it

    @property
    def left_out(self) -> int:
        """The number of prompts that the stage never uses, for their length."""
        return len(self._store) - len(self._pieces)

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken, "made": self._made, "updates": self._updates}

    def set_state(self, state: dict[str, int]) -> None:
        self._taken, self._made, self._updates = state["taken"], state["made"], state["updates"]
        if self._updates % self._config.rollout.updates:
            self._batch = self._load()

    def __next__(self) -> dict[str, Any]:
        """The batch of the next step: of a new rollout if the last one has trained
        `rollout.updates` steps.
        """
        self.metrics = {}
        if self._updates % self._config.rollout.updates == 0:
            taken, batch = self._make()  # may be stopped: until here nothing has changed
            self._taken, self._made = taken, self._made + 1
            self._batch = batch
        self._updates += 1
        assert self._batch is not None, "a rollout has been made"
        return self._batch

    # ---------------------------------------------------------------- a rollout
    @property
    def _rows(self) -> int:
        return self._config.training.rows * self._config.training.accumulate

    def _plan(self) -> RowPlan:
        config = self._config
        return RowPlan(
            rows=self._rows,
            T=self._stage.length,
            answers=config.rollout.answers,
            longest=config.rollout.tokens,
            packing=config.data.packing,
        )

    def _number(self, taken: int) -> int:
        """The piece that is taken after `taken` others: every epoch has an order of its own."""
        epoch, i = divmod(taken, len(self._pieces))
        seed = (self._config.seed, self._stage.number, epoch)
        return int(np.random.default_rng(seed).permutation(len(self._pieces))[i])

    def _make(self) -> tuple[int, dict[str, Any]]:
        """The number of prompts taken after the next rollout, and its batch."""
        began = time.monotonic()
        plan, taken, pieces = self._plan(), self._taken, []
        while plan.add(len((piece := self._pieces[self._number(taken)])["tokens"])):
            pieces.append(piece)
            taken += 1
        completions = self._writer.write(self._requests(pieces))
        writing = time.monotonic() - began
        rows = [self._store.row(piece["document"]) for piece in pieces]
        A = self._config.rollout.answers
        judged = self._writer.judge(
            [row for row in rows for _ in range(A)], completions, self._columns
        )
        rewards = weighted(judged, self._writer.weights).reshape(-1, A)
        assert self._objective.advantages is not None, "the objective samples"
        advantages = self._objective.advantages(rewards, self._config)
        answers = [
            [
                Answer(tokens_of(completion), float(advantage), self._trains(completion))
                for completion, advantage in zip(
                    completions[p * A : (p + 1) * A], advantages[p], strict=True
                )
            ]
            for p in range(len(pieces))
        ]
        batch: dict[str, Any] = batch_of(
            plan.shares,
            [piece["tokens"] for piece in pieces],
            answers,
            rows=self._rows,
            T=self._stage.length,
        )
        scored = self._score(batch)
        self._keep(batch, scored)
        self._log(pieces, completions, judged, rewards, advantages)
        self.metrics = metrics_of(judged, rewards, completions) | {
            "rollout/prompts": float(len(pieces)),
            "rollout/seconds": time.monotonic() - began,
            "rollout/tokens_per_second": sum(len(tokens_of(c)) for c in completions) / writing,
        }
        return taken, batch | scored

    def _requests(self, pieces: Sequence[dict[str, Any]]) -> list[list[Request]]:
        """The requests of each prompt."""
        rollout, config = self._config.rollout, self._config
        sampling = Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=config.seed,
        )
        return [
            [
                Request(
                    piece["tokens"].tolist(),
                    rollout.tokens,
                    sampling,
                    numbers=(self._stage.number, self._made, prompt, answer),
                    stop=self._writer.stop,
                )
                for answer in range(rollout.answers)
            ]
            for prompt, piece in enumerate(pieces)
        ]

    def _trains(self, completion: Completion) -> bool:
        return completion.ended or not self._config.objective.mask_truncated

    # ---------------------------------------------------------------- files
    def _file(self, number: int) -> Path:
        return self._folder / "rollouts" / f"{self._stage.number}-{number}.npz"

    def _keep(self, batch: dict[str, np.ndarray], scored: dict[str, jax.Array]) -> None:
        """Keeps the batch of a rollout that trains several steps, as long as a checkpoint may need
        it.
        """
        config = self._config
        if config.rollout.updates == 1:
            return
        content = io.BytesIO()
        fields = {f"{SCORED}{name}": np.asarray(x) for name, x in scored.items()}
        np.savez_compressed(content, **batch, **fields)  # type: ignore[arg-type]
        self._file(self._made).parent.mkdir(exist_ok=True)
        atomic_write(self._file(self._made), content.getvalue())
        needed = cdiv(config.checkpoint.every_steps, config.rollout.updates)
        old = self._made - 2 - (config.checkpoint.keep + 2) * needed
        self._file(old).unlink(missing_ok=True)

    def _load(self) -> dict[str, Any]:
        """The batch of the last rollout."""
        path = self._file(self._made - 1)
        try:
            with np.load(path) as content:
                arrays = dict(content)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{printable(str(path))}: the answers of the last rollout cannot be read "
                f"({first_line(error)}): put the file back, or begin again in a new --workdir"
            ) from None
        return {
            name.removeprefix(SCORED): self._restore(x) if name.startswith(SCORED) else x
            for name, x in arrays.items()
        }

    def _log(
        self,
        pieces: Sequence[dict[str, Any]],
        completions: Sequence[Completion],
        judged: Judged,
        rewards: Float[np.ndarray, "P A"],
        advantages: Float[np.ndarray, "P A"],
    ) -> None:
        """Adds the answers of a rollout to rollouts.jsonl, as `rollout.log` says."""
        level, path = self._config.rollout.log, self._folder / "rollouts.jsonl"
        if level == "none":
            return
        if not self._logs:
            self._drop_later(path)
            self._logs = True
        A, tokenizer = self._config.rollout.answers, self._writer.tokenizer
        with open(path, "a") as file:
            for i, completion in enumerate(completions):
                prompt, answer = divmod(i, A)
                piece = pieces[prompt]
                values = zip(judged.names, judged.values[i].tolist(), strict=True)
                line = {
                    "stage": self._stage.number,
                    "rollout": self._made,
                    "document": piece["document"],
                    "answer": answer,
                    "reward": _number(rewards[prompt, answer]),
                    "rewards": {name: _number(value) for name, value in values},
                    "advantage": float(advantages[prompt, answer]),
                    "tokens": len(tokens_of(completion)),
                    "ended": completion.ended,
                }
                if level == "texts":
                    tokens = completion.tokens
                    line["text"] = tokenizer.decode(tokens, skip_special_tokens=True)
                file.write(json.dumps(line) + "\n")

    def _drop_later(self, path: Path) -> None:
        """Removes the lines that an interrupted process wrote after the last checkpoint."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
                place = record["stage"], record["rollout"]
            except (ValueError, KeyError, TypeError):  # cut off
                continue
            if place < (self._stage.number, self._made):
                kept.append(line)
        atomic_write(path, "".join(kept))


def prompts_of(config: Config, store: TokenStore, stage: Stage) -> PromptPieces:
    """The prompts of a stage that leave room for their answers.

    Raises:
      ConfigError: there is none.
    """
    room = longest_prompt(config, stage.length)
    pieces = PromptPieces(store, room, config.data.overlong)
    if not len(pieces):
        raise ConfigError(
            f"data.train has no prompt of at most {room} tokens, which leaves room for "
            f"{config.rollout.answers} answers of {config.rollout.tokens} tokens in the rows of a "
            f"step of {stage.length} tokens: set data.overlong='truncate', or use more "
            "training.accumulate, longer rows, or shorter or fewer answers"
        )
    return pieces


def metrics_of(
    judged: Judged, rewards: Float[np.ndarray, "P A"], completions: Sequence[Completion]
) -> dict[str, float]:
    """The metrics of a rollout, named as TRL names them."""
    spread = deviations(rewards)
    lengths = np.asarray([len(tokens_of(completion)) for completion in completions])
    ended = np.asarray([completion.ended for completion in completions])
    metrics = {
        "reward": mean(rewards),
        "reward_std": mean(spread),
        "frac_reward_zero_std": mean(np.isclose(spread, 0)),
    }
    for i, name in enumerate(judged.names):
        metrics[f"rewards/{name}/mean"] = mean(judged.values[:, i])
        known = judged.values[~np.isnan(judged.values[:, i]), i]
        metrics[f"rewards/{name}/std"] = (
            float(deviations(known[None])[0]) if len(known) else float("nan")
        )
    metrics |= {
        "completions/mean_length": mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1 - mean(ended),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = mean(lengths[ended])
    return metrics


def titles(config: Config) -> dict[str, str]:
    """The titles of the charts of a rollout's metrics, by name."""
    names = names_of([reward_of(*given) for given in config.reward.functions])
    return {
        "reward": "Reward of an answer",
        "reward_std": "Standard deviation of the rewards of a prompt",
        "frac_reward_zero_std": "Share of prompts whose answers have equal rewards",
        **{f"rewards/{name}/mean": f"Reward {name}" for name in names},
        "completions/mean_length": "Tokens of an answer",
        "completions/clipped_ratio": "Share of answers cut off",
        "rollout/seconds": "Seconds of a rollout",
    }


def _number(value: float) -> float | None:
    """A value for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)
