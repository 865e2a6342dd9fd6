import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from families import TOKENS
from flax import nnx
from safetensors.torch import load_file, save_file

from lljax.build import adapted_spec, build_model, open_run_base, open_run_config
from lljax.config import default_config
from lljax.errors import ModelError
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.huggingface import hf_names, hf_value, load_weights
from lljax.interop.open import open_base
from lljax.interop.peft import (
    PREFIX,
    load_adapter,
    read_adapter_config,
    under_adapter,
    write_adapter,
)
from lljax.models import lora, patterns
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.parallel import sharding
from lljax.run.restore import load_adapted_base

TARGETS = ("q_proj", "v_proj", "down_proj")


def torch_adapter(base, folder, **fields):
    """An adapter as PEFT itself makes and saves it, every trained weight moved at random; returns
    its model.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **fields
    )
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def attached(base_folder, config, **changes):
    base = open_base(str(base_folder))
    model = Decoder(spec_from_hf(base.config))
    lora.attach(
        model,
        **(
            dict(
                rank=config.rank,
                alpha=config.alpha,
                targets=config.targets,
                rslora=config.rslora,
                also_train=config.also_train,
                rank_pattern=config.rank_pattern,
                alpha_pattern=config.alpha_pattern,
                dora=config.dora,
            )
            | changes
        ),
    )
    load_weights(model, base, dtype=jnp.float32)
    return model


def edit(folder, **fields):
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def config_folder(tmp_path):
    """A folder with the adapter_config.json of PEFT 0.21 and no factors."""
    peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj"]
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def adapter(hf_folder, trained, tmp_path):
    """The folder of a base, and that of an adapter of it made here: rank 4, alpha 8."""
    base, model = trained(hf_folder(), "keep")
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", base_name=base.path)
    return Path(base.path), tmp_path / "adapter"


# ---------------------------------------------------------------- adapters of PEFT
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "family,fields",
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        (
            "qwen3",
            {
                "target_modules": r".*layers\.\d+\.self_attn\.(q|k)_proj",
                "modules_to_save": ["norm"],
            },
        ),
        ("llama", {"target_modules": ["self_attn.o_proj"], "lora_dropout": 0.1}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 2}}),
        (
            "qwen3",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 2, "mlp.*": 7, r"self_attn\.[kv]_proj": 3},
                "alpha_pattern": {"up_proj": 5, "q_proj": 3},
                "use_rslora": True,
            },
        ),
    ],
    ids=str,
)
def test_adapters_made_by_peft_give_its_logits(hf_folder, tmp_path, logits, family, fields):
    base = hf_folder(family, tied=False, num_hidden_layers=3)
    theirs = torch_adapter(base, tmp_path / "adapter", **fields)
    model = attached(base, read_adapter_config(tmp_path / "adapter"))
    load_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)


def test_a_tied_adapter_of_peft_gives_its_logits(hf_folder, tmp_path, logits):
    base = hf_folder(tied=True)
    theirs = torch_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    model = attached(base, read_adapter_config(tmp_path / "adapter"))
    load_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)


# PEFT leaves the table that is not named as the base has it: head and embedding are two from there
# on.
PARTED = {
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "factors of both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "head and factors of the embedding": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "by a regular expression": {"target_modules": r"(.*\.q_proj)|(model\.embed_tokens)"},
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == "embedding" else pytest.mark.slow) for case in PARTED],
)
def test_an_adapter_that_parts_a_tied_head_from_its_embedding(hf_folder, tmp_path, logits, case):
    """Logits and gradients are PEFT's, and so are the logits of what is exported and of a run that
    goes on from it.
    """
    folder = hf_folder(tied=True)
    theirs = torch_adapter(folder, tmp_path / "adapter", **PARTED[case])
    base = under_adapter(open_base(str(folder)), tmp_path / "adapter")
    model = load_adapted_base(base, tmp_path / "adapter", jnp.float32)
    wanted = logits(theirs)
    np.testing.assert_allclose(logits(model), wanted, atol=1e-4, rtol=1e-4)

    theirs(torch.from_numpy(TOKENS)).logits.square().mean().backward()
    grads = {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours = {
        PREFIX + name: hf_value(variable, i)
        for _, variable in declared(gradient(model))
        if variable.get_metadata("trainable")
        for i, name in enumerate(hf_names(variable))
    }
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(
            ours[name], grad, atol=1e-4 * np.abs(grad).max(), rtol=1e-3, err_msg=name
        )

    export_peft(model, base, tmp_path / "peft")
    export_merged(model, base, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    export_split(model, base, tmp_path / "split")
    split = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "split" / "base")
    for exported in (
        peft.PeftModel.from_pretrained(plain, tmp_path / "peft"),
        merged,
        peft.PeftModel.from_pretrained(split, tmp_path / "split" / "adapter"),
    ):
        np.testing.assert_allclose(logits(exported), wanted, atol=1e-4, rtol=1e-4)
    settings = read_adapter_config(tmp_path / "adapter")
    changes = {"lora__targets": settings.targets, "lora__also_train": settings.also_train}
    assert (
        open_run_config(configuration(folder, tmp_path / "adapter", **changes))[
            "tie_word_embeddings"
        ]
        is False
    )
    continued = build(folder, tmp_path / "adapter", **changes)
    np.testing.assert_allclose(logits(continued), wanted, atol=1e-4, rtol=1e-4)


def gradient(model):
    """The model with the gradients of the mean square of its logits in the place of what trains."""
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)

    @jax.jit
    def gradients(trainable):
        def loss(trainable):
            model = nnx.merge(graphdef, trainable, frozen)
            hidden = model(
                jnp.asarray(TOKENS),
                positions=jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape),
            )
            return jnp.mean(jnp.square(model.logits(hidden)))

        return jax.grad(loss)(trainable)

    return nnx.merge(graphdef, gradients(trainable), frozen)


def test_factors_that_a_tied_head_and_its_embedding_share_are_refused(hf_folder, tmp_path):
    base = hf_folder(tied=True)
    torch_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "embed_tokens"],
        ensure_weight_tying=True,
    )
    with pytest.raises(
        ModelError,
        match="ensure_weight_tying with 'embed_tokens' in target_modules is not supported",
    ):
        load_adapted_base(open_base(str(base)), tmp_path / "adapter", jnp.float32)


def test_a_tied_model_has_no_place_for_an_adapter_that_parts_its_head(hf_folder, tmp_path):
    base = hf_folder(tied=True)
    torch_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    model = attached(base, read_adapter_config(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="the head of a tied base or its embedding alone"):
        load_adapter(model, tmp_path / "adapter")


# ---------------------------------------------------------------- our own
def test_what_is_written_is_read_back_bitwise(adapter, hf_folder, trained):
    base, folder = adapter
    config = read_adapter_config(folder)
    assert (config.rank, config.alpha, config.rslora, config.also_train) == (
        4,
        8.0,
        False,
        ("embed", "norm"),
    )
    assert sorted(config.targets) == sorted(TARGETS)
    model = attached(base, config)
    load_adapter(model, folder)
    for (_, loaded), (_, wanted) in zip(
        declared(model), declared(trained(base, "keep").model), strict=True
    ):
        if loaded.get_metadata("trainable"):
            np.testing.assert_array_equal(loaded.get_value(), wanted.get_value())


def test_every_norm_that_peft_wraps_by_suffix_is_in_the_file(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder("qwen3"), also_train=("norm",))
    config = write_adapter(model, tmp_path, base_name=base.path)
    wrapped = {
        name
        for name, _ in transformers.AutoModelForCausalLM.from_pretrained(base.path).named_modules()
        if any(name.endswith(saved) for saved in config["modules_to_save"])
    }
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(wrapped) == 2 * 4 + 1
    assert {f"base_model.model.{name}.weight" for name in wrapped} <= set(stored)


def test_tied_embeddings_are_written_twice_and_tied(adapter):
    _, folder = adapter
    stored = load_file(folder / "adapter_model.safetensors")
    assert json.loads((folder / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    assert torch.equal(
        stored["base_model.model.lm_head.weight"],
        stored["base_model.model.model.embed_tokens.weight"],
    )


def test_target_names_cover_exactly_the_adapted_layers(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder(), targets=(r"mlp\.(up|gate)_proj", "v_proj"))
    write_adapter(model, tmp_path, base_name=base.path)
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base.path), tmp_path
    )
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in loaded.named_parameters()
        if "lora_A" in name
    }
    assert adapted == {"up_proj", "gate_proj", "v_proj"}


# ---------------------------------------------------------------- to continue from
def configuration(base, folder, **changes):
    c = default_config()
    c.model.path, c.model.dtype, c.context.rope.type, c.context.length = (
        str(base),
        "float32",
        "keep",
        64,
    )
    c.lora.rank, c.lora.alpha, c.lora.targets, c.lora.adapter = 4, 8.0, TARGETS, str(folder)
    c.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return c


def build(base, folder, **changes):
    config = configuration(base, folder, **changes)
    return build_model(config, open_run_base(config), sharding.make_mesh(fsdp=-1))


@pytest.mark.sample(2)
def test_a_run_continues_from_an_adapter(adapter, trained, logits):
    base, folder = adapter
    np.testing.assert_allclose(
        logits(build(base, folder)), logits(trained(base, "keep").model), atol=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__alpha": 64.0},
        {"lora__rslora": True},
        {"lora__alpha_pattern": (("v_proj", 16),)},
        {"lora__dora": True},
    ],
    ids=str,
)
def test_a_scale_other_than_the_adapters_is_refused(adapter, changes):
    base, folder = adapter
    with pytest.raises(ModelError, match="adapter has alpha=8.0, rslora=False and dora=False: set"):
        build(base, folder, **changes)


@pytest.mark.parametrize(
    "changes,line",
    [
        ({"lora__rank": 8}, "has shape"),
        ({"lora__targets": ("q_proj",)}, "no place"),
        ({"lora__targets": (*TARGETS, "up_proj")}, "missing"),
        ({"lora__also_train": ()}, "no place"),
    ],
    ids=str,
)
def test_another_configuration_than_the_adapters_is_refused(adapter, changes, line):
    base, folder = adapter
    with pytest.raises(ModelError, match=line):
        build(base, folder, **changes)


def test_a_run_refuses_an_adapter_with_features_it_does_not_compute(adapter):
    base, folder = adapter
    edit(folder, use_qalora=True)
    with pytest.raises(ModelError, match="use_qalora"):
        build(base, folder)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0]},
        {"lora_bias": True},
        {"trainable_token_indices": [3]},
        {"layer_replication": [[0, 1]]},
        {"exclude_modules": ["q_proj"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [1, 2]},
        {"target_parameters": ["weight"]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
    ],
    ids=str,
)
def test_what_changes_the_mathematics_is_refused_by_name(config_folder, fields):
    edit(config_folder, **fields)
    with pytest.raises(ModelError, match=next(iter(fields))):
        read_adapter_config(config_folder)


@pytest.mark.parametrize("initialization", [True, False, "gaussian", None])
def test_initializations_that_leave_the_base_alone_are_taken(config_folder, initialization):
    edit(config_folder, init_lora_weights=initialization)
    read_adapter_config(config_folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": None},
        {"r": "many"},
        {"r": -3},
        {"lora_alpha": None},
        {"target_modules": [3]},
        {"target_modules": None},
        {"modules_to_save": [3]},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": ["score"]},
        {"r": 8.5},
        {"r": True},
        {"r": 1 << 40},
        {"lora_alpha": float("nan")},
        {"target_modules": {"q_proj": 1}},
        {"use_rslora": "false"},
        {"use_dora": [1]},
        {"ensure_weight_tying": 2},
        {"alpha_pattern": {"q_proj": float("inf")}},
        {"peft_type": ["LORA"] * 1000},
        {"rank_pattern": 3},
        {"rank_pattern": {"q_proj": "many"}},
        {"alpha_pattern": ["q_proj"]},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_one_line(config_folder, fields):
    edit(config_folder, **fields)
    with pytest.raises(ModelError, match="adapter_config.json"):
        read_adapter_config(config_folder)


@pytest.mark.parametrize(
    "fields,line",
    [
        ({"target_modules": ["*_proj"]}, r"'\*_proj' is no regular expression"),
        ({"target_modules": "(a+"}, "is no regular expression"),
        ({"target_modules": "([a-z_.0-9]+)+!"}, "is not done with the names of the layers"),
        ({"rank_pattern": {"(.*)*!": 3}}, "is not done with the names of the layers"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "layers are adapted all or none"),
    ],
    ids=str,
)
def test_a_pattern_of_an_adapter_that_cannot_be_is_one_line(adapter, monkeypatch, fields, line):
    base, folder = adapter
    edit(folder, **fields)
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(ModelError, match=line) as refusal:
        load_adapted_base(open_base(str(base)), folder, jnp.float32)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "content,line",
    [
        ({"model_type": "qwen2"}, "model_type is no field of a RoPE"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps is no field of a RoPE"),
        ({"rope_parameters": [1]}, r"rope.json: rope_parameters is \[1\]"),
        ({"rope_theta": {}}, "rope.json: rope_theta is {}"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "rope.json: .*rope_type is {'a': 1}"),
        ({"max_position_embeddings": "64"}, "rope.json: max_position_embeddings is '64'"),
    ],
    ids=str,
)
def test_a_rope_json_holds_a_rope(adapter, content, line):
    base, folder = adapter
    (folder / "rope.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=line):
        adapted_spec(open_base(str(base)), folder)


def test_factors_of_a_pickle_are_not_read(adapter):
    base, folder = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    model = attached(base, read_adapter_config(folder))
    with pytest.raises(ModelError, match="adapter_model"):
        load_adapter(model, folder)


def test_a_missing_factor_is_named(adapter):
    base, folder = adapter
    stored = load_file(folder / "adapter_model.safetensors")
    del stored["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(stored, folder / "adapter_model.safetensors")
    model = attached(base, read_adapter_config(folder))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.lora_B.*missing"):
        load_adapter(model, folder)


def test_factors_that_are_no_floating_point_numbers_are_refused(adapter):
    base, folder = adapter
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file(stored | {name: stored[name].long()}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="q_proj.lora_B.weight' is int64"):
        load_adapter(attached(base, read_adapter_config(folder)), folder)


def test_what_the_adapter_does_not_hold_starts_from_the_base(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder(), "keep", also_train=())
    write_adapter(model, tmp_path, base_name=base.path)
    model = attached(base.path, read_adapter_config(tmp_path), also_train=("embed",))
    load_adapter(model, tmp_path)
    initialize(model, 0)
    np.testing.assert_array_equal(model.embed.get_value(), base.read("model.embed_tokens.weight"))
