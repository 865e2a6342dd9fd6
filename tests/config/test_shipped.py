"""Configurations and the tiny model are found wherever the package is installed."""

import pytest

from lljax.config.flags import load_config
from lljax.config.shipped import CONFIGS, absolute_path, shipped_config, shipped_model
from lljax.interop.open import open_base, open_config


@pytest.mark.parametrize("name", ["quickstart", "quickstart.py", "configs/quickstart.py"])
def test_a_config_of_the_package_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_config(name) == CONFIGS / "quickstart.py"
    assert load_config(name).context.length == 4096


def test_a_config_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text(
        "from lljax.config import default_config as get_config\n"
    )
    assert load_config("quickstart.py").lora.rank == 8


def test_a_shipped_config_imports_the_config_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny_base_recall").model.init == "pretrained"


def test_the_tiny_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_base("lljax/assets/tiny-512").config["vocab_size"] == 4096
    (tmp_path / "lljax/assets/tiny-512").mkdir(parents=True)  # a folder here comes first
    assert shipped_model("lljax/assets/tiny-512") == "lljax/assets/tiny-512"
    assert shipped_model("lljax/assets/none") == "lljax/assets/none"


@pytest.mark.parametrize("shape", sorted(file.name for file in (CONFIGS / "shapes").iterdir()))
def test_the_shapes_are_found_from_any_folder(shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_config(f"configs/shapes/{shape}")["hidden_size"] > 1000
    (tmp_path / "configs/shapes" / shape).mkdir(parents=True)
    assert shipped_model(f"configs/shapes/{shape}") == f"configs/shapes/{shape}"


def test_existing_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert absolute_path("base") == absolute_path("~/base") == str(tmp_path / "base")
    assert absolute_path("lljax/assets/tiny-512") == str(CONFIGS.parent / "assets/tiny-512")
    assert absolute_path("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B" and absolute_path("") == ""
