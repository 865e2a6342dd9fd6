"""Paths of a configuration: absolute ones, and files of the package (configurations, tiny-512)."""

import importlib.resources
import os
from pathlib import Path

PACKAGE = Path(str(importlib.resources.files("lljax")))
CONFIGS = PACKAGE / "configs"
# Folders of models by the names that configurations have for them, from the root of the repository.
MODELS = {"lljax/assets/": PACKAGE / "assets", "configs/shapes/": CONFIGS / "shapes"}


def shipped_config(name: str) -> Path:
    """The file that --config names: a file here, or else one of the package.

    `quickstart` and `configs/quickstart.py` both name the package's configs/quickstart.py, and so
    does `quickstart.py`. A path that is neither is returned as it is.
    """
    path = Path(name)
    if os.path.isfile(path) or str(path.parent) not in (".", "configs"):
        return path
    file = CONFIGS / f"{path.name.removesuffix('.py')}.py"
    return file if os.path.isfile(file) else path


def shipped_model(path: str) -> str:
    """`path`, or the model of the package if it names one and there is no such path here."""
    for prefix, folder in MODELS.items():
        if path.startswith(prefix) and not os.path.exists(path):
            model = folder / path.removeprefix(prefix)
            return str(model) if os.path.exists(model) else path
    return path


def absolute_path(path: str) -> str:
    """`path` as an absolute path if it exists, here or in the package; otherwise (a hub id)
    unchanged."""
    expanded = os.path.expanduser(shipped_model(path))
    return os.path.abspath(expanded) if path and os.path.exists(expanded) else path
