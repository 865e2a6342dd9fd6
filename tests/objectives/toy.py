"""An objective from outside: one row with a field, metrics and an option of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from lljax.data.batch import IGNORED, NEXT_TOKEN, Batch, Field
from lljax.objectives.objective import MAX, Loss, Metric, Objective, Pass
from lljax.objectives.token_loss import log_probs_of


class WeightedBatch(Batch):
    """weights: float32 weight of the loss of every target."""

    weights: jax.Array


def weights_of(piece: dict[str, np.ndarray]) -> np.ndarray:
    targets = piece["targets"]
    return np.where(targets == IGNORED, 0.0, 1.0 + targets % 3).astype(np.float32)


def _log_probs(pass_: Pass, batch: WeightedBatch) -> jax.Array:
    return log_probs_of(
        pass_.model,
        pass_.hidden(batch),
        batch["targets"],
        chunk=pass_.settings.loss_chunk,
        layout=pass_.layout,
        key=pass_.key,
    )


def loss(pass_: Pass, batch: WeightedBatch) -> Loss:
    log_probs = _log_probs(pass_, batch)
    total = -jnp.sum(batch["weights"] * log_probs)
    return Loss(total, {"squared": jnp.sum(log_probs**2), "worst_token": jnp.max(-log_probs)})


def evaluate(pass_: Pass, batch: WeightedBatch):
    total = -jnp.sum(batch["weights"] * _log_probs(pass_, batch))
    return {"weighted_loss": total}, jnp.sum(batch["weights"])


WEIGHTED = Objective(
    name="weighted",
    fields=(*NEXT_TOKEN, Field("weights", np.float32, 0.0, weights_of)),
    loss=loss,
    weight=lambda batch: jnp.sum(batch["weights"]),
    evaluate=evaluate,
    metrics=(
        Metric("loss", "Weighted loss"),
        Metric("squared", "Squared log-probability of a token"),
        Metric("worst_token", "Loss of the worst token", MAX),
    ),
    options=lambda config: config.training.neftune_alpha,
    refuses=lambda config, spec: "experts have no weights" if spec.has_experts else None,
)


def dense_evaluation(pass_: Pass, batch: Batch):
    """Forms the logits of all tokens, twice sorted so that they must exist."""
    logits = jnp.sort(pass_.model.logits(pass_.hidden(batch)), axis=1)
    return {"loss": jnp.sum(jnp.sort(logits, axis=-1)[..., 0])}, jnp.sum(batch["targets"] >= 0)
