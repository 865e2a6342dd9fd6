"""IQuest-Coder: Llama under another name; transformers
`models/iquestcoder/configuration_iquestcoder.py`.

Its GGUF files call themselves llama, and are read as such.
"""

import dataclasses

from lljax.models.families import llama
from lljax.models.values import Value

NOT_SUPPORTED = Value(lambda x: not x, "off, since transformers does not support it")

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="iquestcoder",
    gguf=llama.GGUF_WRITTEN,
    defaults={
        **llama.FAMILY.defaults,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
    },
    checks={
        **llama.FAMILY.checks,
        "clip_qkv": NOT_SUPPORTED,
        "use_sliding_window": NOT_SUPPORTED,
    },
)
