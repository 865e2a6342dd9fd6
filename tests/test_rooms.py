"""The rooms: imports run down their list only, and each README names every file of its room.

A table that a config field names as text ("lljax.models.rope:KINDS") is no import.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lljax"
ROOMS = (  # from top to bottom
    *("cli", "serving", "api", "exports", "evaluation", "run", "planning", "training"),
    *(
        "objectives",
        "compression",
        "generation",
        "build",
        "interop",
        "models",
        "attention",
        "report",
        "data",
        "config",
    ),
    *("parallel", "hardware", "errors"),
)
FOLDERS = [room for room in ROOMS if (PACKAGE / room).is_dir()]


def files(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported_rooms(file: Path) -> set[str]:
    """The rooms of lljax that a file imports, at module level or in a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("lljax.")} & set(ROOMS)


def test_the_list_has_every_room():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    there |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_down_only(room):
    above = set(ROOMS[: ROOMS.index(room)])
    upward = {
        str(file.relative_to(PACKAGE)): rooms
        for file in files(room)
        if (rooms := imported_rooms(file) & above)
    }
    assert not upward


@pytest.mark.parametrize("room", FOLDERS)
def test_the_readme_names_every_file(room):
    readme = (PACKAGE / room / "README.md").read_text()
    modules = [path for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py"]
    assert not [path.name for path in modules if path.name not in readme]
