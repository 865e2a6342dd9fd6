"""The text models of multimodal models: read under every form of names, and their adapters and
merged models in transformers, PEFT and here.
"""

import json
import re

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from families import our_logits, read, torch_logits
from multimodal import MODELS, rename, write_multimodal

from lljax.errors import ConfigError, ModelError
from lljax.interop.export import export_merged, export_peft
from lljax.interop.export_whole import export_whole
from lljax.interop.huggingface import load_weights
from lljax.interop.multimodal import text_model
from lljax.interop.open import open_base
from lljax.interop.peft import load_adapter, read_adapter_config
from lljax.models.decoder import Decoder
from lljax.models.families import FAMILIES, spec_from_hf

INSIDE, WRAPPED, BESIDE = "model.language_model.", "language_model.model.", "model."
# Every form of names that checkpoints on the hub have, or that transformers saved.
FORMS = {
    "gemma3": (INSIDE, WRAPPED),
    "gemma4": (INSIDE,),
    "gemma4_unified": (INSIDE,),
    "mistral3": (INSIDE, WRAPPED),
    "qwen3_vl": (INSIDE,),
    "qwen2_5_vl": (INSIDE, BESIDE),
    "qwen3_vl_moe": (INSIDE,),
    "qwen3_5": (INSIDE,),
    "qwen3_5_moe": (INSIDE,),
    "kimi_k25": (WRAPPED,),
}
TEXT = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "gemma4_unified": "Gemma4ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen3_vl_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "kimi_k25": "DeepseekV3ForCausalLM",
}
ROPES = {"kimi_k25": "keep", "gemma4": "proportional", "gemma4_unified": "proportional"}
QUICK = ("qwen2_5_vl",)
TABLE = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
LINEAR = ("q_proj", "v_proj", "o_proj", "down_proj")
ATTENTION = (
    r"(self_attn|linear_attn)\..*",
)  # PEFT takes no other adapters of a multimodal model with experts


def close(a, b, model_type=""):
    """A gated delta network divides outputs that are nearly 0 by their size, and their rounding."""
    atol = 5e-4 if model_type.startswith("qwen3_5") else 1e-4
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def targets(model_type):
    if model_type == "gemma4":  # with the MLP beside the experts
        return (*ATTENTION, r"mlp\..*")
    mixed = ("qwen3_vl_moe", "qwen3_5_moe", "kimi_k25")
    return ATTENTION if model_type in mixed else LINEAR


def run(commands):
    names = {}
    exec(commands, names)
    return names["model"]


def transformers_whole(model, base, out):
    """The multimodal model with the trained text model, as its printed commands load it."""
    names = {}
    commands = export_whole(model, base, out)
    exec(commands.partition("vllm serve")[0].rpartition("\n")[0], names)
    return names["model"].float()


def as_form(form):
    """A change of names, from any form to this one."""

    def change(name):
        for known in (INSIDE, WRAPPED, BESIDE):
            if name.startswith(known) and not re.search("visual|vision|projector", name):
                return form + name.removeprefix(known)
        if name.endswith("lm_head.weight"):
            return ("language_model." if form == WRAPPED else "") + "lm_head.weight"
        return name

    return change


