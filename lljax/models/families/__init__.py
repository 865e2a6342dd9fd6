"""The families of decoders: a row of the table `FAMILIES` each, in a file of its own."""

from lljax.models.families.from_config import spec_from_hf
from lljax.models.families.table import FAMILIES, family_of, is_tied, rope_fields, rope_to_hf

__all__ = [
    "FAMILIES",
    "family_of",
    "is_tied",
    "rope_fields",
    "rope_to_hf",
    "spec_from_hf",
]
