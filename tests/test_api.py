"""The Python face: what a lora_config means, and what is refused."""

import logging

import numpy as np
import peft
import pytest
from conftest import write_base
from flax import nnx

import lljax
from lljax.config.tree import ADAPTER_ROLES
from lljax.errors import ConfigError
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.run import loop
from lljax.training.rule import learning_rate

POSITIONS = np.arange(12)[None]


@pytest.fixture
def base(tiny):
    return lljax.prepare_model(tiny)[0]


@pytest.fixture(scope="module")
def untouched(tiny):
    """A base for tests in which nothing comes of it."""
    return lljax.prepare_model(tiny)[0]


@pytest.fixture(scope="module")
def prepared(tiny):
    return lljax.prepare_model(tiny, {"r": 4})[0]


def logits(model):
    tokens = np.random.default_rng(0).integers(0, 300, size=(1, 12))
    return np.asarray(model.logits(model(tokens, positions=POSITIONS)))


def trains(model):
    roles = {v.get_metadata("role") for _, v in nnx.iter_graph(model) if lora.is_trainable((), v)}
    return roles - set(ADAPTER_ROLES)


def test_every_field_of_a_peft_config_is_used(base):
    given = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules={"v_proj", "q_proj"},
        lora_dropout=0.1,
        use_rslora=True,
        use_dora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 3},
        modules_to_save=["norm"],
        task_type="CAUSAL_LM",
    )
    attention = lljax.prepare_model(base, given).layers[0].self_attn
    q, v = attention.q_proj.lora, attention.v_proj.lora
    assert (q.rank, q.alpha, v.rank, v.alpha) == (4, 3.0, 2, 6.0)
    assert (
        q.rslora and q.dropout == 0.1 and q.magnitude is not None and attention.k_proj.lora is None
    )
    assert trains(base) == {"norm"}
    settings = dict(base.settings)
    # of a set, in the order of no hash seed
    assert settings["lora.targets"] == ("q_proj", "v_proj")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_that_start_from_the_base_leave_the_model_as_it_was(base, init):
    before = logits(base)
    kernel = np.asarray(base.layers[0].self_attn.q_proj.kernel[...])
    model = lljax.prepare_model(
        base, {"r": 4, "init_lora_weights": init, "target_modules": "all-linear"}
    )
    assert np.abs(np.asarray(model.layers[0].self_attn.q_proj.kernel[...]) - kernel).max() > 0.01
    np.testing.assert_allclose(logits(model), before, atol=1e-4)


def test_longlora_stretches_by_yarn_and_trains_embeddings_and_norms(base):
    model = lljax.prepare_model(base, {"use_longlora": True, "longlora_scaling_factor": 4})
    assert (model.spec.rope.type, model.spec.rope.factor, model.spec.max_length) == (
        "yarn",
        4.0,
        128,
    )
    assert trains(model) == {"embed", "norm"}


def test_a_factor_that_would_shorten_the_model_is_refused(tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    model, _ = lljax.prepare_model(write_base(tmp_path / "base", rope_scaling=llama3))  # reads 32
    with pytest.raises(ConfigError, match="the 8 tokens .* to 16, and the model reads 32"):
        lljax.prepare_model(model, {"use_longlora": True, "longlora_scaling_factor": 2})
    lljax.prepare_model(model, {"use_longlora": True, "longlora_scaling_factor": 8})
    assert (model.spec.rope.type, model.spec.max_length) == ("yarn", 64)


@pytest.mark.parametrize(
    "given,message",
    [
        (peft.LoraConfig(bias="all"), "bias='all' is not supported"),
        (peft.LoraConfig(layers_to_transform=[0]), r"layers_to_transform=\[0\] is not supported"),
        (peft.LoraConfig(exclude_modules=["q_proj"]), "exclude_modules=.* is not supported"),
        (
            peft.LoraConfig(init_lora_weights="gaussian"),
            "init_lora_weights='gaussian' is not supported",
        ),
        (
            peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]),
            "peft_type=.*only LORA is trained",
        ),
        ({"layers_to_transform": 0}, "layers_to_transform=0 is not supported"),
        ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM is trained"),
        ({"lora_rnak": 8}, "unknown field 'lora_rnak': did you mean"),
        ({"r": 0}, "lora.rank=0 is not a whole number"),
        ({"r": 10**5000}, "lora.rank=<an integer of .* bits>"),
        ({"rank_pattern": {"nowhere": 4}}, "matches no adapted layer"),
        ({"modules_to_save": ["mlp"]}, "'mlp' is none of embed_tokens, lm_head, norm"),
        ({"longlora_scaling_factor": 2}, "needs use_longlora=True"),
        (
            {"use_longlora": True, "longlora_scaling_factor": float("nan")},
            "scaling_factor=nan is not a number",
        ),
        ({"target_modules": []}, "nothing would train"),
        (3, "neither a mapping nor a peft.LoraConfig"),
    ],
)
def test_what_a_lora_config_cannot_mean_is_refused(untouched, given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        lljax.prepare_model(untouched, given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "lora.rank" not in dict(untouched.settings)  # it can be prepared again


def test_a_config_as_peft_writes_it_is_read(base):
    lljax.prepare_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict())
    assert base.layers[0].self_attn.q_proj.lora.rank == 4


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"steps": 0}, "steps=0"),
        ({"length": 1.5}, "length=1.5"),
        ({"data": 3}, r"data.train\[0\]=3"),
        ({"lora__rank": 8}, "lora.rank is set by prepare_model"),
        ({"optimizer__lr": 1e-4}, "did you mean 'optimizer.learning_rate'"),
        ({"optimizer__eps": 0.0}, "optimizer.eps=0.0 is not a number above 0"),
        ({"optimizer__warmup_steps": 9}, "warmup_steps=9.*ends at step 4"),
    ],
)
def test_what_cannot_be_trained_is_refused(prepared, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        lljax.train(prepared, **({"data": "docs.jsonl", "workdir": tmp_path, "steps": 4} | fields))


@pytest.mark.parametrize("model", [Decoder, None])
def test_a_model_without_adapters_is_refused(untouched, model, tmp_path):
    with pytest.raises(ConfigError, match="has no adapters"):
        lljax.train(model or untouched, data="docs.jsonl", workdir=tmp_path, steps=4)


def test_the_default_warm_up_fits_a_short_run(prepared, documents, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        loop, "train", lambda config, workdir, model, **_: seen.append(config) or model
    )
    lljax.train(prepared, data=documents, workdir=tmp_path, steps=20)
    rate = learning_rate(seen[0].optimizer, 20)
    assert float(rate(0)) == pytest.approx(seen[0].optimizer.learning_rate)


def test_nobody_is_told_that_torch_is_missing():
    said, logger = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning("PyTorch was not found. Models won't be available and only tokenizers ...")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert said == ["something else"]


def test_dir_lists_the_functions_that_are_imported_on_first_use():
    assert set(lljax.__all__) <= set(dir(lljax))
