import importlib.util
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lljax.config import (
    CHECKS,
    default_config,
    flat,
    get,
    validate,
    warmup_steps,
    with_absolute_paths,
)
from lljax.config.checks import BELOW_ONE, HUGE
from lljax.errors import ConfigError, short

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def good():
    c = default_config()
    c.model.path, c.data.train = "base", ("docs.jsonl",)
    return c


def ratios(*roles):
    """Changes by which these roles do not learn."""
    return {f"optimizer.learning_rate_ratio.{role}": 0.0 for role in roles}


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
        ({"data.max_row_bytes": 0}, "data.max_row_bytes=0 is not a whole number from 1024"),
        ({"training.eval_every": 5}, "nothing to evaluate"),
        ({"training.eval_tasks": (("needle", 64),)}, "training.eval_tasks=.*nothing to evaluate"),
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
            "model.quantize='int8' holds frozen",
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
        ({"model.path": ""}, "model.path is empty"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(changes, message):
    c = good()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as caught:
        validate(c)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- every field
BOMB = ["lol"] * 9
for _ in range(9):
    BOMB = [BOMB] * 9  # 9 ** 10 words, should anybody write them out
ODD = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -2,
    0,
    1,
    2,
    0.5,
    1.0,
    1e-300,
    1e300,
    2**31,
    10**30,
    10**10_000,
    True,
    False,
    None,
    "",
    "x",
    "x" * 10_000,
    "\0",
    "a\nb\x1b[31m",
    "\ud800",
    b"x",
    (),
    (1,),
    ("x",),
    ((1, 2, 3),),
    [],
    ["x", 1],
    {},
    {"a": 1},
    BOMB,
    object(),
    len,
    ConfigDict({"a": 1}),
)


def test_every_field_has_a_check():
    assert CHECKS.keys() == flat(default_config()).keys()


@pytest.mark.parametrize("field", CHECKS)
def test_odd_values_are_refused_in_one_short_line_or_legal(field):
    usual = get(default_config(), field)
    for value in ODD:
        try:
            CHECKS[field](field, value)
        except ConfigError as error:
            assert field in str(error) and len(str(error)) < 400 and str(error).isprintable()
            continue
        assert not isinstance(value, float) or math.isfinite(value)
        if isinstance(usual, (bool, tuple, str)) and field != "context.rope.factor":
            assert isinstance(value, (type(usual), list)) and value != [BOMB]
        elif field != "context.rope.factor":
            assert isinstance(
                value, int if isinstance(usual, int) else (int, float)
            ) and not isinstance(value, bool)
            assert abs(value) <= (2**31 if isinstance(usual, int) else HUGE)


def test_the_defaults_are_legal():
    validate(good())


@pytest.mark.parametrize(
    "field,value",
    [
        ("optimizer.eps", 0.0),
        ("optimizer.eps", 1e-300),
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", 1.0),
        ("optimizer.beta2", 1 - 1e-9),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", math.inf),
        ("optimizer.weight_decay.kernel", math.nan),
        ("optimizer.learning_rate_ratio.lora_b", math.nan),
        ("optimizer.clip_norm", -1.0),
        ("alarm.stall_minutes", math.inf),
        ("alarm.spike_z", 0.0),
        ("mesh.data", 0),
        ("mesh.sequence", -2),
        ("seed", 2**31),
        ("lora.rank", 10**6),
        ("lora.alpha", 0.0),
        ("context.window", 2**31),
        ("context.length", 2**25),
        ("data.train", (1,)),
        ("data.train", ("",)),
        ("model.path", "a" * 5000),
        ("model.path", "a" * 300),
        ("optimizer.galore.scale", 0.0),
        ("training.neftune_alpha", math.nan),
    ],
)
def test_what_would_disable_or_break_a_run_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        CHECKS[field](field, value)


@pytest.mark.parametrize(
    "field,value",
    [
        ("optimizer.clip_norm", 0.0),
        ("optimizer.beta1", 0.0),
        ("optimizer.beta2", BELOW_ONE),
        ("mesh.fsdp", -1),
        ("alarm.stall_minutes", 0.0),
        ("context.group", 0.25),
        ("context.group", 512),
        ("seed", 2**31 - 1),
        ("context.rope.factor", "4"),
        ("context.rope.factor", 1.5),
        ("lora.init", "pissa_niter_16"),
        ("memory.tile", 0),
    ],
)
def test_what_is_at_the_bound_is_legal(field, value):
    CHECKS[field](field, value)


def test_a_tree_of_ones_own_is_told_how_to_begin():
    with pytest.raises(ConfigError, match="has no field .*default_config"):
        validate(ConfigDict({"seed": 1}))


@pytest.mark.parametrize(
    "steps,expected", [(1, 1), (8, 1), (20, 1), (240, 10), (500, 20), (5000, 20)]
)
def test_the_warm_up_fits_the_run(steps, expected):
    c = default_config()
    assert warmup_steps(c.optimizer, steps) == expected
    c.optimizer.warmup_steps = 3
    assert warmup_steps(c.optimizer, steps) == 3


def test_paths_of_what_is_there_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("docs.jsonl").touch()
    c = good()
    c.lora.adapter, c.training.eval_files.squad = "no/where", "docs.jsonl"
    s = with_absolute_paths(c)
    assert s.model.path == str(tmp_path / "base") and s.data.train == (
        str(tmp_path / "docs.jsonl"),
    )
    assert s.lora.adapter == "no/where" and s.training.eval_files.squad == str(
        tmp_path / "docs.jsonl"
    )
    assert c.model.path == "base" and with_absolute_paths(s).to_json() == s.to_json()


def test_short_never_writes_a_value_out():
    for value in ODD:
        assert len(short(value)) <= 120 and short(value).isprintable()
