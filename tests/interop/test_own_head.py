"""A folder whose config.json ties the head to the embedding and whose file has a head too."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from families import read
from safetensors.torch import load_file, save_file

from lljax.errors import ModelError
from lljax.interop.export import export_merged, export_peft
from lljax.interop.open import open_base, open_config


def give_head(folder, head=None):
    """Writes a head into the file of a tied model: of random numbers, or the embedding itself."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    embed = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embed.clone() if head == "equal" else torch.randn_like(embed)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_a_head_of_its_own_is_read_and_said_as_in_transformers(hf_folder, logits, caplog, family):
    folder = give_head(hf_folder(family, tied=True))
    base, model = read(folder)
    assert "ties the head to the embedding, and the file has another head" in caplog.text
    assert not model.spec.tied and open_config(str(folder))["tie_word_embeddings"] is False
    np.testing.assert_allclose(logits(model), logits(load(folder)), atol=1e-4, rtol=1e-4)


def test_a_head_that_equals_the_embedding_stays_tied(hf_folder, caplog):
    _, model = read(give_head(hf_folder(tied=True), "equal"))
    assert model.spec.tied and not caplog.records


def test_a_head_without_an_embedding_is_refused(hf_folder):
    folder = give_head(hf_folder(tied=True))
    weights = load_file(folder / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="'model.embed_tokens.weight' is missing"):
        read(folder)


def test_a_head_that_config_json_has_and_the_file_has_not_is_refused(hf_folder):
    folder = hf_folder(tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match="'lm_head.weight' is missing"):
        read(folder)


def test_what_trains_on_such_a_base_is_exported_with_both_tables(
    hf_folder, trained, logits, tmp_path
):
    base, model = trained(give_head(hf_folder(tied=True)), "keep")  # the embedding trains
    export_peft(model, base, tmp_path / "peft")
    export_merged(model, base, tmp_path / "merged")
    assert (
        json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
        is False
    )
    for theirs in (
        peft.PeftModel.from_pretrained(load(base.path), tmp_path / "peft"),
        load(tmp_path / "merged"),
    ):
        np.testing.assert_allclose(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)


def test_a_random_start_needs_no_weights(hf_folder):
    folder = hf_folder(tied=True)
    (folder / "model.safetensors").unlink()
    assert open_base(str(folder)).config["tie_word_embeddings"] is True
