"""The row of an objective: the batch it reads, the loss it minimizes, the metrics it reports."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lljax.attention.pattern import AttentionPattern
from lljax.config import Config
from lljax.data.batch import Batch, Field
from lljax.models.decoder import Decoder
from lljax.models.memory import Memory
from lljax.models.spec import DecoderSpec
from lljax.objectives.token_loss import entropies_of, log_probs_of
from lljax.parallel.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the values of the accumulated passes of a step become one scalar.

    over_passes: array [A, ...] -> [...].
    finish: the result and the step's weight -> float32 scalar.
    """

    over_passes: Callable[[Array], Array]
    finish: Callable[[Array, Array], Array]


def _sum(values: Array) -> Array:
    return values.sum(0)


MEAN = Reduction(_sum, lambda total, weight: total / weight)
SUM = Reduction(_sum, lambda total, _: total)
MAX = Reduction(lambda values: values.max(0), lambda largest, _: largest)


def ratio(values: Array) -> Array:
    """A sum divided by its count, [2]; of two of them, [4], the first ratio minus the second. NaN
    if there is nothing to count.
    """
    first = jnp.where(values[1] > 0, values[0] / jnp.maximum(values[1], 1e-9), jnp.nan)
    return first if len(values) == 2 else first - ratio(values[2:])


