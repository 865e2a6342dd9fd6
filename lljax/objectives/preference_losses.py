"""Losses of a chosen and a rejected answer to one prompt, and of single answers that are good or
bad: functions of log-probabilities.

Definitions follow TRL 1.16 (`trainer/dpo_trainer.py`, `trainer/kto_trainer.py`,
`experimental/cpo/cpo_trainer.py`, `experimental/orpo/orpo_trainer.py`), which users quote.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """beta: how strongly the policy is held to the reference, or the temperature of losses without
    one. label_smoothing: the probability that a pair is labeled the wrong way round.
    simpo_gamma: the margin of SimPO, before it is divided by beta.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5


@dataclasses.dataclass(frozen=True)
class Pairs:
    """P pairs of answers. chosen, rejected: log-probabilities under the policy, summed over the
    tokens of an answer. reference_chosen, reference_rejected: under the reference model; zeros for
    a loss without one. chosen_tokens, rejected_tokens: tokens of the answers, float32.
    """

    chosen: Float[Array, " P"]
    rejected: Float[Array, " P"]
    reference_chosen: Float[Array, " P"]
    reference_rejected: Float[Array, " P"]
    chosen_tokens: Float[Array, " P"]
    rejected_tokens: Float[Array, " P"]

    @property
    def ratios(self) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """log(policy / reference) of the chosen and of the rejected answers."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def margin(self) -> Float[Array, " P"]:
        """log(policy / reference) of the chosen answer minus that of the rejected."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def margin_by_token(self) -> Float[Array, " P"]:
        """`margin` with each answer's ratio divided by its tokens."""
        chosen, rejected = self.ratios
        return chosen / jnp.maximum(self.chosen_tokens, 1) - rejected / jnp.maximum(
            self.rejected_tokens, 1
        )

    @property
    def averaged(self) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """Mean log-probabilities of a token of the chosen and of the rejected answers."""
        return (
            self.chosen / jnp.maximum(self.chosen_tokens, 1),
            self.rejected / jnp.maximum(self.rejected_tokens, 1),
        )


def _logistic(x: Float[Array, " P"], label_smoothing: float) -> Float[Array, " P"]:
    """-log sigmoid(x), of labels that are wrong with a probability."""
    keep = 1 - label_smoothing
    return -keep * jax.nn.log_sigmoid(x) - label_smoothing * jax.nn.log_sigmoid(-x)


