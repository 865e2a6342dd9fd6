"""The table of families by model_type. To add one, see README.md beside this file."""

import importlib
import pkgutil

from lljax.errors import ModelError, short
from lljax.models import families, rope
from lljax.models.families.family import Family
from lljax.models.spec import DecoderSpec

READERS = ("table", "from_config")  # import the table, and are imported after it


def _rows() -> dict[str, Family]:
    """The FAMILY of every module beside this one that has one."""
    names = (found.name for found in pkgutil.iter_modules(families.__path__))
    modules = (
        importlib.import_module(f"{families.__name__}.{name}")
        for name in names
        if name not in READERS
    )
    rows = (module.FAMILY for module in modules if hasattr(module, "FAMILY"))
    return {family.model_type: family for family in rows}


FAMILIES = _rows()


def family_of(hf_config: dict) -> Family:
    """The family of a config.json.

    Raises:
      ModelError: it is none of FAMILIES.
    """
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"config.json: model_type {short(family)} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[family]


def is_tied(hf_config: dict) -> bool:
    """Whether config.json, of whatever family, ties the head to the embedding."""
    family = FAMILIES.get(str(hf_config.get("model_type")))
    default = family.defaults.get("tie_word_embeddings", False) if family else False
    return bool(hf_config.get("tie_word_embeddings", default))


def rope_to_hf(spec: DecoderSpec) -> dict:
    """The config.json entries of a decoder's RoPE, see lljax.models.rope.to_hf."""
    family = FAMILIES[spec.family]
    entries = rope.to_hf(spec.rope, spec.max_length)
    if "partial_rotary_factor" in family.defaults:  # transformers assumes it if it is absent
        share = {"partial_rotary_factor": spec.rope.partial}
        entries |= share
        for name in entries.keys() & {"rope_parameters", "rope_scaling"}:
            entries[name] = entries[name] | share
    return family.rope_to_hf(spec, entries)


def rope_fields(family: Family) -> set[str]:
    """The names of the entries that `rope_to_hf` may write."""
    return {*rope.TOP_CHECKS, *family.rope_fields}
