import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from families import torch_class

from lljax.errors import ConfigError, ModelError
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.open import open_base
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize


def close(a, b):
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4)


def load(folder):
    model_type = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    return torch_class(model_type).from_pretrained(folder)


def run(commands):
    """The model that the printed commands make."""
    names = {}
    exec(commands, names)
    return names["model"]


def full(base):
    """A model of random weights, every one trainable."""
    model = Decoder(spec_from_hf(base.config))
    lora.mark_trainable(model)
    initialize(model, 1, deviation=0.3)
    return model


# ---------------------------------------------------------------- equal logits
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "family,tied",
    [
        ("llama", True),
        ("llama", False),
        ("mistral", False),
        ("qwen2", True),
        ("qwen3", True),
        ("qwen3", False),
        ("gemma3_text", True),
        ("phi3", False),
    ],
)
def test_merged_peft_and_split_give_our_logits(hf_folder, trained, logits, tmp_path, family, tied):
    base, model = trained(hf_folder(family, tied), "keep" if family == "phi3" else "linear")
    wanted = logits(model)
    export_merged(model, base, tmp_path / "merged", max_shard_bytes=30_000)
    merged = load(tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert merged.config.tie_word_embeddings is tied
    close(logits(merged), wanted)

    export_split(model, base, tmp_path / "split")
    plain = load(tmp_path / "split" / "base")
    assert np.abs(logits(plain) - wanted).max() > 1e-2  # the factors are not in it
    close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "split" / "adapter")), wanted)

    export_peft(model, base, tmp_path / "peft")
    rope = json.loads((tmp_path / "peft" / "rope.json").read_text())
    config = transformers.AutoConfig.from_pretrained(
        base.path, rope_parameters=rope["rope_parameters"]
    )
    adapted = transformers.AutoModelForCausalLM.from_pretrained(base.path, config=config)
    adapted = peft.PeftModel.from_pretrained(adapted, tmp_path / "peft")
    close(logits(adapted), wanted)
    together = adapted.merge_and_unload()
    close(logits(together), wanted)
    assert together.config.tie_word_embeddings is tied


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "export,rope_type",
    [
        (export_merged, "dynamic"),
        (export_merged, "yarn"),
        (export_split, "linear"),
        (export_peft, "keep"),
        (export_peft, "linear"),
        (export_peft, "yarn"),
    ],
)
def test_the_printed_commands_load_the_model_with_its_rope(
    hf_folder, trained, logits, tmp_path, export, rope_type
):
    base, model = trained(hf_folder(), rope_type)
    close(logits(run(export(model, base, tmp_path / "out"))), logits(model))


@pytest.mark.parametrize("export", [export_merged, export_peft, export_split])
def test_the_printed_lines_are_sound_for_any_path_and_warn_of_nothing_to_come(
    hf_folder, trained, tmp_path, export
):
    name = 'it\'s a "b"\n$(touch x)'
    base, model = trained(hf_folder(name=f"{name}/base"), "yarn", also_train=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        commands = export(model, base, tmp_path / name / "out")
        run(commands)
    served = next(line for line in commands.splitlines() if "vllm serve" in line)
    words = (
        subprocess.run(
            ["bash", "-c", "vllm() { printf '%s\\0' \"$@\"; }; " + served.removeprefix("# ")],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .split("\0")
    )
    assert Path(words[1]) == (
        base.folder
        if export is export_peft
        else tmp_path / name / "out" / "base"
        if export is export_split
        else tmp_path / name / "out"
    )
    assert words[words.index("--max-model-len") + 1] == "160" and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "rope_type,length,allows",
    [
        ("linear", 64, False),
        ("linear", 40, True),
        ("yarn", 64, True),
        ("yarn", 160, False),
        ("keep", 1 << 60, False),
    ],
)
def test_serving_an_adapter_raises_the_limit_of_the_bases_tokenizer(
    hf_folder, trained, tmp_path, rope_type, length, allows
):
    """vLLM: the smaller of positions and tokenizer, times the factor of linear."""
    folder = hf_folder(max_position_embeddings=160 if rope_type == "keep" else 64)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    base, model = trained(folder, rope_type, also_train=())
    assert (
        "# VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 vllm serve" in export_peft(model, base, tmp_path / "out")
    ) is allows


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "export,also_train,rslora,targets",
    [
        (export_peft, (), True, ("all-linear",)),
        (export_merged, ("norm",), True, (r"self_attn\.[qk]_proj",)),
        (export_peft, ("norm",), False, ("o_proj",)),
        (export_split, ("embed", "head"), False, ("o_proj",)),
        (export_peft, ("embed", "head"), False, ("o_proj",)),
    ],
)
def test_whatever_trained_is_exported(
    hf_folder, trained, logits, tmp_path, export, also_train, rslora, targets
):
    base, model = trained(
        hf_folder("qwen3", tied=False), "keep", also_train, targets, rslora=rslora
    )
    commands = export(model, base, tmp_path / "out")
    if export is export_peft:  # its commands have a test of their own
        loaded = peft.PeftModel.from_pretrained(load(base.path), tmp_path / "out")
    else:
        loaded = run(commands)
    close(logits(loaded), logits(model))