@pytest.mark.parametrize("model_type", TABLE)
def test_the_text_model_is_read_trained_and_taken_back(
    tmp_path, add_tokenizer, trained, model_type, caplog
):
    """Logits of text, the merged text model, and the adapter in PEFT on the whole model, past the
    original context.
    """
    folder = tmp_path / "base"
    theirs = write_multimodal(folder, model_type)
    add_tokenizer(folder)
    wanted = torch_logits(theirs)
    for form in FORMS[model_type]:
        rename(folder, as_form(form))
        caplog.clear()
        base, ours = read(folder)
        close(our_logits(ours), wanted, model_type)
        assert caplog.text.count("tensors of other parts") == 1
        assert caplog.text.count("are not part of the model") == 0

    rope = ROPES.get(model_type, "linear")
    also = ("embed", "norm") if model_type in ("gemma3", "qwen3_vl") else ()
    base, model = trained(folder, rope, targets=targets(model_type), also_train=also)
    tuned = our_logits(model)
    assert np.abs(tuned - wanted).max() > 0.01
    export_merged(model, base, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [TEXT[model_type]] and "mrope" not in json.dumps(config)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == TEXT[model_type]
    close(torch_logits(merged), tuned, model_type)

    kept = transformers_whole(model, base, tmp_path / "whole")
    assert type(kept) is MODELS[model_type][1]
    close(torch_logits(kept), tuned, model_type)
    others = [name for name in theirs.state_dict() if re.search("visual|vision|projector", name)]
    for name in others:
        assert torch.equal(kept.state_dict()[name], theirs.state_dict()[name])

    commands = export_peft(model, base, tmp_path / "peft")
    whole = run(commands)
    assert type(whole.get_base_model()) is MODELS[model_type][1]
    close(torch_logits(whole), tuned, model_type)
    adapted = {n for n, m in whole.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert all(".language_model." in name for name in adapted) and adapted
    if "vllm serve" in commands:
        assert '{"text_config": {"rope' in commands

    again, continued = open_base(str(folder)), Decoder(model.spec)
    read_adapter_config(tmp_path / "peft").attach(continued)
    load_weights(continued, again, dtype=jnp.float32)
    load_adapter(continued, tmp_path / "peft")
    close(our_logits(continued), tuned, model_type)


@pytest.mark.slow
def test_adapters_of_experts_that_a_multimodal_model_fuses_are_refused(
    tmp_path, add_tokenizer, trained
):
    write_multimodal(tmp_path / "base", "qwen3_vl_moe")
    base, model = trained(
        add_tokenizer(tmp_path / "base"), targets=(r".*\.experts\..*",), also_train=()
    )
    with pytest.raises(ConfigError, match="a multimodal qwen3_moe model.*--format=merged"):
        export_peft(model, base, tmp_path / "peft")


@pytest.mark.slow
def test_fused_experts_are_read_as_the_hub_has_them_and_as_transformers_saves_them(tmp_path):
    theirs = write_multimodal(tmp_path, "qwen3_vl_moe")
    path = tmp_path / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    turned = {
        name: np.ascontiguousarray(np.swapaxes(x, 1, 2)) if ".mlp.experts." in name else x
        for name, x in stored.items()
    }
    for tensors in (stored, turned):
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        close(our_logits(read(tmp_path)[1]), torch_logits(theirs))


# ---------------------------------------------------------------- config.json
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "alias,family,spec",
    [
        ("kimi_k2", "deepseek_v3", None),
        ("qwen3_vl_text", "qwen3", {"max_length": 128_000, "theta": 500_000.0}),
        ("qwen2_5_vl_text", "qwen2", {"max_length": 32_768, "theta": 1_000_000.0}),
        ("qwen3_vl_moe_text", "qwen3_moe", None),
        ("gemma4_unified_text", "gemma4_text", {"max_length": 262_144, "theta": 1_000_000.0}),
    ],
)
def test_an_alias_is_read_and_exported_as_its_family(alias, family, spec):
    config, whole = text_model(SIZES | {"model_type": alias, "auto_map": {"AutoConfig": "a.B"}})
    assert whole is None and config["model_type"] == family
    assert config["architectures"] == [FAMILIES[family].architecture]
    if spec:
        read = spec_from_hf(config)
        assert {"max_length": read.max_length, "theta": read.rope.theta} == spec


def test_a_flat_config_of_a_multimodal_model_is_that_of_its_text_model():
    """Qwen2.5-VL on the hub."""
    config, whole = text_model(
        SIZES
        | {
            "model_type": "qwen2_5_vl",
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"depth": 32},
        }
    )
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert "vision_config" not in config and "rope_scaling" not in config
    spec = spec_from_hf(config)
    assert (spec.rope.type, spec.rope.theta, spec.tied) == ("default", 1e6, True)
    assert whole.rope(spec)["rope_parameters"]["mrope_section"] == [16, 24, 24]


def test_the_fields_that_gemma_leaves_to_its_config_class():
    """Gemma 3 4B on the hub names neither its vocabulary nor its heads."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    given = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    config, _ = text_model(given | {"torch_dtype": "bfloat16"})
    spec = spec_from_hf(config)
    theirs = transformers.Gemma3Config(text_config=dict(text)).text_config
    assert (
        theirs.vocab_size,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    ) == (spec.V, spec.N, spec.K, spec.H)
    assert spec.tied and spec.rope.factor == 8 and config["eos_token_id"] == [1, 106]


def test_a_text_model_of_another_family_is_refused_by_name():
    inside = SIZES | {"model_type": "mamba"}
    with pytest.raises(ModelError, match="mistral3 has the model_type 'mamba'.*mistral"):
        text_model({"model_type": "mistral3", "text_config": inside})


def test_a_text_model_is_no_part_of_a_whole_one(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder())
    with pytest.raises(ConfigError, match="this base is a text model: use --format=merged"):
        export_whole(model, base, tmp_path / "out")


def test_tensors_beside_the_model_are_written_as_they_are(hf_folder, trained, tmp_path):
    """Multi-token prediction, which vLLM reads; not the head of a tied model."""
    folder = hf_folder(tie_word_embeddings=True)
    path = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    more = {"mtp.fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    head = {"lm_head.weight": stored["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(stored | more | head, path, metadata={"format": "pt"})
    base, model = trained(folder)
    export_merged(model, base, tmp_path / "out")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(stored) | set(more)
    np.testing.assert_array_equal(written["mtp.fc.weight"], more["mtp.fc.weight"])
