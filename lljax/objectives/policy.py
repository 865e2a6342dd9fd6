"""Policy-gradient objectives: the model writes several answers to each prompt, and learns from
their rewards (GRPO and its kin). The prompt is read once for all of its answers.

A batch holds the answers of one rollout (lljax.run.rollouts), their advantages and, if they train
more than one step, the log-probabilities under the policy that wrote them.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lljax.config import Config
from lljax.data.batch import IGNORED, Batch, Field
from lljax.data.groups import ANSWERS
from lljax.models.spec import DecoderSpec
from lljax.objectives.advantages import group_relative, leave_one_out
from lljax.objectives.answers import answer_numbers, field, one_pass
from lljax.objectives.objective import (
    OLD,
    RATIO,
    REFERENCE,
    SUM,
    TOKENS,
    Loss,
    Metric,
    Objective,
    Pass,
    Passes,
    refuses_settings_of_sft,
)
from lljax.objectives.policy_losses import (
    POLICY_LOSSES,
    PolicyLoss,
    PolicyOptions,
    Sampled,
    kl_by_token,
)

ADVANTAGES = "advantages"
# Branch numbers tell answers without a target (truncated ones, if they are masked) from padding.
FIELDS = (*ANSWERS, Field(ADVANTAGES, np.float32))


@dataclasses.dataclass(frozen=True)
class Options:
    """answers: of a prompt at most. top_entropy: share of the tokens of a pass that train, the ones
    of highest entropy; 1 for all.
    """

    loss: PolicyOptions
    answers: int
    top_entropy: float


def _options(config: Config) -> Options:
    o, rollout = config.objective, config.rollout
    loss = PolicyOptions(
        clip_low=o.clip_low,
        clip_high=o.clip_high,
        delta=o.delta or None,
        beta=o.kl_beta,
        longest=rollout.tokens,
    )
    return Options(loss, rollout.answers, o.top_entropy)


def _scored(config: Config) -> tuple[str, ...]:
    """The fields of a batch that forward passes fill before the step."""
    reference = (REFERENCE,) if config.objective.kl_beta else ()
    return (*reference, *((OLD,) if config.rollout.updates > 1 else ()))


def _passes(config: Config) -> Passes:
    return Passes(forward=1 + len(_scored(config)), backward=1)


def _refuses(config: Config, spec: DecoderSpec) -> str | None:
    if config.objective.kl_beta and config.train_type == "full":
        return (
            f"objective.kl_beta={config.objective.kl_beta} and train_type='full': the reference "
            "would be a second copy of the weights: use train_type='lora', or 0"
        )
    return refuses_settings_of_sft(config)


def _trained_tokens(batch: Batch) -> Array:
    return jnp.sum(batch["targets"] != IGNORED)


def _answers_in(batch: Batch) -> Array:
    """The number of answers, masked ones included: branches of a prompt are numbered from 1."""
    flat = one_pass(batch)
    B, T = flat["tokens"].shape
    groups = jnp.arange(B)[:, None] * T + jnp.maximum(flat["segments"] - 1, 0)
    branches = field(flat, "branches")
    largest = jax.ops.segment_max(branches.ravel(), groups.ravel(), B * T)
    return jnp.sum(jnp.maximum(largest, 0))


# ---------------------------------------------------------------- the loss
def _mean(values: Float[Array, "B T"], trained: Bool[Array, "B T"]) -> Float[Array, " 2"]:
    """The sum over trained tokens and their number, for RATIO."""
    return jnp.stack([jnp.sum(jnp.where(trained, values, 0)), jnp.sum(trained).astype(jnp.float32)])


def _highest(
    entropies: Float[Array, "B T"], trained: Bool[Array, "B T"], share: float
) -> Bool[Array, "B T"]:
    """The trained tokens whose entropy is in the highest `share` of the pass (Wang et al. 2025,
    arXiv 2506.01939).
    """
    limit = jnp.nanquantile(jnp.where(trained, entropies, jnp.nan), 1 - share)
    return trained & (entropies >= limit)


def _clipped_shares(
    ratio: Array, batch: Batch, trained: Array, options: PolicyOptions
) -> dict[str, Array]:
    """Shares of tokens whose ratio is clipped, as TRL names them."""
    advantages = field(batch, ADVANTAGES)
    low = (ratio < 1 - options.clip_low) & (advantages < 0)
    high = (ratio > 1 + options.clip_high) & (advantages > 0)
    return {
        "clip_ratio/low_mean": _mean(low, trained),
        "clip_ratio/high_mean": _mean(high, trained),
        "clip_ratio/region_mean": _mean(low | high, trained),
    }


def _loss(row: PolicyLoss):
    def loss(pass_: Pass, batch: Batch) -> Loss:
        options: Options = pass_.settings.options
        fields = cast(dict[str, Array], batch)
        hidden = pass_.hidden(batch)
        policy = pass_.log_probs(batch, hidden)
        trained = batch["targets"] != IGNORED
        entropies = pass_.entropies(batch, hidden)
        sampled = Sampled(
            policy=policy.ravel(),
            old=fields.get(OLD, jax.lax.stop_gradient(policy)).ravel(),
            reference=fields[REFERENCE].ravel() if REFERENCE in fields else None,
            advantage=fields[ADVANTAGES].ravel(),
            answer=answer_numbers(batch, options.answers).ravel(),
            trained=trained.ravel(),
            answers=trained.size * options.answers,
        )
        counted = None
        if options.top_entropy < 1:
            counted = _highest(entropies, trained, options.top_entropy).ravel()
        ratio = jax.lax.stop_gradient(jnp.exp(row.log_ratio(sampled)))
        sums = {"entropy": _mean(entropies, trained)}
        sums |= _clipped_shares(ratio.reshape(trained.shape), batch, trained, options.loss)
        if options.loss.beta:
            kl = jax.lax.stop_gradient(kl_by_token(sampled, ratio))
            sums["kl"] = _mean(kl.reshape(trained.shape), trained)
        return Loss(row.total(sampled, options.loss, counted), sums)

    return loss


# In TRL, RLOO subtracts the KL divergence from the reward, and clips without delta.
RLOO_READS = (
    *("objective.clip_low", "objective.clip_high", "objective.top_entropy"),
    *("objective.mask_truncated", "rollout.*", "reward.*"),
)
ANSWERED = Metric("answers", "Answers of a step", SUM)
READS = (*RLOO_READS, "objective.delta", "objective.kl_beta", "objective.scale_rewards")


def _group_relative(rewards: np.ndarray, config: Config) -> np.ndarray:
    return group_relative(rewards, config.objective.scale_rewards)


def _leave_one_out(rewards: np.ndarray, config: Config) -> np.ndarray:
    return leave_one_out(rewards)


def _objective(name: str, row: PolicyLoss) -> Objective:
    alone = name == "rloo"
    return Objective(
        name=name,
        fields=FIELDS,
        loss=_loss(row),
        weight=_answers_in if row.answers else _trained_tokens,
        evaluate=None,
        metrics=(
            Metric("loss", "Loss"),
            Metric("entropy", "Entropy of a token, nats", RATIO),
            Metric("kl", "KL divergence from the reference", RATIO),
            Metric("clip_ratio/low_mean", "Tokens clipped from below", RATIO),
            Metric("clip_ratio/high_mean", "Tokens clipped from above", RATIO),
            Metric("clip_ratio/region_mean", "Tokens clipped", RATIO),
        ),
        counted=ANSWERED if row.answers else TOKENS,
        headline="reward",
        options=_options,
        refuses=_refuses,
        passes=_passes,
        kind="prompts",
        scored=_scored,
        advantages=_leave_one_out if alone else _group_relative,
        reads=RLOO_READS if alone else READS,
    )


POLICIES = tuple(_objective(name, row) for name, row in POLICY_LOSSES.items())