# Of sums that have counts of their own, in place of the weight.
RATIO = Reduction(_sum, lambda values, _: ratio(values))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A value that each step reports under `name`, a key of metrics.jsonl.

    title: the title of its chart.
    reduction: how the values of the passes become the value of the step.
    """

    name: str
    title: str
    reduction: Reduction = MEAN


TOKENS = Metric("tokens", "Predicted tokens", SUM)


@dataclasses.dataclass(frozen=True)
class PassSettings:
    """The static settings of a forward pass, with the names of their config fields.

    packed: rows may hold several documents.
    temperature: divides the logits of `Pass.log_probs`.
    options: the objective's options, as `Objective.options` reads them from the configuration.
    """

    memory: Memory
    loss_chunk: int
    dtype: str
    packed: bool
    neftune_alpha: float
    options: Any
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pass:
    """The model and the circumstances of one forward pass, as an objective receives them.

    key: the random key of dropout and noise; None in an evaluation. The rows of an evaluation hold
      one document each.
    """

    model: Decoder
    settings: PassSettings
    pattern: AttentionPattern
    layout: Layout | None
    key: Array | None = None

    @property
    def trains(self) -> bool:
        """True in a step, False in an evaluation."""
        return self.key is not None

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """The model's hidden states of a batch [B, T]."""
        return self._run(batch)

    def hidden_and_load(
        self, batch: Batch, counted: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L 2 E"]]:
        """The hidden states, and the load of the experts over the `counted` tokens."""
        return self._run(batch, counted=counted)

    def log_probs(self, batch: Batch, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """The log-probability of every target after hidden states of the batch; 0 for no target."""
        return log_probs_of(
            self.model,
            hidden,
            batch["targets"],
            chunk=self.settings.loss_chunk,
            temperature=self.settings.temperature,
            layout=self.layout,
            key=self.key,
        )

    def entropies(self, batch: Batch, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """The entropy in nats of the distribution of every target; 0 for no target. No gradient."""
        return entropies_of(
            self.model,
            hidden,
            batch["targets"],
            chunk=self.settings.loss_chunk,
            temperature=self.settings.temperature,
            layout=self.layout,
        )

    def _run(self, batch: Batch, **options: Any) -> Any:
        reordered = self.layout is not None and self.layout.zigzag
        branches = batch.get("branches")
        packed = self.trains and self.settings.packed or branches is not None
        return self.model(
            batch["tokens"],
            positions=batch["positions"],
            # A row of one document is padded at its end: the causal mask hides the padding.
            segments=batch["segments"] if packed else None,
            # Kernels are faster without an index if tokens lie in order.
            index=batch["index"] if reordered else None,
            branches=branches,
            pattern=self.pattern,
            layout=self.layout,
            memory=self.settings.memory,
            dtype=jnp.dtype(self.settings.dtype),
            dropout_key=self.key,
            neftune_alpha=self.settings.neftune_alpha,
            **options,
        )


class Loss(NamedTuple):
    """The loss of a pass, as sums over its tokens.

    total: float32 scalar; the minimized loss is total / weight of the step.
    sums: values of the objective's metrics by name, before their reduction. The metric `loss` is
      `total` unless it is among them.
    """

    total: Float[Array, ""]
    sums: dict[str, Array]


class Passes(NamedTuple):
    """Forward and backward passes over the tokens of a batch, for FLOPs and memory traffic."""

    forward: int
    backward: int


ONE_OF_EACH = Passes(forward=1, backward=1)


def _same(means: dict[str, float]) -> dict[str, float]:
    return means


def _nothing(config: Config) -> Any:
    return None


def _nothing_scored(config: Config) -> tuple[str, ...]:
    return ()


def _never(config: Config, spec: DecoderSpec) -> str | None:
    return None


def _one_of_each(config: Config) -> Passes:
    return ONE_OF_EACH


def refuses_settings_of_sft(config: Config) -> str | None:
    """Why settings that only supervised fine-tuning reads do not go with another objective."""
    name, training = config.objective.name, config.training
    if training.router_aux_loss_coef:
        return (
            f"training.router_aux_loss_coef={training.router_aux_loss_coef} and objective.name="
            f"{name!r}, which does not balance experts: set it to 0"
        )
    if training.neftune_alpha:
        return (
            f"training.neftune_alpha={training.neftune_alpha} and objective.name={name!r}, which "
            "compares log-probabilities without noise: set it to 0"
        )
    return None


# Log-probabilities of the targets that a forward pass gives before the step, as fields of a batch.
REFERENCE = "reference"  # under the trainable leaves as they were before the first step
OLD = "old"  # under the leaves that made the answers of the batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of lljax.objectives.table.OBJECTIVES.

    name: the value of `objective.name`.
    fields: the fields of a batch that the pieces of documents give, besides segments, positions
      and index.
    loss: (pass, batch [B, T]) -> Loss.
    weight: batch of any shape -> scalar that the sums of a step are divided by. Sums and weight are
      added over all passes first, so that accumulation changes nothing.
    evaluate: (pass, batch [B, T]) -> (sums by name, weight); `scores` receives sums / weight. None
      if held-out documents are not evaluated by their tokens.
    metrics: the metrics of a step. The metric `loss` comes first.
    counted: the metric of the weight.
    headline: the metric that a report shows first.
    scores: sums / weight of an evaluation, by name -> the values to record, by name.
    options: config -> hashable settings that loss and evaluate read from `pass_.settings.options`.
    refuses: (config, spec) -> why the objective cannot train this model, or None.
    passes: config -> the passes of a step, for its FLOPs and memory traffic.
    kind: what the rows of its files are, a key of lljax.data.kinds.KINDS.
    scored: config -> the fields of a batch that a forward pass fills before the step: REFERENCE
      and OLD.
    advantages: rewards [P, A] of A answers to P prompts, NaN for none, and the config -> their
      advantages float32 [P, A], if the model writes the answers that it is trained on; the
      documents are prompts. None if the documents hold what is trained.
    reads: the config fields of `objective`, `rollout` and `reward` that it reads, besides
      objective.name.
    """

    name: str
    fields: tuple[Field, ...]
    loss: Callable[[Pass, Batch], Loss]
    weight: Callable[[Batch], Array]
    evaluate: Callable[[Pass, Batch], tuple[dict[str, Array], Array]] | None
    metrics: tuple[Metric, ...]
    counted: Metric = TOKENS
    headline: str = "loss"
    scores: Callable[[dict[str, float]], dict[str, float]] = _same
    options: Callable[[Config], Any] = _nothing
    refuses: Callable[[Config, DecoderSpec], str | None] = _never
    passes: Callable[[Config], Passes] = _one_of_each
    kind: str = "documents"
    scored: Callable[[Config], tuple[str, ...]] = _nothing_scored
    advantages: Callable[[np.ndarray, Config], np.ndarray] | None = None
    reads: tuple[str, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the model writes the answers that it is trained on."""
        return self.advantages is not None

    def keeps_reference(self, config: Config) -> bool:
        """Whether the reference's leaves stay on the device during a run."""
        return REFERENCE in self.scored(config) and config.objective.reference == "adapter_off"

    def batch_fields(self, config: Config) -> tuple[Field, ...]:
        """The fields of the batch of a step: of the pieces, and scored ones."""
        return (*self.fields, *(Field(name, np.float32) for name in self.scored(config)))

    def reduce_passes(self, sums: dict[str, Array]) -> dict[str, Array]:
        """`sums` [A, ...] of the accumulated passes, reduced over the passes."""
        reductions = {metric.name: metric.reduction for metric in self.metrics}
        return {
            name: jax.tree.map(reductions[name].over_passes, values)
            for name, values in sums.items()
        }

    def finish(self, sums: dict[str, Array], weight: Array) -> dict[str, Array]:
        """The metrics of a step. sums: the result of `reduce_passes`, or the sums of one pass."""
        reductions = {metric.name: metric.reduction for metric in self.metrics}
        return {name: reductions[name].finish(value, weight) for name, value in sums.items()}
