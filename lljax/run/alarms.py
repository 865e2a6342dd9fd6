"""Bad steps, with an unusable loss or gradient: their description, and whether `config.alarm` stops
the run.
"""

import math

# the values of the bad step that a record of a rollback keeps
SPIKE = ("loss", "loss_z", "grad_norm", "z")


def trouble(metrics: dict) -> str:
    """A description of a bad step; an empty text for a good one."""
    if metrics["nonfinite"]:
        numbers_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        subject = "update" if numbers_finite else "gradient"
        return f"the {subject} is not finite; skipped ({metrics['bad']} in a row)"
    if metrics["spike"]:
        outcome = f"skipped ({metrics['bad']} in a row)" if metrics["skipped"] else "applied"
        z, title, name = max(
            (metrics["loss_z"], "loss", "loss"), (metrics["z"], "gradient norm", "grad_norm")
        )
        return f"{title} {metrics[name]:.3g} is {z:.1f} deviations above its median; {outcome}"
    return ""


def stops(metrics: dict, alarm) -> bool:
    """Whether the run must stop after this step. alarm: `config.alarm`."""
    return bool(
        (metrics["nonfinite"] and alarm.nonfinite == "stop")
        or (metrics["spike"] and alarm.spike == "stop")
        or metrics["bad"] >= alarm.max_bad_steps
    )
