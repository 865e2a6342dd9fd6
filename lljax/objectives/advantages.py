"""Advantages of answers over the other answers to their prompt."""

import numpy as np
from jaxtyping import Float

EPSILON = 1e-4  # added to a standard deviation, as in TRL


def group_relative(rewards: Float[np.ndarray, "P A"], scale: str) -> Float[np.ndarray, "P A"]:
    """Rewards minus their mean over the answers to a prompt, float32 (GRPO: Shao et al. 2024, arXiv
    2402.03300, section 4.1.2). An answer without a reward (NaN) has the advantage 0 and does not
    count.

    scale: what they are divided by: the standard deviation of the prompt's answers ("group"), of
      all answers ("batch": Hu et al. 2025, arXiv 2501.03262), or 1 ("none": Dr. GRPO, Liu et al.
      2025, arXiv 2503.20783).
    """
    known = ~np.isnan(rewards)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    mean = np.where(known, rewards, 0).sum(1, keepdims=True) / count
    centered = np.where(known, rewards - mean, 0)
    if scale == "group":
        centered = centered / (deviations(rewards)[:, None] + EPSILON)
    elif scale == "batch":
        centered = centered / (deviations(rewards.reshape(1, -1))[0] + EPSILON)
    return centered.astype(np.float32)


def leave_one_out(rewards: Float[np.ndarray, "P A"]) -> Float[np.ndarray, "P A"]:
    """Rewards minus the mean of the prompt's other answers, float32 (RLOO: Ahmadian et al. 2024,
    arXiv 2402.14740, eq. 8). An answer without a reward (NaN) has the advantage 0 and does not
    count.
    """
    count = np.maximum((~np.isnan(rewards)).sum(1, keepdims=True), 1)
    return group_relative(rewards, "none") * np.float32(count / np.maximum(count - 1, 1))


def deviations(rewards: Float[np.ndarray, "P A"]) -> Float[np.ndarray, " P"]:
    """The standard deviation of each row over its values that are not NaN, with one degree of
    freedom less, as in torch; 0 for a single value.
    """
    known = ~np.isnan(rewards)
    count = known.sum(1)
    mean = np.where(known, rewards, 0).sum(1) / np.maximum(count, 1)
    squares = np.where(known, (rewards - mean[:, None]) ** 2, 0).sum(1)
    return np.sqrt(squares / np.maximum(count - 1, 1))
