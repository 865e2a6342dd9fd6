"""Configurations that cannot work are refused, with the way out."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lljax.config import FIELDS, default_config, validate
from lljax.config.rules import CONFLICTS
from lljax.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def good():
    c = default_config()
    c.model.path, c.data.train = "base", ("docs.jsonl",)
    return c


def ratios(*roles):
    """Changes by which these roles do not learn."""
    return {f"optimizer.learning_rate_ratio.{role}": 0.0 for role in roles}


def test_the_defaults_are_legal():
    validate(good())


def test_tasks_are_evaluated_without_held_out_documents():
    c = good()
    c.training.eval_tasks, c.training.eval_every = (("passkey/tokens", 256),), 5
    validate(c)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem != "from_yaml"], ids=lambda p: p.stem
)
def test_every_shipped_config_is_legal(path):
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(path.stem, path)
    )
    module.__spec__.loader.exec_module(module)
    validate(module.get_config())


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"context.schedule": ((10, 64, "shifted"), (5, 128, "full"))},
            r"schedule\[1\].*previous ends at step 10",
        ),
        ({"context.schedule": ((10, 64, "shifted"), (20, 32, "full"))}, "do not get shorter"),
        ({"context.schedule": ((10, 64, "s2"),)}, "none of full, shifted, window"),
        ({"context.schedule": ((10, 9000, "full"),)}, "raise context.length"),
        (
            {"context.group": 7.0, "context.schedule": ((1, 64, "shifted"),)},
            "use an even number of tokens such as 8",
        ),
        ({"context.rope.type": "keep", "context.rope.factor": "4"}, "takes no factor"),
        ({"context.rope.factor": "0.5"}, "not a number from 1"),
        ({"model.init": "random"}, "frozen random base"),
        ({"lora.adapter": "x", "train_type": "full"}, "use train_type='lora'"),
        ({"data.valid_fraction": 0.1, "data.valid": ("v.jsonl",)}, "both hold documents out"),
        ({"data.train": (1,)}, r"data.train\[0\]=1 is not a path"),
        ({"data.valid": ("",)}, "data.valid"),
        ({"data.max_row_bytes": 0}, "data.max_row_bytes=0 is not a whole number from 1,024"),
        ({"training.eval_every": 5}, "nothing to evaluate"),
        (
            {"training.eval_tasks": ("needle", 64), "data.valid": ("v.jsonl",)},
            "'needle' is not a pair such as",
        ),
        (
            {"training.eval_tasks": (("needle", 9000),), "data.valid": ("v.jsonl",)},
            "more tokens than context.length=8192",
        ),
        (
            {
                "training.eval_tasks": (("needle", 64),),
                "data.valid": ("v.jsonl",),
                "mesh.sequence": 2,
            },
            "use mesh.sequence=1",
        ),
        (
            {"training.eval_files.squad": "dev.json"},
            "training.eval_files.squad='dev.json' and training.eval_tasks=()",
        ),
        ({"optimizer.schedule": "cos"}, "none of linear, cosine, constant"),
        ({"optimizer.name": "sgd"}, "none of adamw, adafactor"),
        (
            {"optimizer.name": "lion", "optimizer.eps": 1e-6},
            "optimizer.eps=1e-06 and.*'lion', which does not read it",
        ),
        (
            {"optimizer.galore.rank": 8},
            "optimizer.galore.rank=8 and.*'adamw', which does not read it",
        ),
        ({"optimizer.name": "galore"}, "set train_type='full'"),
        (
            {"optimizer.name": "q_galore"},
            "optimizer.name='q_galore' and train_type='lora'.*set train_type='full'",
        ),
        (
            {"optimizer.name": "q_galore", "train_type": "full", "memory.remat": "none"},
            "memory.remat='none'.*'q_galore'",
        ),
        (
            {"optimizer.name": "q_galore", "train_type": "full", "model.quantize": "int8"},
            "model.quantize='int8'.*train_type='full' has none",
        ),
        ({"lora.dropout": 1.0}, "from 0 to below 1"),
        ({"lora.dora": True, "train_type": "full"}, "lora.dora=True.*train_type='full' has none"),
        (
            {"model.matmul": "fp8", "train_type": "full"},
            "model.matmul='fp8'.*train_type='full' has none",
        ),
        (
            {"lora.init": "loftq"},
            "lora.init='loftq'.*model.quantize='none'.*set model.quantize='nf4'",
        ),
        ({"lora.init": "pizza"}, "none of default, pissa"),
        ({"lora.init": "pissa", "lora.adapter": "x"}, "use lora.init='default'"),
        (
            {"lora.rank_pattern": (("q_proj", 0),)},
            r"lora.rank_pattern\[0\]\[1\]=0 is not a whole number from 1",
        ),
        ({"lora.alpha_pattern": ("q_proj", 3)}, "'q_proj' is not a pair such as"),
        ({"lora.targets": (), "lora.also_train": ()}, "nothing would train"),
        (
            {"lora.also_train": (), **ratios("lora_a", "lora_b")},
            "lora_a, lora_b.*nothing would be learned",
        ),
        (
            {"train_type": "full", **ratios("embed", "norm", "head", "kernel", "bias", "router")},
            "nothing would be learned",
        ),
        ({"optimizer.warmup_steps": 1000}, "warmup_steps=1000.*ends at step 1000"),
        ({"training.rows": 1000, "training.accumulate": 1000}, "8,192,000,000 tokens a step"),
        ({"model.path": ""}, "model.path is empty: name a hub id"),
        ({"data.train": ()}, "data.train is empty: name JSONL files"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(changes, message):
    c = good()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as caught:
        validate(c)
    assert "\n" not in str(caught.value)


def test_a_tree_without_the_fields_is_refused():
    with pytest.raises(ConfigError, match="has no field .*default_config"):
        validate(ConfigDict({"seed": 1}))


def test_conflicts_name_fields_that_exist():
    assert {field for conflict in CONFLICTS for field in conflict.conditions} <= FIELDS.keys()


def test_an_unknown_field_is_refused():
    c = good()
    with c.unlocked():
        c.lora.rnak = 3
    with pytest.raises(ConfigError, match="no config field 'lora.rnak'"):
        validate(c)
