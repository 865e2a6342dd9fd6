"""Bases that are quantised on disk."""

from lljax.models.quantize import FORMS, Form


def form_of(quantise: str, hf_config: dict) -> Form | None:
    """The form of the kernels of a run whose `model.quantize` is `quantise`; None for dense ones."""
    return None if quantise == "none" else FORMS[quantise]
