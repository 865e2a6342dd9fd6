"""InternLM3: Llama with biases of its own names; transformers
`models/internlm3/modeling_internlm3.py`.
"""

from typing import Any

from lljax.models.families.family import Family
from lljax.models.values import FLAG


def _decoder(c: dict) -> dict[str, Any]:
    """The original code names the biases qkv_bias and bias, transformers attention_bias and
    mlp_bias.
    """
    return {
        "qkv_bias": c.get("qkv_bias", c["attention_bias"]),
        "output_bias": c.get("bias", c["mlp_bias"]),
        "mlp_bias": c.get("bias", c["mlp_bias"]),
    }


FAMILY = Family(
    model_type="internlm3",
    architecture="LlamaForCausalLM",
    defaults={
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    decoder=_decoder,
    checks={"qkv_bias": FLAG, "bias": FLAG, "mlp_bias": FLAG},
)
