"""Tiny random models of every family as transformers makes them, the same models here, and how far
the two are apart.

For the tests and scripts/bench/parity.py; needs torch, transformers and peft. A family is a row of
FAMILIES.
"""

import functools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.numpy
import scipy.linalg
import torch
import transformers
from flax import nnx

from lljax.config.shipped import shipped_model
from lljax.errors import ConfigError
from lljax.interop.gguf_write import write_gguf
from lljax.interop.huggingface import load_weights, tensors
from lljax.interop.open import open_base
from lljax.interop.peft import write_adapter
from lljax.models import families, lora
from lljax.models.cache import empty_cache
from lljax.models.declare import LoraWeight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.objectives.token_loss import cross_entropy

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "final_logit_softcapping": 3.0,
}
LOCAL_AND_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA4 = {  # 10 of 32 dimensions of a global head rotate
    "num_hidden_layers": 7,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 20,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.34,
            "rope_theta": 5000.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
EXPERTS_BESIDE = {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
}
PART_OF_THE_HEAD = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.2, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
}
SIGMOID = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 5000.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
}
DELTA = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 16,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
EXPERTS_AND_ONE_FOR_ALL = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
CHUNKS = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "attention_chunk_size": 20,
    "floor_scale": 16,
    "attn_scale": 0.5,
    "rope_parameters": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 5000.0,
        "original_max_position_embeddings": 32,
    },
}
GROWING = {  # queries that grow with the position
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.3,
}
# The name begins with the model_type.
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama tied with heads of their own size": (
        transformers.LlamaConfig,
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 72,
        },
    ),
    "mistral": (
        transformers.MistralConfig,
        {"sliding_window": 20, "head_dim": 8, "num_key_value_heads": 1},
    ),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 with a window in the upper layers": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "num_key_value_heads": 6}),
    "gemma2": (transformers.Gemma2Config, GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        GEMMA
        | {
            "num_hidden_layers": 7,
            "sliding_window_pattern": 3,
            "rope_parameters": LOCAL_AND_GLOBAL,
        },
    ),
    "gemma4_text": (transformers.Gemma4TextConfig, GEMMA4 | KEYS_AS_VALUES),
    "gemma4_text with experts": (
        transformers.Gemma4TextConfig,
        GEMMA4 | KEYS_AS_VALUES | EXPERTS_BESIDE,
    ),
    "gemma4_text with values of their own": (
        transformers.Gemma4TextConfig,
        GEMMA4 | {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "phi3": (transformers.Phi3Config, {"sliding_window": 20, "pad_token_id": 0, "eos_token_id": 1}),
    "phi3 turning part of the head": (
        transformers.Phi3Config,
        {
            "hidden_size": 96,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "original_max_position_embeddings": 32,
            "rope_parameters": PART_OF_THE_HEAD,
        },
    ),
    "internlm3": (
        transformers.InternLM3Config,
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        SIGMOID | {"use_qk_norm": True, "attention_bias": True, "head_dim": 16},
    ),
    "deepseek_v3": (transformers.DeepseekV3Config, SIGMOID | LATENT),
    "deepseek_v3 with no latent for queries": (
        transformers.DeepseekV3Config,
        SIGMOID | LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "llama4_text": (transformers.Llama4TextConfig, CHUNKS),
    "llama4_text with two experts a token in every second layer": (
        transformers.Llama4TextConfig,
        CHUNKS
        | {
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "no_rope_layers": [1, 0, 1, 1, 1],
            "attention_bias": True,
        },
    ),
    "iquestcoder": (transformers.IQuestCoderConfig, {"head_dim": 16, "attention_bias": True}),
    "seed_oss": (
        transformers.SeedOssConfig,
        {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    ),
    "smollm3": (transformers.SmolLM3Config, {"num_hidden_layers": 5, "pad_token_id": 0}),
    "smollm3 with windows in layers without RoPE": (
        transformers.SmolLM3Config,
        {
            "pad_token_id": 0,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 20,
            "attention_bias": True,
        },
    ),
    "ernie4_5": (transformers.Ernie4_5Config, {"head_dim": 16, "use_bias": True}),
    "cwm": (transformers.CwmConfig, {"head_dim": 16, "sliding_window": 20}),
    "ministral": (
        transformers.MinistralConfig,
        {
            "head_dim": 16,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "dots1": (
        transformers.Dots1Config,
        SIGMOID
        | {"n_shared_experts": 1, "head_dim": 16, "sliding_window": 20, "max_window_layers": 2},
    ),
    "solar_open": (
        transformers.SolarOpenConfig,
        SIGMOID | {"head_dim": 16, "attention_bias": True},
    ),
    "glm4_moe_lite": (
        transformers.Glm4MoeLiteConfig,
        SIGMOID | LATENT | {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "youtu": (transformers.YoutuConfig, LATENT),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 20,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 5000.0,
                "truncate": False,
            },
        },
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        DELTA | EXPERTS_AND_ONE_FOR_ALL | {"mlp_only_layers": [1]},
    ),
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, DELTA),
    "qwen3_5_moe_text": (
        transformers.Qwen3_5MoeTextConfig,
        DELTA | EXPERTS_AND_ONE_FOR_ALL,
    ),
    "ministral3": (transformers.Ministral3Config, {"head_dim": 16, "rope_parameters": GROWING}),
    "granite": (transformers.GraniteConfig, SCALES | {"attention_bias": True, "mlp_bias": True}),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig,
        SCALES
        | {
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "layer_types": ["full_attention"] * 3,
            "position_embedding_type": "rope",
            "mamba_n_heads": 6,
        },
    ),
    "granitemoehybrid without RoPE": (
        transformers.GraniteMoeHybridConfig,
        SCALES
        | {
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "layer_types": ["attention"] * 3,
            "tie_word_embeddings": True,
            "mamba_n_heads": 6,
        },
    ),
    "mistral4": (
        transformers.Mistral4Config,
        SIGMOID | LATENT | {"rope_parameters": GROWING | {"mscale_all_dim": 0.8}},
    ),
    "olmo2": (transformers.Olmo2Config, {}),
    "olmo3": (
        transformers.Olmo3Config,
        {
            "num_hidden_layers": 5,
            "sliding_window": 20,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 5000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "minimax_m2": (
        transformers.MiniMaxM2Config,
        {"head_dim": 16, "rotary_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "exaone4": (
        transformers.Exaone4Config,
        {"num_hidden_layers": 5, "sliding_window": 20, "sliding_window_pattern": 2},
    ),
    "exaone4 without windows": (
        transformers.Exaone4Config,
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "glm": (transformers.GlmConfig, {"head_dim": 16, "pad_token_id": 0}),
    "glm4": (transformers.Glm4Config, {"head_dim": 16, "pad_token_id": 0}),
    "hunyuan_v1_dense": (
        transformers.HunYuanDenseV1Config,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "dynamic",
                "alpha": 50.0,
                "factor": 1.0,
                "rope_theta": 500.0,
            },
        },
    ),
    "ernie4_5_moe": (
        transformers.Ernie4_5_MoeConfig,
        {
            "moe_intermediate_size": 20,
            "moe_num_experts": 6,
            "moe_k": 2,
            "num_hidden_layers": 4,
            "moe_layer_interval": 2,
        },
    ),
}
IN_GGUF = {  # llama.cpp has these families with these fields alone
    "mistral": {"sliding_window": None},
    "gemma3_text": {
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 6,
    },
    "gemma2": {"query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    "dots1": {"num_key_value_heads": 6, "sliding_window": None},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 5},
    "hunyuan_v1_dense": {"attention_bias": False},
    "seed_oss": {"attention_out_bias": False, "mlp_bias": False},
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"moe_layer_interval": 1},
    "deepseek_v3": {"rope_parameters": LATENT["rope_parameters"] | {"mscale_all_dim": 1.0}},
}
TINY = open_base(str(Path(shipped_model("lljax/assets/tiny-512")).resolve()))
TOKENS = np.random.default_rng(1).integers(0, 128, (2, 150))  # beyond max_position_embeddings


def write_torch(
    folder, family: str, *, dtype=torch.float32, shards: str = "5GB", seed: int = 0, **changes
):
    """A random torch model of the family, which is also saved to `folder`."""
    torch.manual_seed(seed)
    config_class, fields = FAMILIES[family]
    config = config_class(**(SIZES | fields | changes), attn_implementation="eager")
    model = torch_class(config.model_type)._from_config(config).eval()
    with torch.no_grad():  # norms and biases away from their trivial start
        saved = ("correction_bias", "layer_scalar")
        buffers = (buffer for name, buffer in model.named_buffers() if name.endswith(saved))
        for parameter in (*model.parameters(), *buffers):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return model


def torch_class(model_type: str):
    """The class of transformers; AutoModelForCausalLM does not know every one."""
    return getattr(transformers, families.FAMILIES[model_type].architecture)


def read(folder) -> tuple:
    """(base, our model of it) in float32."""
    base = open_base(str(folder))
    model = Decoder(spec_from_hf(base.config))
    load_weights(model, base, dtype=jnp.float32)
    return base, model


def torch_logits(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


def our_logits(model, tokens=TOKENS) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(tokens)))


# Compiled once for all models of one kind; of models so small the time goes to compiling.
jit = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


@jit
def _logits(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    return model.logits(
        model(tokens, positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    )


# ---------------------------------------------------------------- how far apart
def measure(family: str, folder: Path) -> dict[str, float | None]:
    """The largest difference of every kind. Of the round trip: the number of tensors that are not
    bitwise as they were. GGUF: None where no such file is written.
    """
    theirs = write_torch(folder, family)
    base, model = read(folder)
    lora.attach(model, rank=2, alpha=4.0, targets=targets(model.spec))
    fill(model, 0.0)
    found = {
        "logits": _apart(our_logits(model), torch_logits(theirs)),
        "round trip": changed(base, model),
        "GGUF": gguf_logits(family, folder.with_name("gguf")),
    }
    fill(model, 0.1)
    logits = our_logits(model)
    (folder / "adapter").mkdir()
    write_adapter(model, folder / "adapter", base_name=base.path)
    adapted = peft.PeftModel.from_pretrained(theirs, folder / "adapter", is_trainable=True)
    found["PEFT"], found["cache"] = _apart(logits, torch_logits(adapted)), cached(model, logits)
    found["gradient"] = gradient(model, adapted, folder / "adapter")
    return {
        name: found[name] for name in ("logits", "gradient", "round trip", "PEFT", "cache", "GGUF")
    }


def gguf_logits(family: str, folder: Path) -> float | None:
    """Logits of a model as it comes back from a GGUF file, which has a tokenizer."""
    fields = IN_GGUF.get(family, {})
    theirs = write_torch(folder, family, vocab_size=len(TINY.tokenizer()), **fields)
    for file in TINY.folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    base, model = read(folder)
    try:
        write_gguf(base, model.spec, folder / "model.gguf", type="f32")
    except ConfigError:  # llama.cpp has no such model, or lljax does not write it
        return None
    return _apart(our_logits(read(folder / "model.gguf")[1]), torch_logits(theirs))


def _apart(a, b) -> float:
    return float(np.abs(a - b).max())


def changed(base, model) -> int:
    """Tensors of the base that our model does not give back bitwise, or gives and the base has
    not.
    """
    returned = dict(tensors(model))
    names = set(base.names()) - ({"lm_head.weight"} if model.spec.tied else set())
    return len(names ^ set(returned)) + sum(
        not np.array_equal(returned[name], base.read(name)) for name in names & set(returned)
    )


def targets(spec) -> tuple[str, ...]:
    """The linear layers that PEFT adapts, see lljax.interop.peft."""
    if spec.moe is None:
        return ("all-linear",)
    if spec.family == "gpt_oss":
        return (r"self_attn\..*",)
    dense = not families.FAMILIES[spec.family].peft_experts
    return (
        r"(self_attn|linear_attn)\..*",
        r"(mlp|feed_forward)\.(shared_experts?\.)?\w*" if dense else r".*\.experts\..*",
    )


def fill(model, size: float) -> None:
    """Random factors of this size."""
    rng = np.random.default_rng(0)
    for _, variable in declared(model):
        if isinstance(variable, LoraWeight):
            variable.set_value(
                jnp.asarray(rng.normal(size=variable.get_value().shape) * size, jnp.float32)
            )


def cached(model, whole) -> float:
    """Logits read through the cache in five pieces, against those of the whole rows."""
    cache, parts = empty_cache(model.spec, len(TOKENS), TOKENS.shape[1] + 8), []
    for piece in np.split(TOKENS, 5, axis=1):
        logits, cache = _read(*nnx.split(model), jnp.asarray(piece), cache)
        parts.append(logits)
    return _apart(np.concatenate(parts, axis=1), whole)


@jit
def _read(graphdef, state, tokens, cache):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.continued(cache, tokens, rope_length=TOKENS.shape[1])
    return model.logits(hidden), cache


def gradient(model, adapted, folder: Path) -> float:
    """The gradient of the cross-entropy for every factor, against PEFT's and in parts of the
    largest of them. Of a pair that PEFT has for several layers of ours, the blocks that are
    ours.
    """
    logits = adapted(torch.from_numpy(TOKENS[:, :-1])).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(TOKENS[:, 1:]).flatten()
    ).backward()
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    ours = _gradient(graphdef, trainable, frozen, jnp.asarray(TOKENS))
    write_adapter(nnx.merge(graphdef, ours, frozen), folder, base_name="")
    ours = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    ours = fused_experts(ours)
    theirs = {
        name.replace(".default", ""): factor
        for name, factor in adapted.named_parameters()
        if factor.grad is not None
    }
    assert set(theirs) == set(ours), set(theirs) ^ set(ours)
    worst = max(
        _apart(*(x[factor.detach().numpy() != 0] for x in (ours[name], factor.grad.numpy())))
        for name, factor in theirs.items()
    )
    return worst / max(float(factor.grad.abs().max()) for factor in theirs.values())


def fused_experts(factors: dict) -> dict:
    """The factors of experts as PEFT holds them in memory: gate and up by one pair, all experts in
    one matrix.
    """

    def pattern(name):
        return re.sub(
            r"\.experts\.\d+\.(gate_proj|up_proj|w1|w3)",
            ".experts.base_layer",
            re.sub(r"\.experts\.\d+\.(down_proj|w2)", ".experts", name),
        ).replace("block_sparse_moe", "mlp")

    held = {}
    for name, factor in factors.items():
        held.setdefault(pattern(name), {})[name] = factor
    for name, of in held.items():
        if ".experts." not in name:
            (held[name],) = of.values()
            continue
        kinds = sorted({key.split(".")[-3] for key in of})  # gate before up, w1 before w3
        experts = [
            [
                of[key]
                for key in sorted(of, key=lambda key: int(key.split(".experts.")[1].split(".")[0]))
                if key.split(".")[-3] == kind
            ]
            for kind in kinds
        ]
        if "lora_A" in name:
            held[name] = np.concatenate(
                [np.concatenate(both) for both in zip(*experts, strict=True)]
            )
        else:  # [out, rank, expert]
            diagonals = [scipy.linalg.block_diag(*both) for both in zip(*experts, strict=True)]
            blocks = np.stack(diagonals, axis=-1)
            held[name] = blocks.reshape(blocks.shape[0], -1)
    return held


@jit
def _gradient(graphdef, trainable, frozen, tokens):
    def loss(trainable):
        model = nnx.merge(graphdef, trainable, frozen)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = model(
            inputs, positions=jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        )
        return (
            cross_entropy(hidden, model.head, targets, chunk=100, softcap=model.spec.logit_softcap)
            / targets.size
        )

    return jax.grad(loss)(trainable)
