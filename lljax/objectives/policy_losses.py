"""Policy-gradient losses of sampled answers: functions of log-probabilities and advantages.

Definitions follow TRL 1.16 (`trainer/grpo_trainer.py`, `trainer/rloo_trainer.py`), which users
quote.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """clip_low, clip_high: a ratio counts between 1 - clip_low and 1 + clip_high; for CISPO up to
    `clip_high` itself. delta: the largest ratio of a negative advantage; None for no limit.
    beta: weight of the KL divergence from the reference; 0 needs no reference.
    longest: tokens of an answer at most, by which Dr. GRPO divides.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    longest: int = 256


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens of A sampled answers, in any order.

    policy, old, reference: log-probability of each token under the policy, under the policy that
    sampled it, and under the reference (None if beta is 0). advantage: of the token's answer.
    answer: its number, below `answers`. trained: False for tokens of prompts and padding, and of
    answers that are masked out.
    """

    policy: Float[Array, " T"]
    old: Float[Array, " T"]
    reference: Float[Array, " T"] | None
    advantage: Float[Array, " T"]
    answer: Int[Array, " T"]
    trained: Bool[Array, " T"]
    answers: int

    def sums(self, values: Float[Array, " T"]) -> Float[Array, " A"]:
        """Sums of the trained tokens of each answer."""
        values = jnp.where(self.trained, values, 0)
        return jax.ops.segment_sum(values, self.answer, self.answers)

    @property
    def lengths(self) -> Float[Array, " A"]:
        """Trained tokens of each answer, at least 1."""
        return jnp.maximum(self.sums(jnp.ones(self.policy.shape, jnp.float32)), 1)


# ---------------------------------------------------------------- the ratio of a token
def _of_token(sampled: Sampled) -> Float[Array, " T"]:
    return sampled.policy - sampled.old


def _of_answer(sampled: Sampled) -> Float[Array, " T"]:
    """The mean over the answer (GSPO: Zheng et al. 2025, arXiv 2507.18071, eq. 7)."""
    return (sampled.sums(_of_token(sampled)) / sampled.lengths)[sampled.answer]


def _of_whole_answer(sampled: Sampled) -> Float[Array, " T"]:
    """The sum over the answer as one action (RLOO: Ahmadian et al. 2024, arXiv 2402.14740)."""
    return sampled.sums(_of_token(sampled))[sampled.answer]


# ---------------------------------------------------------------- the loss of a token
def _clipped(
    sampled: Sampled, ratio: Float[Array, " T"], options: PolicyOptions
) -> Float[Array, " T"]:
    """PPO's clipped surrogate: Schulman et al. 2017, arXiv 1707.06347, eq. 7. A higher upper limit:
    DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 10; two-sided by `delta`: arXiv 2505.07291.
    """
    limited = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    if options.delta is not None:
        ratio = jnp.minimum(ratio, options.delta)
    return -jnp.minimum(ratio * sampled.advantage, limited * sampled.advantage)


def _weighted(
    sampled: Sampled, ratio: Float[Array, " T"], options: PolicyOptions
) -> Float[Array, " T"]:
    """CISPO: MiniMax 2025, arXiv 2506.13585, eq. 4: the clipped ratio is a constant weight, so that
    every token keeps its gradient.
    """
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, options.clip_high))
    return -weight * sampled.advantage * sampled.policy


def kl_by_token(sampled: Sampled, ratio: Float[Array, " T"]) -> Float[Array, " T"]:
    """The estimator k3 of KL(policy | reference) (Schulman 2020, "Approximating KL divergence"),
    times the importance ratio: tokens come from the old policy.
    """
    assert sampled.reference is not None, "a KL divergence needs a reference"
    away = sampled.reference - sampled.policy
    return (jnp.exp(away) - away - 1) * ratio


# ---------------------------------------------------------------- the loss of a batch
def _by_answer(sampled: Sampled, options: PolicyOptions) -> Float[Array, " T"]:
    """Every answer counts alike."""
    return 1 / sampled.lengths[sampled.answer]


def _by_token(sampled: Sampled, options: PolicyOptions) -> Float[Array, " T"]:
    """Every token counts alike."""
    return jnp.ones_like(sampled.policy)


def _by_limit(sampled: Sampled, options: PolicyOptions) -> Float[Array, " T"]:
    """Every token counts alike, and divided by a constant: no bias to long or short answers."""
    return jnp.full_like(sampled.policy, 1 / options.longest)


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """log_ratio: of each token, policy to old policy. token_loss: (sampled, ratio, options).
    token_weight: of each token in the sum. answers: whether the sum is divided by the number of
    answers; otherwise by the number of trained tokens.
    """

    log_ratio: Callable[[Sampled], Float[Array, " T"]]
    token_loss: Callable[[Sampled, Float[Array, " T"], PolicyOptions], Float[Array, " T"]]
    token_weight: Callable[[Sampled, PolicyOptions], Float[Array, " T"]]
    answers: bool

    def total(
        self,
        sampled: Sampled,
        options: PolicyOptions,
        counted: Bool[Array, " T"] | None = None,
    ) -> Float[Array, ""]:
        """The summed loss; see `answers` for the weight to divide by.

        counted: trained tokens that have a loss; None for all. It changes no weight and no ratio.
        """
        ratio = jnp.exp(self.log_ratio(sampled))
        loss = self.token_loss(sampled, ratio, options)
        if options.beta:
            loss += options.beta * kl_by_token(sampled, ratio)
        weighted = loss * self.token_weight(sampled, options)
        counted = sampled.trained if counted is None else counted
        return jnp.sum(jnp.where(counted, weighted, 0))


# GRPO: Shao et al. 2024, arXiv 2402.03300, eq. 3. Dr. GRPO: Liu et al. 2025, arXiv 2503.20783.
POLICY_LOSSES = {
    "grpo": PolicyLoss(_of_token, _clipped, _by_answer, answers=True),
    "dr_grpo": PolicyLoss(_of_token, _clipped, _by_limit, answers=True),
    "bnpo": PolicyLoss(_of_token, _clipped, _by_token, answers=False),
    "dapo": PolicyLoss(_of_token, _clipped, _by_token, answers=False),
    "cispo": PolicyLoss(_of_token, _weighted, _by_token, answers=False),
    "gspo": PolicyLoss(_of_answer, _clipped, _by_answer, answers=True),
    "rloo": PolicyLoss(_of_whole_answer, _clipped, _by_answer, answers=True),
}
