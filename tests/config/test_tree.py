"""The table of fields: its rows are complete; tree, identity, help and YAML follow from them."""

import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from lljax.config import (
    FIELDS,
    Field,
    default_config,
    differs,
    equals,
    flat,
    get,
    identity,
    validate,
    with_absolute_paths,
)
from lljax.config.checks import BELOW_ONE, HUGE, whole
from lljax.config.field_names import unknown_field
from lljax.config.flags import field_lines
from lljax.config.yaml import read
from lljax.errors import ConfigError, short


def good():
    c = default_config()
    c.model.path, c.data.train = "base", ("docs.jsonl",)
    return c


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


def test_every_row_is_a_leaf_of_the_tree_with_a_comment():
    assert flat(default_config()).keys() == FIELDS.keys()
    assert all(name == field.name and len(field.comment) > 4 for name, field in FIELDS.items())


def test_every_default_is_legal():
    for field in FIELDS.values():
        field(field.name, field.default)
    assert [f.name for f in FIELDS.values() if f.required] == ["model.path", "data.train"]


def test_only_the_rope_takes_another_type_than_its_default():
    c = default_config()
    c.context.rope.factor = 4
    with pytest.raises(TypeError):
        c.lora.rank = "x"


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_are_refused_in_one_short_line_or_legal(field):
    usual = get(default_config(), field)
    for value in ODD:
        try:
            FIELDS[field](field, value)
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
        FIELDS[field](field, value)


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
    FIELDS[field](field, value)


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


# ---------------------------------------------------------------- identity
# A run whose checkpoints hold these fields must resume.
IDENTITY = (
    *("seed", "train_type", "model.init", "model.dtype", "model.matmul", "model.quantize"),
    *("context", "lora", "data.packing", "data.overlong", "optimizer", "training.rows"),
    *("training.accumulate", "training.neftune_alpha", "training.router_aux_loss_coef"),
    *("alarm.nonfinite", "alarm.spike", "alarm.spike_z", "alarm.history", "alarm.max_bad_steps"),
)


@pytest.mark.parametrize("spike,also", [("warn", ()), ("rollback", ("checkpoint.every_steps",))])
def test_the_identity_of_a_run_is_as_in_its_checkpoints(spike, also):
    c = good()
    c.alarm.spike, c.lora.rank, c.context.rope.factor = spike, 5, 2
    expected = {}
    for name in (*IDENTITY, *also):
        value = get(c, name)
        expected |= flat(value, f"{name}.") if isinstance(value, ConfigDict) else {name: value}
    expected.pop("context.implementation", None)  # is later than such checkpoints, and may change
    assert identity(c) == expected and json.dumps(identity(c))


def test_a_field_that_does_not_say_whether_it_is_identity_cannot_be_made():
    with pytest.raises(TypeError, match="identity"):
        Field("training.toy", 1, "a toy", check=whole(0))


# ---------------------------------------------------------------- a field from outside
@pytest.fixture
def toy(monkeypatch):
    row = Field("training.toy", 1, "a toy", check=whole(0), identity=True, yaml="toy_level")
    monkeypatch.setitem(FIELDS, row.name, row)
    return row.name


def test_a_new_row_is_in_the_tree_the_help_the_yaml_the_rules_and_the_identity(toy, tmp_path):
    c = good()
    assert c.training.toy == 1 == identity(c)[toy]
    c.training.toy = 3
    validate(c)
    c.training.toy = -1
    with pytest.raises(ConfigError, match="training.toy=-1 is not a whole number"):
        validate(c)
    assert any(line.split() == [toy, "=", "1", "a", "toy"] for line in field_lines())
    assert "did you mean 'training.toy'" in unknown_field("training.tyo")
    (tmp_path / "run.yaml").write_text("toy_level: 7\nscheduler: {total_steps: 3}\n")
    assert read(str(tmp_path / "run.yaml")).training.toy == 7


def test_a_row_of_a_new_group_makes_the_group(monkeypatch):
    row = Field("toys.blue.ball", 0.5, "a toy", check=whole(0), identity=False)
    monkeypatch.setitem(FIELDS, row.name, row)
    assert default_config().toys.blue.ball == 0.5 and row.name not in identity(default_config())


def test_a_later_field_counts_only_if_it_is_not_the_default(monkeypatch):
    row = Field("toy", "a", "a toy", check=whole(0), identity={"toy": differs("a")})
    monkeypatch.setitem(FIELDS, "toy", row)
    c = default_config()
    assert "toy" not in identity(c)
    c.toy = "b"
    assert identity(c)["toy"] == "b"


def test_a_condition_of_identity_in_words():
    row = Field("a", 1, "", check=whole(0), identity={"b": equals(1, 2), "c": differs("x")})
    assert row.identity_in_words() == "if b is 1 or 2 and c is not 'x'"
    assert FIELDS["lora.rank"].identity_in_words() is True
