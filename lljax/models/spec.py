"""What a decoder is, read from its HuggingFace `config.json`. Families differ by a row in a table.

Letters: D model width, N query heads, K key/value heads, H head size, F MLP width, V vocabulary, L
  layers.
"""

import dataclasses

from lljax.errors import ModelError, short
from lljax.models import rope
from lljax.models.rope import RopeSpec
from lljax.models.values import (
    FLAG,
    NOT_NEGATIVE,
    NUMBER,
    Value,
    check,
    list_of,
    one_of,
    optional,
    whole,
)


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """The experts that take the place of the MLP, and how tokens are sent to them.

    score: what a router logit counts for: softmax | sigmoid.
    best_first: the best experts are taken by logit, and scores are of those alone; otherwise they
      are taken by score.
    normalise: the weights of a token's experts are made to sum to 1; then they are multiplied by
      `scale`.
    groups, best_groups: experts are taken from the best groups only, by the sum of a group's best
      two.
    correction: a bias per expert counts for the choice and not for the weight.
    on_input: the weight multiplies what goes into an expert, not what comes out.
    fused: HF keeps the experts of a layer in one tensor [E, in, out], and gate and up in another:
      one after the other ("halves"), or column by column ("turns"). bias: of these, and of the
      router.
    clamp: (alpha, limit) of gate * sigmoid(alpha gate) * (up + 1), gate cut at the limit and up at
      both signs of it; None for silu(gate) * up.
    """

    E: int  # routed experts
    k: int  # of them, those of a token
    F: int  # MLP width of one
    score: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    best_groups: int = 1
    correction: bool = False
    best_first: bool = False
    on_input: bool = False
    fused: str = ""
    bias: bool = False
    clamp: tuple[float, float] | None = None
    shared: int = 0  # MLP width of the expert that every token takes; 0 for none
    shared_gate: bool = False  # its output is multiplied by a sigmoid of the token
    # HF names below the layer: of the block, of the router and the shared expert in it, of an
    # expert's gate, up and down.
    block: str = "mlp"
    router: str = "gate"
    shared_name: str = "shared_experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class MLASpec:
    """The sizes of multi-head latent attention."""

    q_rank: int | None  # of the latent that queries are made of; None for none
    kv_rank: int  # of the latent that keys and values are made of
    rope: int  # dimensions of a query or key that RoPE turns
    v: int  # dimensions of a value


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ between the layers of one decoder."""

    window: int | None = None  # tokens that a query sees, itself included; None for full attention
    rope: int | None = 0  # which of `DecoderSpec.ropes` turns it; None for no RoPE
    moe: bool = False  # experts (`DecoderSpec.moe`) in the place of the MLP
    # the window does not slide: a document is cut into chunks of as many tokens
    chunked: bool = False
    mixer: str = "attention"  # a row of lljax.models.mixers.MIXERS


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The shape of a decoder. Hashable, so that it can be a static part of a compiled program."""

    family: str  # HF `model_type`
    V: int
    D: int
    N: int
    K: int
    H: int
    F: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec  # the one that is stretched to read longer rows
    max_length: int  # tokens that the model reads
    norm_eps: float
    tied: bool  # the head is the embedding
    more_ropes: tuple[RopeSpec, ...] = ()  # of layers that have another one, see `ropes`
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    # queries and keys that RoPE turned are normalised after it, without a weight
    qk_unit: bool = False
    interleaved: bool = False  # RoPE pairs neighbours
    sinks: bool = False  # see lljax.attention.attend
    # of layers without RoPE, see lljax.models.rope.temperature
    temperature: tuple[float, float] | None = None
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    norms_after: bool = False  # what attention and MLP add to the residual is normalised, too
    activation: str = "silu"  # of the MLP: silu | gelu_tanh
    fused: bool = False  # HF keeps q, k and v in one tensor, and gate and up in another
    embed_scale: float = 1.0  # what embeddings are multiplied by
    attention_scale: float | None = None  # what scores are multiplied by; None for H ** -0.5
    attention_softcap: float | None = None  # see lljax.attention.softcap
    logit_softcap: float | None = None
    moe: MoESpec | None = None
    mla: MLASpec | None = None

    @property
    def L(self) -> int:
        return len(self.layers)

    @property
    def has_experts(self) -> bool:
        return any(layer.moe for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Those that `LayerSpec.rope` counts."""
        return (self.rope, *self.more_ropes)

    @property
    def rotary(self) -> int:
        """Dimensions of a head that RoPE may turn."""
        return self.mla.rope if self.mla else self.H

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        if self.mla and self.rope.type != "default" and self.rope.mscale_all_dim:
            return self.H**-0.5 * rope.magnitude(self.rope, self.rope.mscale_all_dim) ** 2
        return self.H**-0.5 if self.attention_scale is None else self.attention_scale


def _flag(name: str):
    return _default(name, False)


def _default(name: str, value):
    return lambda c: c.get(name, value)


def _window(c: dict, default: int | None = None) -> int | None:
    """Of the layers that have one; transformers writes 0 where none has."""
    check(c, {"sliding_window": optional(whole(1))})
    return c.get("sliding_window", default)


def _windows(*windows: int | None) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(window) for window in windows)


def _sliding(c: dict, otherwise, local: str = "sliding_attention") -> list[bool]:
    """Whether each layer is `local`, as `layer_types` says; where it is absent, as otherwise(layer)
    does.
    """
    types = _of_layers(c, "layer_types", lambda i: local if otherwise(i) else "full_attention")
    for i, kind in enumerate(types):
        if kind not in ("full_attention", local):
            raise ModelError(
                f"config.json: layer_types[{i}] {short(kind)} is none of full_attention, {local}"
            )
    return [kind == local for kind in types]


def _of_layers(c: dict, name: str, otherwise) -> list:
    """The entries of a field that has one for each layer; where it is absent, otherwise(layer)."""
    L = c["num_hidden_layers"]
    given = c.get(name) or [otherwise(i) for i in range(L)]
    if not isinstance(given, list) or len(given) != L:
        raise ModelError(
            f"config.json: {name} has {len(given) if isinstance(given, list) else short(given)} entries for "
            f"num_hidden_layers={L}"
        )
    return given


def _upper_layers(c: dict) -> tuple[LayerSpec, ...]:
    """Qwen: a sliding window from layer `max_window_layers` on, or as `layer_types` says, where it
    is switched on.
    """
    if not c.get("use_sliding_window", False):
        return _windows(*(None,) * c["num_hidden_layers"])
    window = _window(c, 4096)
    return _windows(
        *(
            window if slides else None
            for slides in _sliding(c, lambda i: i >= c.get("max_window_layers", 28))
        )
    )


def _local_and_global(period):
    """Gemma: all layers but each `period`-th slide; Gemma 3's sliding ones have the second RoPE."""

    def layers(c: dict) -> tuple[LayerSpec, ...]:
        slides, window = _sliding(c, lambda i: (i + 1) % period(c)), _window(c, 4096)
        local = 1 if c["model_type"] == "gemma3_text" else 0
        return tuple(LayerSpec(window, rope=local) if slide else LayerSpec() for slide in slides)

    return layers


def _chunked_layers(c: dict) -> tuple[LayerSpec, ...]:
    """Llama 4: every fourth layer has no RoPE and full attention; experts in every layer, or every
    second.
    """
    L, chunk = (
        c["num_hidden_layers"],
        _number({"attention_chunk_size": 8192, **c}, "attention_chunk_size"),
    )
    every, step = (
        _number({name: default, **c}, name)
        for name, default in (("no_rope_layer_interval", 4), ("interleave_moe_layer_step", 1))
    )
    # 1 where there is RoPE, whatever its name
    turn = _of_layers(c, "no_rope_layers", lambda i: (i + 1) % every)
    local = _sliding(c, lambda i: turn[i], "chunked_attention")
    sparse = range(step - 1, L, step) if c.get("moe_layers") is None else c["moe_layers"]
    return tuple(
        LayerSpec(
            chunk if local[i] else None,
            rope=0 if turn[i] else None,
            moe=i in sparse,
            chunked=local[i],
        )
        for i in range(L)
    )


def _ropes_by_layer(c: dict) -> tuple[dict, dict]:
    """Gemma 3's config.json, with the RoPE of the global layers alone, and with that of the local
    ones. Its max_position_embeddings counts a linear factor in, as vLLM takes it; elsewhere it does
    not (lljax.models.rope.to_hf).
    """
    given = {kind: of or {} for kind, of in (c.get("rope_parameters") or {}).items()}
    if not all(isinstance(of, dict) for of in given.values()):
        raise ModelError(
            "config.json: rope_parameters of a gemma3_text model has an object for each of full_attention, "
            "sliding_attention"
        )
    main = {
        "rope_theta": c.get("rope_theta", 1_000_000.0),
        **given.get("full_attention", {}),
        **(c.get("rope_scaling") or {}),
    }
    local = {
        "rope_theta": c.get("rope_local_base_freq", 10_000.0),
        **given.get("sliding_attention", {}),
    }
    kind, factor = main.get("rope_type", main.get("type")), main.get("factor")
    if kind == "linear" and isinstance(factor, (int, float)) and factor >= 1:
        c = c | {"max_position_embeddings": int(c["max_position_embeddings"] / factor)}
    # transformers looks for `truncate` outside of these objects, where it never is.
    return tuple(
        c | {"rope_parameters": each | {"truncate": True}, "rope_scaling": None}
        for each in (main, local)
    )


# of config.json, as `rope_to_hf` writes them
ROPE_FIELDS = rope.TOP.keys() | {"rope_local_base_freq"}


def rope_to_hf(spec: DecoderSpec) -> dict:
    """The config.json entries of a decoder's RoPE, see lljax.models.rope.to_hf."""
    entries = rope.to_hf(spec.rope, spec.max_length)
    # 1 is not what transformers takes if nothing is said
    if "partial_rotary_factor" in ROPE.get(spec.family, {}):
        share = {"partial_rotary_factor": spec.rope.partial}
        entries |= share | {
            name: entries[name] | share
            for name in ("rope_parameters", "rope_scaling")
            if name in entries
        }
    of_lengths = spec.rope.original_length * spec.rope.factor == entries["max_position_embeddings"]
    if (
        spec.family == "phi3"
        and spec.rope.type == "longrope"
        and spec.rope.attention_factor is None
        and of_lengths
    ):
        # transformers 4 wants these three alone; both versions make the factor from the lengths.
        entries["rope_scaling"] = {
            "type": "longrope",
            **{name: entries["rope_parameters"][name] for name in rope.LISTS},
        }
    if not spec.more_ropes:
        return entries
    local = rope.to_hf(spec.more_ropes[0], spec.max_length)["rope_parameters"]
    if spec.rope.type == "linear":
        entries["max_position_embeddings"] = int(spec.rope.original_length * spec.rope.factor)
    return entries | {
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {
            "full_attention": entries["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _number(c: dict, *names: str) -> int:
    """The first of these fields that is there.

    Raises:
      ModelError: there is none, or it is no whole number of at least 1.
    """
    name = next((name for name in names if c.get(name) is not None), names[0])
    check({name: c.get(name)}, {name: whole(1)})
    return c[name]


def _softmax_moe(c: dict) -> MoESpec:
    """Qwen."""
    shared = c["model_type"] == "qwen2_moe"
    return MoESpec(
        _number(c, "num_experts", "num_local_experts"),
        _number(c, "num_experts_per_tok"),
        _number(c, "moe_intermediate_size"),
        normalise=c.get("norm_topk_prob", False),
        shared_name="shared_expert",
        shared_gate=shared,
        shared=_number(c, "shared_expert_intermediate_size") if shared else 0,
    )


def _sigmoid_moe(c: dict) -> MoESpec:
    """DeepSeek-V3 and GLM-4.5."""
    F = _number(c, "moe_intermediate_size")
    return MoESpec(
        _number(c, "n_routed_experts", "num_local_experts"),
        _number(c, "num_experts_per_tok"),
        F,
        score="sigmoid",
        correction=True,
        normalise=c.get("norm_topk_prob", True),
        scale=c.get("routed_scaling_factor", 1.0),
        groups=_number(c, "n_group"),
        best_groups=_number(c, "topk_group"),
        shared=F * _number({"n_shared_experts": 1, **c}, "n_shared_experts"),
    )


def _llama4_moe(c: dict) -> MoESpec:
    F = c["intermediate_size"]
    return MoESpec(
        _number(c, "num_local_experts"),
        _number(c, "num_experts_per_tok"),
        F,
        score="sigmoid",
        best_first=True,
        on_input=True,
        fused="halves",
        shared=F,
        block="feed_forward",
        router="router",
        shared_name="shared_expert",
    )


def _gpt_oss_moe(c: dict) -> MoESpec:
    return MoESpec(
        _number(c, "num_local_experts", "num_experts"),
        _number(c, "num_experts_per_tok"),
        c["intermediate_size"],
        best_first=True,
        fused="turns",
        bias=True,
        clamp=(c.get("swiglu_alpha", 1.702), c.get("swiglu_limit", 7.0)),
        router="router",
    )


def _mixtral_moe(c: dict) -> MoESpec:
    return MoESpec(
        _number(c, "num_local_experts"),
        _number(c, "num_experts_per_tok"),
        c["intermediate_size"],
        normalise=True,
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    )


def _sparse_layers(c: dict, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Qwen: experts in every `decoder_sparse_step`-th layer, but for `mlp_only_layers`."""
    dense, step = c.get("mlp_only_layers") or (), c.get("decoder_sparse_step", 1)
    return tuple(
        dataclasses.replace(layer, moe=i not in dense and (i + 1) % step == 0)
        for i, layer in enumerate(layers)
    )


def _dense_first(c: dict) -> tuple[LayerSpec, ...]:
    dense = c.get("first_k_dense_replace", 0)
    return tuple(LayerSpec(moe=i >= dense) for i in range(c["num_hidden_layers"]))


def _temperature(c: dict) -> tuple[float, float] | None:
    if not c.get("attn_temperature_tuning", True):
        return None
    return c.get("attn_scale", 0.1), c.get("floor_scale", 8192)


def _latent(c: dict) -> MLASpec:
    q_rank = None if c.get("q_lora_rank") is None else _number(c, "q_lora_rank")
    return MLASpec(
        q_rank, _number(c, "kv_lora_rank"), _number(c, "qk_rope_head_dim"), _number(c, "v_head_dim")
    )


GEMMA = {
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "norms_after": True,
    "qkv_bias": _flag("attention_bias"),
    "output_bias": _flag("attention_bias"),
    "embed_scale": lambda c: c["hidden_size"] ** 0.5,
    "attention_scale": lambda c: c.get("query_pre_attn_scalar", 256) ** -0.5,
}

# What differs between families, as defaults of the fields above: values, or functions of the HF
# config.
FAMILIES = {
    "llama": {
        "qkv_bias": _flag("attention_bias"),
        "output_bias": _flag("attention_bias"),
        "mlp_bias": _flag("mlp_bias"),
    },
    "mistral": {"layers": lambda c: _windows(*(_window(c, 4096),) * c["num_hidden_layers"])},
    "qwen2": {"qkv_bias": True, "layers": _upper_layers},
    "qwen3": {
        "qkv_bias": _flag("attention_bias"),
        "output_bias": _flag("attention_bias"),
        "qk_norm": True,
        "layers": _upper_layers,
    },
    "gemma2": GEMMA
    | {
        "layers": _local_and_global(lambda c: 2),
        "attention_softcap": _default("attn_logit_softcapping", 50.0),
        "logit_softcap": _default("final_logit_softcapping", 30.0),
    },
    "gemma3_text": GEMMA
    | {
        "layers": _local_and_global(lambda c: c.get("sliding_window_pattern", 6)),
        "qk_norm": True,
        "logit_softcap": _default("final_logit_softcapping", None),
    },
    "phi3": {"fused": True, "layers": lambda c: _windows(*(_window(c),) * c["num_hidden_layers"])},
    "internlm3": {
        "qkv_bias": lambda c: c.get("qkv_bias", c.get("attention_bias", False)),
        "output_bias": lambda c: c.get("bias", c.get("mlp_bias", False)),
        "mlp_bias": lambda c: c.get("bias", c.get("mlp_bias", False)),
    },
    "mixtral": {
        "moe": _mixtral_moe,
        "layers": lambda c: (LayerSpec(_window(c), moe=True),) * c["num_hidden_layers"],
    },
    "qwen2_moe": {
        "qkv_bias": lambda c: c.get("qkv_bias", True),
        "moe": _softmax_moe,
        "layers": lambda c: _sparse_layers(c, _upper_layers(c)),
    },
    "qwen3_moe": {
        "qkv_bias": _flag("attention_bias"),
        "output_bias": _flag("attention_bias"),
        "qk_norm": True,
        "moe": _softmax_moe,
        "layers": lambda c: _sparse_layers(
            c,
            _windows(
                *(_window(c, 4096) if c.get("use_sliding_window") else None,)
                * c["num_hidden_layers"]
            ),
        ),
    },
    "glm4_moe": {
        "qkv_bias": _flag("attention_bias"),
        "qk_norm": _flag("use_qk_norm"),
        "moe": _sigmoid_moe,
        "layers": _dense_first,
    },
    "deepseek_v3": {
        "qkv_bias": _flag("attention_bias"),
        "output_bias": _flag("attention_bias"),
        "moe": _sigmoid_moe,
        "mla": _latent,
        "interleaved": _default("rope_interleave", True),
        "layers": _dense_first,
    },
    "llama4_text": {
        "qkv_bias": _flag("attention_bias"),
        "output_bias": _flag("attention_bias"),
        "interleaved": True,
        "qk_unit": _default("use_qk_norm", True),
        "temperature": _temperature,
        "moe": _llama4_moe,
        "layers": _chunked_layers,
        "F": lambda c: _number({"intermediate_size_mlp": 16_384, **c}, "intermediate_size_mlp"),
    },
    "gpt_oss": {
        "qkv_bias": _default("attention_bias", True),
        "output_bias": _default("attention_bias", True),
        "sinks": True,
        "moe": _gpt_oss_moe,
        "layers": lambda c: tuple(
            LayerSpec(_window(c, 128) if slides else None, moe=True)
            for slides in _sliding(c, lambda i: (i + 1) % 2)
        ),
    },
}
# Where config.json has none. The others: as many key/value heads as query heads, and hidden_size //
# num_attention_heads.
KV_HEADS = {
    "mistral": 8,
    "qwen2": 32,
    "qwen3": 32,
    "gemma2": 4,
    "gemma3_text": 4,
    "internlm3": 2,
    "mixtral": 8,
    "qwen2_moe": 16,
    "qwen3_moe": 4,
    "glm4_moe": 8,
    "llama4_text": 8,
    "gpt_oss": 8,
}
HEAD_SIZE = {
    "qwen3": 128,
    "gemma2": 256,
    "gemma3_text": 256,
    "internlm3": 128,
    "llama4_text": 128,
    "gpt_oss": 64,
}
MAX_LENGTH = {
    "llama": 2048,
    "mistral": 131_072,
    "qwen2": 32_768,
    "qwen3": 32_768,
    "gemma2": 8192,
    "gemma3_text": 131_072,
    "phi3": 4096,
    "internlm3": 32_768,
    "mixtral": 131_072,
    "qwen2_moe": 32_768,
    "qwen3_moe": 32_768,
    "glm4_moe": 131_072,
    "deepseek_v3": 4096,
    "llama4_text": 131_072,
    "gpt_oss": 131_072,
}
# the others: 1e-6
NORM_EPS = dict.fromkeys(
    ("phi3", "internlm3", "mixtral", "glm4_moe", "llama4_text", "gpt_oss"), 1e-5
)
ROPE = {
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "phi3": {"original_max_position_embeddings": 4096},
    "llama4_text": {"rope_theta": 500_000.0},
    "gpt_oss": {
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}
TIED = ("gemma2", "gemma3_text")
MOST_LAYERS = 10_000  # each is looked at: a number out of a damaged file would take all memory
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What fields of config.json may hold, where they are there; `_number` checks the others.
VALUES = (
    rope.TOP
    | dict.fromkeys(REQUIRED, whole(1))
    | {
        "num_hidden_layers": whole(1, MOST_LAYERS),
        "num_key_value_heads": optional(whole(1)),
        "head_dim": optional(whole(1)),
        "sliding_window_pattern": whole(1),
        "max_window_layers": whole(0),
        "decoder_sparse_step": whole(1),
        "first_k_dense_replace": whole(0),
        "rms_norm_eps": NUMBER,
        "initializer_range": NOT_NEGATIVE,
        "query_pre_attn_scalar": NUMBER,
        "attn_logit_softcapping": optional(NUMBER),
        "final_logit_softcapping": optional(NUMBER),
        "routed_scaling_factor": NUMBER,
        "attn_scale": NUMBER,
        "floor_scale": NUMBER,
        "swiglu_alpha": NUMBER,
        "swiglu_limit": NUMBER,
        "rope_local_base_freq": rope.THETA,
        "attn_temperature_tuning": Value(lambda x: type(x) in (bool, int), "true or false"),
        **dict.fromkeys(
            ("no_rope_layers", "moe_layers", "mlp_only_layers"), optional(list_of(whole(0)))
        ),
        **dict.fromkeys(
            ("dtype", "torch_dtype"), optional(one_of("bfloat16", "float16", "float32", "float64"))
        ),
        **dict.fromkeys(
            (
                "tie_word_embeddings",
                "attention_bias",
                "mlp_bias",
                "qkv_bias",
                "bias",
                "use_sliding_window",
                "use_bidirectional_attention",
                "norm_topk_prob",
                "use_qk_norm",
                "rope_interleave",
            ),
            FLAG,
        ),
    }
)
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours: HF's name


def from_hf(hf_config: dict) -> DecoderSpec:
    """Reads a HF `config.json`; absent fields take the defaults of transformers' config class of
    that family.

    Raises:
      ModelError: an unsupported family or activation, a missing field, or head counts that do not
        divide.
    """
    c, family = hf_config, hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"config.json: model_type {short(family)} is not supported; supported are {', '.join(FAMILIES)}"
        )
    c = {"max_position_embeddings": MAX_LENGTH[family], **c}
    check({**dict.fromkeys(REQUIRED), **c}, VALUES)
    row = {"layers": lambda c: _windows(*(None,) * c["num_hidden_layers"])} | FAMILIES[family]
    wanted = ACTIVATIONS[row.get("activation", "silu")]
    if (given := c.get("hidden_activation") or c.get("hidden_act") or wanted) != wanted:
        raise ModelError(
            f"config.json: hidden_act {short(given)} of model_type {family!r} is not supported; {wanted} is"
        )
    if c.get("use_bidirectional_attention"):
        raise ModelError(
            "config.json: use_bidirectional_attention is not supported; a decoder looks back only"
        )
    D, N = c["hidden_size"], c["num_attention_heads"]
    K = c.get("num_key_value_heads", KV_HEADS.get(family)) or N
    H = c.get("head_dim", HEAD_SIZE.get(family)) or D // N
    c = ROPE.get(family, {}) | c
    fields = {"F": c["intermediate_size"]} | {
        name: value(c) if callable(value) else value for name, value in row.items()
    }
    rotary = H
    if mla := fields.get("mla"):  # head_dim is another thing there
        K, H, rotary = N, _number(c, "qk_nope_head_dim") + mla.rope, mla.rope
        fields["layers"] = tuple(
            dataclasses.replace(layer, mixer="mla") for layer in fields["layers"]
        )
        if mla.v > H:
            raise ModelError(
                f"config.json: v_head_dim={mla.v} exceeds the {H} dimensions of a query, which is not supported"
            )
    if moe := fields.get("moe"):
        _check_experts(moe)
    if N % K:
        raise ModelError(
            f"config.json: num_attention_heads={N} is no multiple of num_key_value_heads={K}"
        )
    if H % 2:
        raise ModelError(f"config.json: head_dim={H} is odd, and RoPE turns pairs")
    main, *others = (
        rope.from_hf(each) for each in (_ropes_by_layer(c) if family == "gemma3_text" else (c,))
    )
    turning = rope.turning(main, rotary)
    if turning % 2:
        raise ModelError(
            f"config.json: partial_rotary_factor={main.partial} turns {turning} of head_dim={rotary} dimensions, "
            "and RoPE turns pairs"
        )
    for name in ("short_factor", "long_factor") if main.type == "longrope" else ():
        if (given := len(getattr(main, name))) != turning // 2:
            raise ModelError(
                f"config.json: {name} has {given} entries; head_dim={rotary} needs {turning // 2}"
            )
    return DecoderSpec(
        family,
        V=c["vocab_size"],
        D=D,
        N=N,
        K=K,
        H=H,
        rope=main,
        more_ropes=tuple(others),
        max_length=rope.reach(main, c["max_position_embeddings"]),
        norm_eps=c.get("rms_norm_eps", NORM_EPS.get(family, 1e-6)),
        tied=is_tied(c),
        **fields,
    )


def is_tied(hf_config: dict) -> bool:
    """Whether config.json says that the head is the embedding."""
    return bool(hf_config.get("tie_word_embeddings", hf_config.get("model_type") in TIED))


def _check_experts(moe: MoESpec) -> None:
    if moe.k > moe.E:
        raise ModelError(
            f"config.json: num_experts_per_tok={moe.k} exceeds the {moe.E} experts there are"
        )
    if moe.E % moe.groups or not moe.k <= moe.best_groups * (moe.E // moe.groups) <= moe.E:
        raise ModelError(
            f"config.json: n_group={moe.groups} and topk_group={moe.best_groups} do not divide {moe.E} experts so "
            f"that num_experts_per_tok={moe.k} can be chosen"
        )


def repeats(layers: tuple[LayerSpec, ...]) -> list[tuple[int, tuple[LayerSpec, ...], int]]:
    """The layers as patterns that repeat: (first layer, pattern, times), one after the other. The
    longest stretch first, of the shortest pattern that makes it; nearly every model is one pattern
    of one layer.
    """
    found, first = [], 0
    while first < len(layers):
        best = (1, 1)  # layers of the pattern, times
        for period in range(1, (len(layers) - first) // 2 + 1):
            pattern, times = layers[first : first + period], 1
            while layers[first + times * period : first + (times + 1) * period] == pattern:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = period, times
        period, times = best
        found.append((first, layers[first : first + period], times))
        first += period * times
    return found