def sigmoid(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """DPO: Rafailov et al. 2023, arXiv 2305.18290, eq. 7. With label smoothing conservative DPO:
    Mitchell 2023, "A note on DPO with noisy preferences", eq. 3.
    """
    return _logistic(options.beta * pairs.margin, options.label_smoothing)


def sigmoid_by_token(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """DPO with the ratio of an answer divided by its tokens (TRL's "sigmoid_norm")."""
    return _logistic(options.beta * pairs.margin_by_token, options.label_smoothing)


def ipo(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """IPO: Azar et al. 2023, arXiv 2310.12036, eq. 17, divided by tokens as in TRL."""
    return jnp.square(pairs.margin_by_token - 1 / (2 * options.beta))


def hinge(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """SLiC: Zhao et al. 2023, arXiv 2305.10425, with the margin of DPO (Liu et al. 2023, RSO,
    arXiv 2309.06657).
    """
    return jax.nn.relu(1 - options.beta * pairs.margin)


def robust(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """Robust DPO, unbiased under labels that are wrong with probability `label_smoothing`: Ray
    Chowdhury et al. 2024, arXiv 2403.00409.
    """
    flipped, margin = options.label_smoothing, options.beta * pairs.margin
    kept = -(1 - flipped) * jax.nn.log_sigmoid(margin) + flipped * jax.nn.log_sigmoid(-margin)
    return kept / (1 - 2 * flipped)


def apo_zero(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """APO-zero, for answers better than the model's: D'Oosterlinck et al. 2024, arXiv 2408.06266,
    eq. 7.
    """
    chosen, rejected = pairs.ratios
    return jax.nn.sigmoid(-options.beta * chosen) + jax.nn.sigmoid(options.beta * rejected)


def sppo_hard(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """SPPO with hard labels: Wu et al. 2024, arXiv 2405.00675, eq. 4.7."""
    chosen, rejected = pairs.ratios
    half = 0.5 / options.beta
    return jnp.square(chosen - half) + jnp.square(rejected + half)


def nca_pair(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """NCA of pairs: Chen et al. 2024, arXiv 2402.05369."""
    chosen, rejected = (options.beta * ratio for ratio in pairs.ratios)
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """BCO of pairs, without the shift of rewards: Jung et al. 2024, arXiv 2404.04656."""
    chosen, rejected = pairs.ratios
    return -jax.nn.log_sigmoid(options.beta * chosen) - jax.nn.log_sigmoid(-options.beta * rejected)


def orpo(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """The odds ratio of ORPO, without its cross-entropy: Hong et al. 2024, arXiv 2403.07691, eqs. 4
    and 7, of mean log-probabilities.
    """
    chosen, rejected = pairs.averaged
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -options.beta * jax.nn.log_sigmoid(log_odds)


def simpo(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """SimPO: Meng et al. 2024, arXiv 2405.14734, eq. 6."""
    chosen, rejected = pairs.averaged
    return _logistic(
        options.beta * (chosen - rejected) - options.simpo_gamma, options.label_smoothing
    )


def cpo(pairs: Pairs, options: PairOptions) -> Float[Array, " P"]:
    """CPO, without its cross-entropy: Xu et al. 2024, arXiv 2401.08417, eq. 3."""
    return _logistic(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """reads: the options that it reads beside beta, by their config fields. reference: whether it
    compares with a reference model. averaged: whether rewards are mean log-probabilities of an
    answer's tokens, in place of their sum.
    """

    loss: Callable[[Pairs, PairOptions], Float[Array, " P"]]
    reads: tuple[str, ...] = ()
    reference: bool = True
    averaged: bool = False

    def rewards(
        self, pairs: Pairs, options: PairOptions
    ) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """The implicit rewards of the chosen and of the rejected answers."""
        chosen, rejected = pairs.averaged if self.averaged else pairs.ratios
        return options.beta * chosen, options.beta * rejected


_SMOOTHED = ("label_smoothing",)
PAIR_LOSSES = {
    "dpo": PairLoss(sigmoid, _SMOOTHED),
    "dpo_norm": PairLoss(sigmoid_by_token, _SMOOTHED),
    "ipo": PairLoss(ipo),
    "hinge": PairLoss(hinge),
    "robust": PairLoss(robust, _SMOOTHED),
    "apo_zero": PairLoss(apo_zero),
    "sppo_hard": PairLoss(sppo_hard),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair),
    "orpo": PairLoss(orpo, reference=False, averaged=True),
    "simpo": PairLoss(simpo, (*_SMOOTHED, "simpo_gamma"), reference=False, averaged=True),
    "cpo": PairLoss(cpo, _SMOOTHED, reference=False),
}


def kto(
    ratios: Float[Array, " P"],
    desirable: Bool[Array, " P"],
    kl: Float[Array, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, " P"]:
    """KTO of single answers: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7.

    ratios: log(policy / reference) of each answer. kl: the reference point, at least 0 and constant
    to the gradient.
    """
    kl = jax.lax.stop_gradient(jnp.maximum(kl, 0))
    away = jnp.where(desirable, ratios - kl, kl - ratios)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-beta * away)


def _log1mexp(x: Float[Array, " P"]) -> Float[Array, " P"]:
    """log(1 - exp(x)) of x <= 0, exact near 0 and far from it (Maechler 2012); -inf at 0."""
    near = x > -0.6931472  # log 2
    inside = jnp.where(near, x, -1.0)
    outside = jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(inside)), jnp.log1p(-jnp.exp(outside)))
