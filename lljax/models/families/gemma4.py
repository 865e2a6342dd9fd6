"""Gemma 4, the text models of 12B, 31B and 26B-A4B: five of six layers slide, and the others have
wider heads, fewer of keys and values, and a RoPE of their own, of a quarter of a head; transformers
`models/gemma4/modeling_gemma4.py`.

PEFT does not load adapters of its experts.
"""

from typing import Any

from lljax.errors import ModelError, short
from lljax.models import rope
from lljax.models.families import gemma_layers
from lljax.models.families.family import (
    INSIDE,
    Family,
    GgufFormat,
    Metadata,
    MultimodalModel,
    first_set,
    local_layers,
    sliding_window,
)
from lljax.models.spec import BesideNorms, DecoderSpec, HeadSpec, LayerSpec, MoESpec, Norms, QKNorm
from lljax.models.values import (
    FLAG,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    check,
    dict_of,
    list_of,
    one_of,
    optional,
    whole,
)

PERIOD = 6  # every so many layers one is global
GLOBAL_ROPE = {
    "rope_type": "proportional",
    "partial_rotary_factor": 0.25,
    "rope_theta": 1_000_000.0,
}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
ROPE_KINDS = ("default", "proportional")  # with which the rotated halves of a head have its size
# Of E2B and E4B.
REFUSED = {
    "hidden_size_per_layer_input": "embeddings per layer",
    "num_kv_shared_layers": "layers that share keys and values",
    "use_double_wide_mlp": "a wider MLP in these layers",
}
UNIFIED = {  # defaults of the config class of 12B
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
}
HEADS = {"head_dim": whole(1), "num_key_value_heads": whole(1)}  # fields that layers may override


def _decoder(c: dict) -> dict[str, Any]:
    _check_size(c)
    slides = local_layers(c, lambda i: (i + 1) % PERIOD)
    slides[-1] = False  # in transformers, whatever the file says
    local = LayerSpec(window=sliding_window(c), rope=1, moe=c["enable_moe_block"])
    globally = LayerSpec(heads=_global_heads(c, slides), moe=c["enable_moe_block"])
    return {
        "layers": tuple(local if slide else globally for slide in slides),
        "activation": "gelu_tanh",
        "norms": _norms(c),
        "qk_norm": QKNorm(),
        "v_unit": True,
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "embed_scale": c["hidden_size"] ** 0.5,
        "layer_scale": "layer_scalar",
        "attention_scale": 1.0,
        "logit_softcap": c["final_logit_softcapping"],
        "moe": _experts(c) if c["enable_moe_block"] else None,
    }


def _check_size(c: dict) -> None:
    """Raises ModelError for E2B and E4B."""
    for name, meaning in REFUSED.items():
        if c[name]:
            raise ModelError(
                f"config.json: {name}={short(c[name])} ({meaning}) is not supported; of Gemma 4, "
                "the models without them are, such as 12B, 31B and 26B-A4B"
            )


def _norms(c: dict) -> Norms:
    if not c["enable_moe_block"]:
        return gemma_layers.NORMS
    return Norms(  # what is before the MLP is in MoESpec
        after_mixer="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    )


def _global_heads(c: dict, slides: list[bool]) -> HeadSpec:
    """The heads of global layers, from `per_layer_config`, as transformers saves them; or else from
    `global_head_dim` and `num_global_key_value_heads`.

    Raises:
      ModelError: `per_layer_config` gives global layers different heads, or anything to others.
    """
    own = c.get("per_layer_config")
    if own is None:
        own = {"head_dim": c["global_head_dim"]}
        if c["attention_k_eq_v"] and c.get("num_global_key_value_heads"):
            own["num_key_value_heads"] = c["num_global_key_value_heads"]
    else:
        own = {int(i) if i.isdecimal() else i: of for i, of in own.items()}  # "05"
        numbers = [i for i, slide in enumerate(slides) if not slide]
        of_layers = [own.get(i, {}) for i in numbers] or [{}]
        same = all(of == of_layers[0] for of in of_layers)
        if not same or own.keys() - set(numbers) or of_layers[0].keys() - HEADS:
            raise ModelError(
                "config.json: per_layer_config has to give the global layers, and no others, the "
                f"same {' and '.join(HEADS)}; no other override is supported"
            )
        own = of_layers[0]
    heads = {name: c[name] for name in HEADS} | own
    check(heads, HEADS)
    return HeadSpec(
        K=heads["num_key_value_heads"],
        H=heads["head_dim"],
        keys_are_values=c["attention_k_eq_v"],
    )


def _experts(c: dict) -> MoESpec:
    return MoESpec(
        E=first_set(c, "num_experts"),
        k=first_set(c, "top_k_experts"),
        F=first_set(c, "moe_intermediate_size"),
        normalize=True,
        fused="rows",
        block="",
        router="router.proj",
        router_scales=("router.scale", "router.per_expert_scale"),
        beside=BesideNorms(
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm_1",
            before_experts="pre_feedforward_layernorm_2",
            after_experts="post_feedforward_layernorm_2",
        ),
    )


def _ropes(c: dict) -> tuple[dict, ...]:
    """config.json with the RoPE of the global layers alone, and with the RoPE of the local layers.

    Raises:
      ModelError: rope_parameters is not an object for each type of layer, or of a kind that
        transformers does not apply to a part of a head.
    """
    given = c.get("rope_parameters") or {}
    if not all(isinstance(of, dict) for of in given.values()):
        raise ModelError(
            "config.json: rope_parameters of a gemma4_text model has an object for each of "
            "full_attention, sliding_attention"
        )
    ropes = given.get("full_attention", GLOBAL_ROPE), given.get("sliding_attention", LOCAL_ROPE)
    return tuple(
        c | {"rope_parameters": _checked(parameters), "rope_scaling": None} for parameters in ropes
    )


def _checked(parameters: dict) -> dict:
    """The RoPE of one kind of layer."""
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"config.json: rope_type {short(kind)} of a gemma4_text model is not supported; "
            f"{' and '.join(ROPE_KINDS)} are"
        )
    # transformers rotates the whole head in the other kind
    return parameters if kind == "proportional" else parameters | {"partial_rotary_factor": 1.0}


