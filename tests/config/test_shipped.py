"""Configurations and the tiny model are found wherever the package is installed."""

import pytest

from lljax.config.flags import load_config
from lljax.config.shipped import CONFIGS, shipped_asset, shipped_config
from lljax.interop.open import open_base


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
    assert shipped_asset("lljax/assets/tiny-512") == "lljax/assets/tiny-512"
    assert shipped_asset("lljax/assets/none") == "lljax/assets/none"
