"""Ministral 8B: Mistral with full attention in some layers; transformers
`models/ministral/modeling_ministral.py`.
"""

import dataclasses

from lljax.models.families import mistral

FAMILY = dataclasses.replace(
    mistral.FAMILY,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    gguf=None,
)