def _rope_to_hf(spec: DecoderSpec, entries: dict) -> dict:
    """transformers reads no other form."""
    local = rope.to_hf(spec.more_ropes[0], spec.max_length)["rope_parameters"]
    return {
        "rope_parameters": {
            "full_attention": entries["rope_parameters"],
            "sliding_attention": local,
        },
        "max_position_embeddings": entries["max_position_embeddings"],
    }


def _gguf_config(config: dict, metadata: Metadata, names: set[str]) -> dict[str, Any]:
    slides = metadata("attention.sliding_window_pattern", wanted=list_of(FLAG))
    L, K, globally = config["num_hidden_layers"], config["num_key_value_heads"], slides.index(False)
    of_layers = K if isinstance(K, list) else [K] * L
    own = {"head_dim": config["head_dim"], "num_key_value_heads": of_layers[globally]}
    experts = metadata("expert_count", 0, whole(0))
    theta = config["rope_theta"]
    local = {"rope_type": "default", "rope_theta": metadata("rope.freq_base_swa", 1e4, rope.THETA)}
    fields = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "head_dim": metadata("attention.key_length_swa"),
        "num_key_value_heads": of_layers[slides.index(True) if True in slides else globally],
        "per_layer_config": {str(i): own for i, slide in enumerate(slides) if not slide},
        "attention_k_eq_v": f"model.layers.{globally}.self_attn.v_proj.weight" not in names,
        "sliding_window": metadata("attention.sliding_window"),
        "final_logit_softcapping": metadata("final_logit_softcapping", 0, NOT_NEGATIVE) or None,
        "hidden_size_per_layer_input": metadata("embedding_length_per_layer_input", 0, whole(0)),
        "num_kv_shared_layers": metadata("attention.shared_kv_layers", 0, whole(0)),
        "enable_moe_block": experts > 0,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {"rope_theta": theta} | (config["rope_scaling"] or {}),
            "sliding_attention": local,
        },
    }
    if experts:
        fields |= {
            "num_experts": experts,
            "top_k_experts": metadata("expert_used_count"),
            "moe_intermediate_size": metadata("expert_feed_forward_length"),
        }
    return fields


def _gguf_metadata(spec: DecoderSpec) -> dict[str, Any]:
    globally = spec.heads_of(next(layer for layer in spec.layers if layer.heads))
    values = {
        "attention.head_count_kv": [spec.heads_of(layer).K for layer in spec.layers],
        "attention.key_length": globally.H,
        "attention.value_length": globally.H,
        "attention.key_length_swa": spec.H,
        "attention.value_length_swa": spec.H,
        "attention.sliding_window": next(
            (x.window for x in spec.layers if x.window), spec.max_length
        ),
        "attention.sliding_window_pattern": [layer.heads is None for layer in spec.layers],
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "rope.freq_base_swa": float(spec.more_ropes[0].theta),
        "rope.dimension_count": globally.H,
        "rope.dimension_count_swa": spec.H,
    }
    if spec.logit_softcap is not None:
        values["final_logit_softcapping"] = float(spec.logit_softcap)
    return values


FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 512,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    },
    decoder=_decoder,
    checks={
        "final_logit_softcapping": optional(NUMBER),
        "attention_k_eq_v": FLAG,
        "enable_moe_block": FLAG,
        "global_head_dim": whole(1),
        "num_global_key_value_heads": optional(whole(1)),
        "per_layer_config": optional(dict_of(OBJECT)),
        "hidden_size_per_layer_input": optional(whole(0)),
        "num_kv_shared_layers": whole(0),
        "use_double_wide_mlp": FLAG,
        "use_bidirectional_attention": optional(one_of("vision", "all")),
    },
    ropes=_ropes,
    rope_to_hf=_rope_to_hf,
    rope_kinds=("proportional",),
    gguf=GgufFormat(
        architecture="gemma4",
        experts=None,
        names=gemma_layers.GGUF_NAMES
        | {
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_gate_up_exps.weight": "experts.gate_up_proj",
            "ffn_down_exps.weight": "experts.down_proj",
            "ffn_down_exps.scale": "router.per_expert_scale",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
        },
        dtype="bfloat16",
        kv_heads_by_layer=True,
        config=_gguf_config,
        metadata=_gguf_metadata,
        rope_kinds=("proportional",),
    ),
    multimodal_parents=(
        MultimodalModel(model_type="gemma4", names=(INSIDE,), tied=True),
        MultimodalModel(model_type="gemma4_unified", names=(INSIDE,), tied=True, defaults=UNIFIED),
    ),
    aliases={"gemma4_unified_text": UNIFIED},
)