def test_a_run_of_every_weight_is_exported_merged_only(hf_folder, logits, tmp_path):
    base = open_base(str(hf_folder(tied=False)))
    model = full(base)
    export_merged(model, base, tmp_path / "merged")
    close(logits(load(tmp_path / "merged")), logits(model))
    for export, name in ((export_peft, "peft"), (export_split, "split")):
        with pytest.raises(ConfigError, match=f"--format={name}.*--format=merged"):
            export(model, base, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_run_from_random_weights_needs_none_in_the_base(hf_folder, logits, tmp_path):
    folder = hf_folder()
    (folder / "model.safetensors").unlink()
    base = open_base(str(folder))
    model = full(base)
    export_merged(model, base, tmp_path / "merged", dtype="float32")
    close(logits(load(tmp_path / "merged")), logits(model))
    export_merged(model, base, tmp_path / "again")  # in whatever type config.json names


# ---------------------------------------------------------------- precision
def test_untouched_tensors_are_copied_bitwise_and_merged_ones_rounded_once(
    hf_folder, trained, tmp_path
):
    base, model = trained(
        hf_folder(dtype=torch.float16), also_train=(), targets=("q_proj",), dtype=jnp.bfloat16
    )
    export_merged(model, base, tmp_path / "out")
    out = open_base(str(tmp_path / "out"))
    lora_q = model.layers[0].self_attn.q_proj.lora
    a, b = np.asarray(lora_q.a[...]), np.asarray(lora_q.b[...])
    for name in out.names():
        assert out.dtype(name) == np.float16
        if "q_proj" in name:
            layer = int(name.split(".")[2])
            # Of the base's own weight: the bfloat16 copy that the run computed with has lost three
            # of its bits.
            exact = base.read(name).astype(np.float32) + 2.0 * (a[layer] @ b[layer]).T
            np.testing.assert_allclose(out.read(name), exact, rtol=1e-3, atol=1e-6)
        else:
            assert out.read(name).tobytes() == base.read(name).tobytes(), name


def test_the_config_names_the_type_of_the_weights(example, tmp_path):
    base, model = example
    export_merged(model, base, tmp_path / "out", dtype="bfloat16")
    assert open_base(str(tmp_path / "out")).dtype("model.norm.weight") == jnp.bfloat16
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("export,out", [(export_merged, "."), (export_split, "base")])
def test_trained_weights_of_a_bfloat16_base_are_whole_in_float32_and_else_the_rounding_is_said(
    hf_folder, trained, logits, tmp_path, export, out
):
    base, model = trained(hf_folder(tied=False, dtype=torch.bfloat16), "keep", targets=("q_proj",))
    commands = export(model, base, tmp_path / "whole", dtype="float32")
    assert "rounded" not in commands
    whole = run(commands)
    assert whole.dtype == torch.float32
    close(logits(whole), logits(model))
    commands = export(model, base, tmp_path / "rounded")
    assert "Trained weights are rounded to bfloat16" in commands
    off = np.abs(logits(run(commands)) - logits(model)).max()
    assert 1e-3 < off < 0.5


def test_a_type_that_is_none_and_one_for_an_adapter_are_refused(example, tmp_path):
    base, model = example
    for export in (export_merged, export_split):
        with pytest.raises(ConfigError, match="--dtype=int8 is none of float32, bfloat16, float16"):
            export(model, base, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="--dtype=bfloat16: an adapter is written in float32"):
        export_peft(model, base, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("export", [export_merged, export_peft, export_split])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_exported(hf_folder, trained, tmp_path, export, value):
    base, model = trained(hf_folder())
    lora_b = model.layers[0].self_attn.q_proj.lora.b
    lora_b.set_value(lora_b.get_value().at[0, 0, 0].set(value))
    with pytest.raises(ConfigError, match="q_proj.*not finite.*--step"):
        export(model, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_a_type_are_not_exported_in_it(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder(tied=False))
    model.norm.weight.set_value(model.norm.weight.get_value().at[0].set(1e5))
    with pytest.raises(
        ConfigError, match="'model.norm.weight' is not finite in float16: use --dtype=bfloat16"
    ):
        export_merged(model, base, tmp_path / "out", dtype="float16")
    export_merged(model, base, tmp_path / "out", dtype="bfloat16")


# ---------------------------------------------------------------- what servers read
@pytest.mark.parametrize("rope_type,positions", [("linear", 64), ("dynamic", 64), ("yarn", 160)])
def test_config_and_tokenizer_have_the_lengths_that_vllm_reads(
    hf_folder, trained, tmp_path, rope_type, positions
):
    """vLLM multiplies by the factor of linear and dynamic, and of yarn not; the tokenizer's length
    caps all three.
    """
    base, model = trained(hf_folder(), rope_type)
    export_merged(model, base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == positions
    for form in (config["rope_parameters"], config["rope_scaling"]):
        assert (
            form["rope_type"] == rope_type
            and isinstance(form["factor"], float)
            and form["factor"] == 3.0
        )
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert config["rope_parameters"].get("original_max_position_embeddings") == (
        64 if rope_type == "yarn" else None
    )
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"]
        == 160
    )


@pytest.mark.parametrize("rank,allowed", [(4, 8), (16, 16), (17, 32)])
def test_the_serve_command_raises_the_rank_to_one_that_vllm_allows(
    hf_folder, trained, tmp_path, rank, allowed
):
    base, model = trained(hf_folder(), rank=rank)
    commands = export_split(model, base, tmp_path / "out")
    assert f"--max-lora-rank {allowed} " in commands and "--max-model-len 160" in commands


def test_the_split_adapter_is_one_that_vllm_takes(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder("qwen3"))
    export_split(model, base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert Path(config["base_model_name_or_path"]) == tmp_path / "out" / "base"


def test_the_peft_commands_say_that_vllm_refuses_trained_embeddings(
    example, hf_folder, trained, tmp_path
):
    assert "--format=split" in export_peft(example.model, example.base, tmp_path / "whole")
    base, model = trained(hf_folder(), also_train=())
    assert "--format=split" not in export_peft(model, base, tmp_path / "factors")


# ---------------------------------------------------------------- the folder
def test_a_base_that_is_itself_an_export_is_not_replaced(example, trained, tmp_path):
    export_split(example.model, example.base, tmp_path / "first")
    base, model = trained(tmp_path / "first" / "base")
    for out in (tmp_path / "first", tmp_path / "first" / "base", tmp_path):
        with pytest.raises(ConfigError, match="holds the base of the run"):
            export_merged(model, base, out, overwrite=True)


def test_the_current_folder_may_be_the_target(example, tmp_path, monkeypatch):
    base, model = example
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_merged(model, base, Path("."))
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_nothing_half_written_stays_when_a_write_fails(example, tmp_path, monkeypatch):
    base, model = example

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for export in (export_merged, export_peft, export_split):
        with pytest.raises((OSError, ConfigError)):
            export(model, base, tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_a_base_without_a_tokenizer_is_noticed_and_leaves_nothing(hf_folder, trained, tmp_path):
    folder = hf_folder()
    base, model = trained(folder)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        export_merged(model, base, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_the_base_itself_is_not_changed(hf_folder, trained, tmp_path):
    folder = hf_folder()
    shutil.copytree(folder, tmp_path / "copy")
    base, model = trained(folder)
    export_split(model, base, tmp_path / "out")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


# ---------------------------------------------------------------- experts
EXPERTS = ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3", "llama4_text", "gpt_oss"]
EXPERTS += ["mistral4", "minimax_m2", "ernie4_5_moe"]


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_a_merged_model_with_experts_gives_our_logits(hf_folder, trained, logits, tmp_path, family):
    rope_type = "yarn" if family == "mistral4" else "linear"
    base, model = trained(hf_folder(family, False), rope_type, targets=("all-linear",))
    command = export_merged(model, base, tmp_path / "merged", max_shard_bytes=100_000)
    close(logits(load(tmp_path / "merged")), logits(model))
    close(logits(run(command)), logits(model))


@pytest.mark.slow
def test_the_text_model_of_one_that_sees_is_read_and_its_adapter_goes_back(
    hf_folder, trained, logits, tmp_path
):
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 14,
        "vision_output_dim": 16,
        "image_size": 28,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    folder = hf_folder("llama4_text", False)
    text = transformers.Llama4TextConfig.from_pretrained(folder).to_dict()
    both = transformers.Llama4Config(text_config=text, vision_config=vision)
    transformers.Llama4ForConditionalGeneration(both).save_pretrained(folder)
    base, model = trained(
        folder, "keep", targets=("q_proj", r"feed_forward\.shared_expert\.down_proj"), also_train=()
    )
    export_merged(model, base, tmp_path / "merged")
    close(logits(load(tmp_path / "merged")), logits(model))
    close(logits(run(export_peft(model, base, tmp_path / "peft"))), logits(model))
    (folder / "config.json").write_text('{"model_type": "llama4"}')
    with pytest.raises(ModelError, match="'llama4' needs an object text_config"):
        open_base(str(folder))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "family,targets,named",
    [
        (
            "qwen2_moe",
            ("gate_proj", "up_proj"),
            "does not load factors of the experts of a qwen2_moe model",
        ),
        (
            "llama4_text",
            ("down_proj",),
            "does not load factors of the experts of a llama4_text model",
        ),
        (
            "deepseek_v3",
            ("q_b_proj", "down_proj"),
            r"takes mlp\.down_proj of a deepseek_v3 model for a part of its experts",
        ),
        ("qwen3_moe", ("gate_proj",), "adapts gate_proj and up_proj of experts together"),
    ],
)
def test_adapters_that_peft_would_read_in_another_way_are_refused(
    hf_folder, trained, tmp_path, family, targets, named
):
    base, model = trained(hf_folder(family, False), targets=targets)
    with pytest.raises(ConfigError, match=f"{named}.*--format=merged"):
        export_peft(model, base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
