"""Every kind of adapter: loaded by PEFT it gives our logits, and PEFT's autograd our gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from lljax.errors import ConfigError
from lljax.interop.adapter_init import ResidualBase
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.huggingface import hf_names, hf_value
from lljax.interop.peft import PREFIX
from lljax.models import lora
from lljax.models.declare import LoraWeight, declared

TOKENS = np.random.default_rng(2).integers(0, 128, (2, 40))
ALL = ("all-linear",)
VARIANTS = {
    "patterns": dict(
        targets=ALL,
        rank_pattern=(("q_proj", 7), (r"mlp\..*", 2)),
        alpha_pattern=(("down_proj", 3.0),),
    ),
    "dora": dict(targets=ALL, dora=True),
    "dora patterns": dict(targets=("q_proj", "v_proj"), rank_pattern=(("q_proj", 7),), dora=True),
    "tables": dict(
        targets=("q_proj", "embed_tokens", "lm_head"),
        rank_pattern=(("lm_head", 6), ("embed_tokens", 3)),
    ),
    "pissa": dict(targets=ALL, init="pissa"),
    "pissa_niter_2 patterns rslora dora": dict(
        targets=("q_proj", "v_proj"),
        init="pissa_niter_2",
        dora=True,
        rslora=True,
        rank_pattern=(("q_proj", 7),),
    ),
    "olora": dict(targets=ALL, init="olora"),
    "patterns rslora": dict(
        targets=("q_proj", "v_proj"), rank_pattern=(("q_proj", 7),), rslora=True
    ),
}


def gradients(model):
    """Those of the mean square of the logits, by PEFT's name of the factor."""
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)

    @jax.jit
    def gradient(trainable, frozen):
        def loss(trainable):
            model = nnx.merge(graphdef, trainable, frozen)
            hidden = model(
                jnp.asarray(TOKENS),
                positions=jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape),
            )
            return jnp.mean(jnp.square(model.logits(hidden)))

        return jax.grad(loss)(trainable)

    return {
        name: hf_value(variable, i)
        for _, variable in declared(nnx.merge(graphdef, gradient(trainable, frozen), frozen))
        if isinstance(variable, LoraWeight)
        for i, name in enumerate(hf_names(variable))
    }


def gradients_of_peft(model):
    model(torch.from_numpy(TOKENS)).logits.square().mean().backward()
    grads = {
        name.removeprefix(PREFIX): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" in name
    }
    return {
        name.replace("vector.default.weight", "vector").replace(".default", ""): grad
        for name, grad in grads.items()
    }


def load(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base.path)


@pytest.mark.sample(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_gives_our_logits_and_gradients(hf_folder, trained, logits, tmp_path, variant):
    base, model = trained(
        hf_folder("qwen2", tied=False), "keep", also_train=(), **VARIANTS[variant]
    )
    export_peft(model, base, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "peft", is_trainable=True)
    np.testing.assert_allclose(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    ours, wanted = gradients(model), gradients_of_peft(theirs)
    assert ours.keys() == wanted.keys()
    for name in wanted:
        # of twice the rank where the base was restored
        grad = wanted[name][tuple(map(slice, ours[name].shape))]
        np.testing.assert_allclose(
            ours[name], grad, atol=1e-4 * np.abs(grad).max(), rtol=1e-3, err_msg=name
        )


@pytest.mark.sample(3)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_checkpoint_gives_our_logits(hf_folder, trained, logits, tmp_path, variant):
    base, model = trained(hf_folder(tied=False), "keep", also_train=("norm",), **VARIANTS[variant])
    export_merged(model, base, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "variant",
    [
        dict(targets=ALL, dora=True, rank_pattern=(("q_proj", 2),)),
        dict(targets=("q_proj", "down_proj"), init="pissa", dora=True),
    ],
    ids=["all", "some rows"],
)
def test_adapters_of_layers_that_are_one_in_hf(hf_folder, trained, logits, tmp_path, variant):
    base, model = trained(hf_folder("phi3", tied=False), "keep", also_train=(), **variant)
    export_peft(model, base, tmp_path / "peft")
    export_merged(model, base, tmp_path / "merged")
    for theirs in (
        peft.PeftModel.from_pretrained(load(base), tmp_path / "peft"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ):
        np.testing.assert_allclose(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


def test_experts_have_a_rank_of_their_own(hf_folder, trained, logits, tmp_path):
    base, model = trained(
        hf_folder("mixtral", tied=False),
        "keep",
        also_train=(),
        rank_pattern=(("q_proj", 3),),
        targets=("self_attn.q_proj", r".*\.experts\..*"),
    )
    export_peft(model, base, tmp_path / "peft")
    np.testing.assert_allclose(
        logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "peft")),
        logits(model),
        atol=1e-4,
        rtol=1e-4,
    )
    with pytest.raises(ConfigError, match="experts take plain LoRA.*lora.dora=True"):
        trained(base.path, "keep", targets=ALL, dora=True)


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_loftq_is_split_or_merged_with_its_own_kernels(
    hf_folder, trained, logits, tmp_path, family
):
    base, model = trained(
        hf_folder(family, tied=False),
        "keep",
        also_train=(),
        targets=ALL,
        init="loftq",
        quantize="nf4",
    )
    with pytest.raises(ConfigError, match="--format=peft.*use --format=split"):
        export_peft(model, base, tmp_path / "peft")
    export_split(model, base, tmp_path / "split")
    export_merged(model, base, tmp_path / "merged")
    split = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "split" / "base")
    for theirs in (
        peft.PeftModel.from_pretrained(split, tmp_path / "split" / "adapter"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ):
        np.testing.assert_allclose(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_and_what_the_kernel_keeps_start_as_in_peft(hf_folder, trained, init):
    """But for signs, which a decomposition leaves open."""
    base, model = trained(
        hf_folder(), "keep", also_train=(), targets=("q_proj", "down_proj"), init=init, rslora=True
    )
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=init,
        use_rslora=True,
    )
    started, layers = ResidualBase(base, model), 0
    for name, module in peft.get_peft_model(load(base), config).base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = started.factors(f"{name}.weight")
            theirs = module.lora_B["default"].weight @ module.lora_A["default"].weight
            np.testing.assert_allclose(b @ a, theirs.detach(), atol=1e-5)
            np.testing.assert_allclose(
                started.read(f"{name}.weight"), module.base_layer.weight.detach(), atol=1e-5
            )
            layers += 1
    assert layers == 4


def test_several_ranks_or_scales_are_not_split_for_a_server(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder(), **VARIANTS["patterns"])
    with pytest.raises(ConfigError, match="several ranks or scales.*--format=merged"):
        export_split(model, base, tmp_path / "out")
    assert "several ranks or scales" in export_peft(model, base, tmp_path / "peft")


def test_an_adapter_of_pissa_is_plain_lora_to_a_server(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder(), also_train=(), **VARIANTS["pissa"])
    assert "--max-lora-rank 8 " in export_split(model, base, tmp_path / "out")  # twice 4


def test_dora_is_not_split_for_a_server(hf_folder, trained, tmp_path):
    base, model = trained(hf_folder(), also_train=(), **VARIANTS["dora"])
    with pytest.raises(ConfigError, match="magnitudes of DoRA.*--format=merged"):
        export_split(model, base, tmp_path / "out")
