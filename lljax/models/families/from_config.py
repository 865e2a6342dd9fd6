"""A DecoderSpec from a HuggingFace `config.json`."""

from typing import Any

from lljax.errors import ModelError, short
from lljax.models import rope
from lljax.models.families.family import Family, first_set
from lljax.models.families.table import family_of, is_tied
from lljax.models.rope import RopeSpec
from lljax.models.spec import DecoderSpec, LayerSpec, MLASpec, MoESpec
from lljax.models.values import FLAG, NOT_NEGATIVE, NUMBER, check, one_of, optional, whole

MOST_LAYERS = 10_000  # the table of layers of a damaged file would take all memory
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
DTYPE = optional(one_of("bfloat16", "float16", "float32", "float64"))
# The values that fields of every family may hold; `first_set` checks others as they are read.
CONFIG_CHECKS = (
    rope.TOP_CHECKS
    | dict.fromkeys(REQUIRED, whole(1))
    | {
        "num_hidden_layers": whole(1, MOST_LAYERS),
        "num_key_value_heads": optional(whole(1)),
        "head_dim": optional(whole(1)),
        "rms_norm_eps": NUMBER,
        "initializer_range": NOT_NEGATIVE,
        "tie_word_embeddings": FLAG,
        "attention_bias": FLAG,
        "use_bidirectional_attention": FLAG,
        "dtype": DTYPE,
        "torch_dtype": DTYPE,
    }
)
CONFIG_DEFAULTS = {"rms_norm_eps": 1e-6}  # for families that define no other
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # our name: HF's name


def spec_from_hf(hf_config: dict) -> DecoderSpec:
    """Reads a HF `config.json`; absent fields take the defaults of transformers' config class.

    Raises:
      ModelError: an unsupported family or activation, a missing field, a value that cannot be
        right, or head counts that do not divide.
    """
    family = family_of(hf_config)
    c = {**CONFIG_DEFAULTS, **family.defaults, **hf_config}
    check({**dict.fromkeys(REQUIRED), **c}, {**CONFIG_CHECKS, **family.checks})
    fields: dict[str, Any] = {
        "F": c["intermediate_size"],
        "layers": (LayerSpec(),) * c["num_hidden_layers"],
        **family.decoder(c),
    }
    _check_supported(c, family, fields.get("activation", "silu"))
    _check_layer_types(c, fields["layers"])
    if moe := fields.get("moe"):
        _check_experts(moe)
    N, K, H = _heads(c, fields.get("mla"))
    _check_heads(N, fields["layers"])
    main, *others = (rope.from_hf(of_rope) for of_rope in family.ropes(c))
    spec = DecoderSpec(
        family=family.model_type,
        V=c["vocab_size"],
        D=c["hidden_size"],
        N=N,
        K=K,
        H=H,
        rope=main,
        more_ropes=tuple(others),
        max_length=rope.reach(main, c["max_position_embeddings"]),
        norm_eps=c["rms_norm_eps"],
        tied=is_tied(c),
        **fields,
    )
    _check_rope(spec.rope, spec.rotary())
    return spec


def _check_supported(c: dict, family: Family, activation: str) -> None:
    wanted = ACTIVATIONS[activation]
    if (given := c.get("hidden_activation") or c.get("hidden_act") or wanted) != wanted:
        raise ModelError(
            f"config.json: hidden_act {short(given)} of model_type {family.model_type!r} is not "
            f"supported; {wanted} is"
        )
    if c.get("use_bidirectional_attention") in (True, "all"):  # "vision" is of images alone
        raise ModelError(
            "config.json: use_bidirectional_attention is not supported; a decoder looks back only"
        )


def _check_layer_types(c: dict, layers: tuple[LayerSpec, ...]) -> None:
    """Refuses kinds of layers that `layer_types` names and the family does not read, or the
    reverse.
    """
    types = c.get("layer_types")
    if not isinstance(types, list) or len(types) != len(layers):
        return  # no field of this family
    for i, (kind, layer) in enumerate(zip(types, layers, strict=True)):
        recurrent = layer.mixer == "gated_delta"
        is_full = layer.window is None and not recurrent
        if (kind in ("full_attention", "attention")) != is_full or (
            kind == "linear_attention"
        ) != recurrent:
            window = "no window" if layer.window is None else f"a window of {layer.window}"
            raise ModelError(
                f"config.json: layer_types[{i}] is {short(kind)}, and its other fields give this "
                f"layer of model_type {c['model_type']!r} {window}"
            )


def _heads(c: dict, mla: MLASpec | None) -> tuple[int, int, int]:
    """Query heads N, key/value heads K and head size H."""
    N = c["num_attention_heads"]
    K = c.get("num_key_value_heads") or N
    H = c.get("head_dim") or c["hidden_size"] // N
    if mla:  # head_dim has another meaning there
        K, H = N, first_set(c, "qk_nope_head_dim") + mla.rope
        if mla.v > H:
            raise ModelError(
                f"config.json: v_head_dim={mla.v} exceeds the {H} dimensions of a query, which is "
                "not supported"
            )
    _check_sizes(N, K, H)
    return N, K, H


def _check_heads(N: int, layers: tuple[LayerSpec, ...]) -> None:
    for heads in {layer.heads for layer in layers if layer.heads}:
        _check_sizes(N, heads.K, heads.H)


def _check_sizes(N: int, K: int, H: int) -> None:
    if N % K:
        raise ModelError(
            f"config.json: num_attention_heads={N} is no multiple of num_key_value_heads={K}"
        )
    if H % 2:
        raise ModelError(f"config.json: head_dim={H} is odd, and RoPE rotates pairs")


def _check_experts(moe: MoESpec) -> None:
    if moe.k > moe.E:
        raise ModelError(
            f"config.json: num_experts_per_tok={moe.k} exceeds the {moe.E} experts there are"
        )
    if moe.E % moe.groups or not moe.k <= moe.best_groups * (moe.E // moe.groups) <= moe.E:
        raise ModelError(
            f"config.json: n_group={moe.groups} and topk_group={moe.best_groups} do not divide "
            f"{moe.E} experts so that num_experts_per_tok={moe.k} can be chosen"
        )


def _check_rope(spec: RopeSpec, head_dim: int) -> None:
    rotary = rope.rotary_dims(spec, head_dim)
    if rotary % 2:
        raise ModelError(
            f"config.json: partial_rotary_factor={spec.partial} rotates {rotary} of "
            f"head_dim={head_dim} dimensions, and RoPE rotates pairs"
        )
    for name in rope.KINDS[spec.type].lists:
        if (entries := len(getattr(spec, name))) != rotary // 2:
            raise ModelError(
                f"config.json: {name} has {entries} entries; head_dim={head_dim} needs "
                f"{rotary // 2}"
            )
