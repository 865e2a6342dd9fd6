"""Supervised fine-tuning: the cross-entropy of the next token, and the balance of experts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lljax.config import Config
from lljax.data.batch import IGNORED, NEXT_TOKEN, Batch
from lljax.models.spec import DecoderSpec
from lljax.objectives.balance import expert_load_max, load_balancing_loss
from lljax.objectives.objective import MEAN, Loss, Metric, Objective, Pass, Reduction
from lljax.objectives.token_loss import loss_of


@dataclasses.dataclass(frozen=True)
class Options:
    """router_aux_loss_coef: weight of the load-balancing loss of experts."""

    router_aux_loss_coef: float


def read_options(config: Config) -> Options:
    return Options(config.training.router_aux_loss_coef)


def predicted_tokens(batch: Batch) -> Array:
    return jnp.sum(batch["targets"] != IGNORED)


def loss(pass_: Pass, batch: Batch) -> Loss:
    """The summed cross-entropy. Of a model with experts, plus `router_aux_loss_coef` times the
    load-balancing loss over the tokens of the pass that are not padding, times its predicted
    tokens; that part is a metric of its own and not in the metric `loss`.
    """
    model, settings = pass_.model, pass_.settings

    def summed(hidden: Array) -> Array:
        return loss_of(
            model,
            hidden,
            batch["targets"],
            chunk=settings.loss_chunk,
            layout=pass_.layout,
            key=pass_.key,
        )

    if not model.spec.has_experts:
        return Loss(summed(pass_.hidden(batch)), {})
    counted = batch["segments"] != 0
    hidden, load = pass_.hidden_and_load(batch, counted)
    total = summed(hidden)
    balance = load_balancing_loss(load, jnp.sum(counted)) * predicted_tokens(batch)
    sums = {"loss": total, "load_balancing_loss": balance, "expert_load_max": load}
    coefficient = settings.options.router_aux_loss_coef
    return Loss(total + coefficient * balance if coefficient else total, sums)


def evaluate(pass_: Pass, batch: Batch) -> tuple[dict[str, Array], Array]:
    total = loss_of(
        pass_.model,
        pass_.hidden(batch),
        batch["targets"],
        chunk=pass_.settings.loss_chunk,
        layout=pass_.layout,
    )
    return {"loss": total}, predicted_tokens(batch)


def scores(means: dict[str, float]) -> dict[str, float]:
    return {"loss": means["loss"], "perplexity": float(np.exp(means["loss"]))}


def refuses(config: Config, spec: DecoderSpec) -> str | None:
    coefficient = config.training.router_aux_loss_coef
    if coefficient and not spec.has_experts:
        return (
            f"training.router_aux_loss_coef={coefficient} balances experts, and model.path="
            f"{config.model.path!r} has none: set it to 0"
        )
    return None


SFT = Objective(
    name="sft",
    fields=NEXT_TOKEN,
    loss=loss,
    weight=predicted_tokens,
    evaluate=evaluate,
    metrics=(
        Metric("loss", "Loss"),
        Metric("load_balancing_loss", "Load-balancing loss of the experts", MEAN),
        Metric(
            "expert_load_max",
            "Tokens of the busiest expert, in even shares",
            Reduction(lambda loads: loads.sum(0), lambda load, _: expert_load_max(load)),
        ),
    ),
    scores=scores,
    options=read_options,
    refuses=refuses,
)
