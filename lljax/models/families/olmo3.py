"""OLMo 3: OLMo 2 with windows in three of four layers, and a RoPE of its own in the others;
transformers `models/olmo3/modeling_olmo3.py`.
"""

from typing import Any

from lljax.errors import ModelError
from lljax.models import rope
from lljax.models.families import olmo2
from lljax.models.families.family import Family, local_layers, sliding_window
from lljax.models.spec import DecoderSpec, LayerSpec

THETA = 500_000.0


def _decoder(c: dict) -> dict[str, Any]:
    slides, window = local_layers(c, lambda i: (i + 1) % 4), sliding_window(c)
    return olmo2.decoder(c) | {
        "layers": tuple(
            LayerSpec(window=window, rope=1) if local else LayerSpec() for local in slides
        ),
    }


def _ropes(c: dict) -> tuple[dict, ...]:
    """config.json with the RoPE of the global layers alone, and with the RoPE of the local layers.
    `rope_theta` and `rope_scaling` beside them are of the global layers.

    Raises:
      ModelError: rope_parameters is not an object for each type of layer.
    """
    given = {kind: of or {} for kind, of in (c.get("rope_parameters") or {}).items()}
    if not all(isinstance(of, dict) for of in given.values()):
        raise ModelError(
            "config.json: rope_parameters of an olmo3 model has an object for each of "
            "full_attention, sliding_attention"
        )
    main = {
        "rope_theta": c["rope_theta"],
        **given.get("full_attention", {}),
        **(c.get("rope_scaling") or {}),
    }
    local = {"rope_theta": THETA, **given.get("sliding_attention", {})}
    # transformers looks for `truncate` outside of these objects, where it never is.
    return tuple(
        c | {"rope_parameters": parameters | {"truncate": True}, "rope_scaling": None}
        for parameters in (main, local)
    )


def _rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    local = rope.to_hf(spec.more_ropes[0], spec.max_length)["rope_parameters"]
    return entries | {
        "rope_parameters": {
            "full_attention": entries["rope_parameters"],
            "sliding_attention": local,
        },
    }


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults=olmo2.DEFAULTS | {"sliding_window": 4096, "rope_theta": THETA},
    decoder=_decoder,
    ropes=_ropes,
    rope_to_hf=_rope_to_hf,
)
