"""How lljax is installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_script_beside_the_clone_imports_the_package_and_not_the_folder(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    clone, site = tmp_path / "lljax", tmp_path / "site"
    (clone / "lljax").mkdir(parents=True)
    (clone / "lljax" / "__init__.py").write_text("prepare_model = None\n")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (tmp_path / "beside.py").write_text(
        f"import site; site.addsitedir({str(site)!r})\nimport lljax; lljax.prepare_model\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "beside.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
