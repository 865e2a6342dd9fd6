"""Writes answers to prompts with the model as it is, and judges them by the reward functions."""

import ast
import concurrent.futures
import dataclasses
import urllib.parse
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lljax.config import Config
from lljax.data.prompts import PromptPieces
from lljax.data.token_store import TokenStore
from lljax.errors import ConfigError, short
from lljax.generation.completion import Completion, Request
from lljax.generation.forked import write_answers
from lljax.generation.sample import GREEDY
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import Layout
from lljax.run.reward_workers import Judged, Reward, RewardWorkers, weighted
from lljax.training.rollout import cache_dtype

COLUMN_ROWS = 1_000  # prompts whose columns are looked at before training
LOOK_SECONDS = 0.1  # between two looks while answers are judged


@dataclasses.dataclass(frozen=True)
class AnswerWriter:
    """Writes and judges answers.

    model: the model as it is now. stop: tokens that end an answer. layout: of the mesh; None for
      one device. rewards: the workers of `reward.functions`. look: called often; it may raise to
      stop the run. say: shows a line to the user.
    """

    config: Config
    model: Callable[[], Decoder]
    tokenizer: Any
    stop: frozenset[int]
    layout: Layout | None
    rewards: RewardWorkers
    look: Callable[[], None]
    say: Callable[[str], None]

    def write(self, requests: Sequence[Sequence[Request]]) -> list[Completion]:
        """The completions of the requests of each prompt, in their order."""
        model, dtype = self.model(), jnp.dtype(self.config.model.dtype)
        return [
            completion
            for of_prompt in requests
            for completion in write_answers(
                model,
                of_prompt,
                dtype=dtype,
                cache_dtype=cache_dtype(self.config),
                layout=self.layout,
                look=self.look,
            )
        ]

    def judge(
        self,
        rows: Sequence[dict[str, Any]],
        completions: Sequence[Completion],
        columns: Set[str],
    ) -> Judged:
        """The rewards of completions. rows: the prompt and the columns of each. columns: names that
        reward functions get in any case, with None for a row that lacks one.
        """
        texts = [
            self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            for completion in completions
        ]
        prompts = [row["prompt"] for row in rows]
        names = ({name for row in rows for name in row} | columns) - {"prompt"}
        judged = self._while_looking(
            prompts,
            [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for text, prompt in zip(texts, prompts, strict=True)
            ],
            [tokens_of(completion).tolist() for completion in completions],
            {name: [row.get(name) for row in rows] for name in sorted(names)},
        )
        for name, reason in judged.failures.items():
            self.say(f"reward {name} counts as None for {len(rows):,} answers: {reason}")
        return judged

    def _while_looking(self, *arguments: Any) -> Judged:
        """Calls the reward functions in a thread: the run may be asked to stop meanwhile."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            judging = thread.submit(self.rewards, *arguments)
            try:
                while not concurrent.futures.wait([judging], LOOK_SECONDS).done:
                    self.look()
            except BaseException:
                self.rewards.close()  # ends the functions, for which the thread waits
                raise
            return judging.result()

    def evaluate(self, store: TokenStore, length: int) -> dict[str, float]:
        """The mean rewards of one greedy answer to each of the first `training.eval_rows` held-out
        prompts that leave room for one in `length` tokens; empty if there are none.
        """
        rollout, weights = self.config.rollout, self.weights
        pieces = PromptPieces(store, length - rollout.tokens, "drop")
        chosen = [pieces[i] for i in range(min(len(pieces), self.config.training.eval_rows))]
        if not chosen:
            return {}
        completions = self.write(
            [
                [Request(piece["tokens"].tolist(), rollout.tokens, GREEDY, stop=self.stop)]
                for piece in chosen
            ]
        )
        rows = [store.row(piece["document"]) for piece in chosen]
        judged = self.judge(rows, completions, columns_of(store, pieces))
        scores = {"reward": mean(weighted(judged, weights))}
        scores |= {
            f"rewards/{name}": mean(judged.values[:, i]) for i, name in enumerate(judged.names)
        }
        scores["completions/mean_length"] = mean([len(tokens_of(c)) for c in completions])
        return {f"{name}@{length}": value for name, value in scores.items()}

    @property
    def weights(self) -> list[float]:
        """Of the reward functions."""
        return [reward.weight for reward in self.rewards.rewards]


def columns_of(store: TokenStore, pieces: PromptPieces) -> frozenset[str]:
    """The columns of the first prompts, for reward functions; rows may lack some of them."""
    rows = (store.row(int(document)) for document in pieces.document[:COLUMN_ROWS])
    return frozenset(name for row in rows for name in row) - {"prompt"}


def tokens_of(completion: Completion) -> Int[np.ndarray, " n"]:
    """The tokens of an answer, with the token that ended it, int32."""
    ended = [] if completion.stop_token is None else [completion.stop_token]
    return np.asarray([*completion.tokens, *ended], np.int32)


def reward_of(given: str, weight: float) -> Reward:
    """A reward of `reward.functions`. given: the function's name, with options such as
    "repetition?ngram_size=3&max_penalty=-1".

    Raises:
      ConfigError: the options cannot be read.
    """
    function, _, query = given.partition("?")
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=bool(query))
        options = tuple((name, ast.literal_eval(value)) for name, value in pairs)
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"reward.functions: the options of {short(given)} are not like ?name=1&other='text'"
        ) from None
    return Reward(function, weight, options)


def open_rewards(config: Config) -> RewardWorkers:
    """The reward functions of a run, in processes of their own; a context.

    Raises:
      ConfigError: one cannot be used.
    """
    return RewardWorkers(
        [reward_of(*given) for given in config.reward.functions],
        timeout=config.reward.timeout,
        processes=config.reward.processes,
    )


def mean(values: Any) -> float:
    """The mean of the values that are not NaN; NaN without any."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")
