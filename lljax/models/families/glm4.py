"""GLM-4-0414: GLM with norms around attention and MLP; transformers
`models/glm4/modeling_glm4.py`.
"""

from typing import Any

from lljax.models.families import glm
from lljax.models.families.family import Family, GgufFormat, Metadata
from lljax.models.spec import Norms


def _decoder(c: dict) -> dict[str, Any]:
    norms = Norms(after_mixer="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return glm.decoder(c) | {"norms": norms}


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    return {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in names}


FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    defaults=glm.DEFAULTS,
    decoder=_decoder,
    gguf=GgufFormat(
        architecture="glm4",
        names={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        partial=True,
        config=_gguf_config,
    ),
)
