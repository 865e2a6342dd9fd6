"""The formats of an export that hold the model of a run."""

import pytest

from lljax.config import default_config
from lljax.config.exports import REFUSALS, formats
from lljax.exports import FORMATS


def test_the_table_has_every_format():
    assert list(REFUSALS) == list(FORMATS)


QUANTIZED = ["w4a16", "w8a16", "fp8", "gguf"]


@pytest.mark.parametrize(
    "changes,held",
    [
        ({}, ["peft", "merged", "split"]),
        ({"train_type": "full"}, ["merged"]),
        ({"lora.targets": ()}, ["merged"]),
        ({"lora.init": "loftq"}, ["merged", "split"]),
        ({"lora.dora": True}, ["peft", "merged"]),
        ({"lora.rank_pattern": (("q_proj", 4),)}, ["peft", "merged"]),
        ({"lora.dora": True, "lora.init": "loftq"}, ["merged"]),
    ],
)
def test_a_run_is_offered_the_formats_that_hold_its_model(changes, held):
    config = default_config()
    config.update_from_flattened_dict(changes)
    lora = "peft" in held and not config.lora.dora
    assert formats(config.to_dict()) == held + QUANTIZED + (["gguf_lora"] if lora else [])


def test_a_run_without_these_fields_has_their_defaults():
    assert (
        formats({}) == formats({"lora": 3}) == ["peft", "merged", "split", *QUANTIZED, "gguf_lora"]
    )
