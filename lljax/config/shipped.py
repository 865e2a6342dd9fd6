"""Files that come with the package: configurations, and the model tiny-512."""

import importlib.resources
import os
from pathlib import Path

PACKAGE = Path(str(importlib.resources.files("lljax")))
CONFIGS = PACKAGE / "configs"
ASSETS = "lljax/assets/"  # how a configuration names them, from the root of the repository


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


def shipped_asset(path: str) -> str:
    """`path`, or the asset of the package if it names one and there is no such path here."""
    if not path.startswith(ASSETS) or os.path.exists(path):
        return path
    asset = PACKAGE.parent / path
    return str(asset) if asset.exists() else path
