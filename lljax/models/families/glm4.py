"""GLM-4-0414: GLM with norms around attention and MLP; transformers
`models/glm4/modeling_glm4.py`.
"""

from typing import Any

from lljax.models.families import glm
from lljax.models.families.family import Family
from lljax.models.spec import Norms


def _decoder(c: dict) -> dict[str, Any]:
    norms = Norms(after_mixer="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return glm.decoder(c) | {"norms": norms}


FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    defaults=glm.DEFAULTS,
    decoder=_decoder,
)
