"""The hint for an unknown field."""

import pytest

from lljax.config import FIELDS
from lljax.config.field_names import also_called, unknown_field


def test_names_of_other_trainers_are_lower_case_and_each_leads_to_one_field():
    names = [name for field in FIELDS.values() for name in field.other_names.split()]
    assert len(also_called()) == len(names) and all(name == name.lower() for name in names)


@pytest.mark.parametrize(
    "name,meant",
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("training.batch_size", "training.rows"),
        ("lora.rnak", "lora.rank"),
        ("rank", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("model.pth", "model.path"),
        ("contxt.length", "context.length"),
    ],
)
def test_an_unknown_field_names_the_nearest(name, meant):
    assert unknown_field(name) == f"there is no config field {name!r}: did you mean {meant!r}?"


def test_a_group_names_one_of_its_fields():
    assert "such as lora.rank" in unknown_field("lora")


def test_a_name_like_no_other_leads_to_the_help():
    assert unknown_field("qqqqqqqqq").endswith("--help lists all of them")
