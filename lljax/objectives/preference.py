"""Preference objectives: a chosen and a rejected answer to one prompt, and single answers that are
judged good or bad (KTO). The prompt is read once for all of its answers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lljax.config import Config
from lljax.data.batch import Batch
from lljax.data.groups import ANSWERS
from lljax.models.spec import DecoderSpec
from lljax.objectives.answers import answer_sums, answer_tokens, field, one_pass
from lljax.objectives.objective import (
    ONE_OF_EACH,
    RATIO,
    REFERENCE,
    SUM,
    Loss,
    Metric,
    Objective,
    Pass,
    Passes,
    ratio,
    refuses_settings_of_sft,
)
from lljax.objectives.preference_losses import (
    PAIR_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    kto,
)

PAIR, JUDGED = 2, 3  # branches of a prompt: chosen, rejected, and the mismatched answer of KTO
REWARD_METRICS = (
    Metric("rewards/chosen", "Implicit reward of chosen answers", RATIO),
    Metric("rewards/rejected", "Implicit reward of rejected answers", RATIO),
    Metric("rewards/margins", "Reward margin of chosen over rejected answers", RATIO),
    Metric("logps/chosen", "Log-probability of chosen answers", RATIO),
    Metric("logps/rejected", "Log-probability of rejected answers", RATIO),
)


# ---------------------------------------------------------------- all preference objectives
def _scored(config: Config) -> tuple[str, ...]:
    return (REFERENCE,)


def _passes(config: Config) -> Passes:
    """One more forward pass, unless the reference's log-probabilities are kept with the tokens."""
    return (
        Passes(forward=2, backward=1)
        if config.objective.reference == "adapter_off"
        else (ONE_OF_EACH)
    )


def _refuses(config: Config, spec: DecoderSpec) -> str | None:
    return refuses_settings_of_sft(config)


def _refuses_reference(config: Config, spec: DecoderSpec) -> str | None:
    if config.objective.reference == "adapter_off" and config.train_type == "full":
        return (
            "objective.reference='adapter_off' and train_type='full', which has no adapter: use "
            "objective.reference='precomputed', or train_type='lora'"
        )
    return _refuses(config, spec)


def _log_probs(pass_: Pass, batch: Batch) -> Float[Array, "B T"]:
    return pass_.log_probs(batch, pass_.hidden(batch))


def _mean(values: Float[Array, " P"], valid: Bool[Array, " P"]) -> Float[Array, " 2"]:
    """The sum of valid values and their number, for RATIO."""
    return jnp.stack([jnp.sum(jnp.where(valid, values, 0)), jnp.sum(valid).astype(jnp.float32)])


def _evaluate(
    loss: Callable[[Pass, Batch], Loss], weight: Callable[[Batch], Array]
) -> Callable[[Pass, Batch], tuple[dict[str, Array], Array]]:
    """The evaluation that reports the loss and the metrics of a step."""

    def evaluate(pass_: Pass, batch: Batch) -> tuple[dict[str, Array], Array]:
        total, sums = loss(pass_, batch)
        return {"loss": total, **sums}, weight(batch)

    return evaluate


def _scores(means: dict[str, Any]) -> dict[str, float]:
    return {name: float(ratio(value) if np.ndim(value) else value) for name, value in means.items()}


# ---------------------------------------------------------------- pairs
@dataclasses.dataclass(frozen=True)
class Options:
    """sft_weight: of the chosen answers' cross-entropy (RPO, Pang et al. 2024, arXiv 2404.19733,
    eq. 1: the mean over the tokens of an answer, then over answers).
    """

    pairs: PairOptions
    sft_weight: float


def _options(config: Config) -> Options:
    o = config.objective
    return Options(PairOptions(o.beta, o.label_smoothing, o.simpo_gamma), o.sft_weight)


def _pairs_in(batch: Batch) -> Array:
    """The number of pairs: every segment is one."""
    return jnp.sum(jnp.max(batch["segments"], axis=-1))


def _pairs(
    log_probs: Float[Array, "B T"], reference: Float[Array, "B T"], batch: Batch
) -> tuple[Pairs, Bool[Array, " P"]]:
    """The pairs of a pass, most of them empty, and which are not. Empty ones have log-probabilities
    at which every loss is finite.
    """
    tokens = answer_tokens(batch, PAIR)
    valid = jnp.all(tokens > 0, axis=1)

    def filled(values: Array, empty: float) -> Array:
        return jnp.where(valid[:, None], values, empty)

    policy = filled(answer_sums(log_probs, batch, PAIR), -1.0)
    reference = filled(answer_sums(reference, batch, PAIR), -1.0)
    return Pairs(*policy.T, *reference.T, *filled(tokens, 1.0).T), valid


def _pair_loss(row: PairLoss) -> Callable[[Pass, Batch], Loss]:
    def loss(pass_: Pass, batch: Batch) -> Loss:
        options: Options = pass_.settings.options
        log_probs = _log_probs(pass_, batch)
        reference = field(batch, REFERENCE) if row.reference else jnp.zeros_like(log_probs)
        pairs, valid = _pairs(log_probs, reference, batch)
        if not row.reference:
            zero = jnp.zeros_like(pairs.chosen)
            pairs = dataclasses.replace(pairs, reference_chosen=zero, reference_rejected=zero)
        chosen, rejected = row.rewards(pairs, options.pairs)
        total = jnp.sum(jnp.where(valid, row.loss(pairs, options.pairs), 0))
        sums = {
            "rewards/chosen": _mean(chosen, valid),
            "rewards/rejected": _mean(rejected, valid),
            "rewards/margins": _mean(chosen - rejected, valid),
            "rewards/accuracies": _mean((chosen > rejected).astype(jnp.float32), valid),
            "logps/chosen": _mean(pairs.chosen, valid),
            "logps/rejected": _mean(pairs.rejected, valid),
        }
        if options.sft_weight:
            nll = -pairs.averaged[0]
            sums["nll_loss"] = _mean(nll, valid)
            total += options.sft_weight * jnp.sum(jnp.where(valid, nll, 0))
        return Loss(total, sums)

    return loss


def _pair_objective(name: str, row: PairLoss) -> Objective:
    loss = _pair_loss(row)
    reference = ("objective.reference",) if row.reference else ()
    return Objective(
        name=name,
        fields=ANSWERS,
        loss=loss,
        weight=_pairs_in,
        evaluate=_evaluate(loss, _pairs_in),
        metrics=(
            Metric("loss", "Loss"),
            *REWARD_METRICS,
            Metric("rewards/accuracies", "Share of pairs with the higher reward chosen", RATIO),
            Metric("nll_loss", "Cross-entropy of chosen answers", RATIO),
        ),
        counted=Metric("pairs", "Pairs of a step", SUM),
        headline="rewards/margins",
        scores=_scores,
        options=_options,
        refuses=_refuses_reference if row.reference else _refuses,
        passes=_passes if row.reference else lambda config: ONE_OF_EACH,
        kind="pairs",
        scored=_scored if row.reference else lambda config: (),
        reads=(
            "objective.beta",
            "objective.sft_weight",
            *(f"objective.{field}" for field in row.reads),
            *reference,
        ),
    )


PAIRS = tuple(_pair_objective(name, row) for name, row in PAIR_LOSSES.items())


# ---------------------------------------------------------------- single answers
@dataclasses.dataclass(frozen=True)
class KTOOptions:
    beta: float
    desirable_weight: float
    undesirable_weight: float


def _kto_options(config: Config) -> KTOOptions:
    o = config.objective
    return KTOOptions(o.beta, o.desirable_weight, o.undesirable_weight)


def _judged_in(batch: Batch) -> Array:
    """The number of judged answers."""
    tokens = answer_tokens(one_pass(batch), JUDGED)
    return jnp.sum(tokens[:, :PAIR] > 0)


def _kto_loss(pass_: Pass, batch: Batch) -> Loss:
    """Answers in branch 1 are desirable and in branch 2 not; branch 3 is an answer to another
    prompt. The KL divergence, which the ratios are compared with, is the mean log-ratio of the
    mismatched answers of a pass, as in TRL.
    """
    options: KTOOptions = pass_.settings.options
    log_probs = _log_probs(pass_, batch)
    policy = answer_sums(log_probs, batch, JUDGED)
    ratios = policy - answer_sums(field(batch, REFERENCE), batch, JUDGED)
    there = answer_tokens(batch, JUDGED) > 0
    mismatched, count = _mean(ratios[:, PAIR], there[:, PAIR])
    kl = jax.lax.stop_gradient(jnp.maximum(mismatched / jnp.maximum(count, 1), 0))
    good, bad = there[:, 0], there[:, 1]

    def losses(ratio: Array, desirable: bool) -> Array:
        return kto(
            ratio,
            jnp.full(ratio.shape, desirable),
            kl,
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
        )

    total = jnp.sum(jnp.where(good, losses(ratios[:, 0], True), 0)) + jnp.sum(
        jnp.where(bad, losses(ratios[:, 1], False), 0)
    )
    rewards = options.beta * ratios
    chosen, rejected = _mean(rewards[:, 0], good), _mean(rewards[:, 1], bad)
    sums = {
        "kl": jnp.stack([kl, jnp.float32(1)]),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": jnp.concatenate([chosen, rejected]),
        "logps/chosen": _mean(policy[:, 0], good),
        "logps/rejected": _mean(policy[:, 1], bad),
    }
    return Loss(total, sums)


JUDGED_ANSWERS = Metric("answers", "Judged answers of a step", SUM)
KTO = Objective(
    name="kto",
    fields=ANSWERS,
    loss=_kto_loss,
    weight=_judged_in,
    evaluate=_evaluate(_kto_loss, _judged_in),
    metrics=(
        Metric("loss", "Loss"),
        *REWARD_METRICS,
        Metric("kl", "KL divergence from the reference, of mismatched answers", RATIO),
    ),
    counted=JUDGED_ANSWERS,
    headline="rewards/margins",
    scores=_scores,
    options=_kto_options,
    refuses=_refuses_reference,
    passes=_passes,
    kind="judged",
    scored=_scored,
    reads=(
        "objective.beta",
        "objective.reference",
        "objective.desirable_weight",
        "objective.undesirable_weight",
    ),
)
