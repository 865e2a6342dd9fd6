"""The command line of a run: --config, --config.FIELD=VALUE for every field, and --help."""

import ast
import contextlib
import difflib
import importlib.util
import linecache
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from lljax.config import yaml as yaml_config
from lljax.config.access import Config
from lljax.config.field_names import also_called, nearest_field, unknown_field
from lljax.config.shipped import CONFIGS, shipped_config
from lljax.config.tree import FIELDS
from lljax.errors import ConfigError, LljaxError, first_line, short

HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")
YAML = (".yaml", ".yml")


def config_flag(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines --config, the file of a run, and --config.FIELD=VALUE for every field of it.

    values: the flags of a command. argv: the command line that they will be read from.
    """
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A Python file with get_config(), a YAML file, or a name from configs/.",
        flag_values=values,
        sys_argv=list(argv),
    )
    values["config"].parser = _ConfigFile()


def read_flags(values: flags.FlagValues, argv: Sequence[str], doc: str, *required: str) -> None:
    """Parses the command line into `values`. With --help, prints the help of the command and exits.

    argv: the command, then its arguments. doc: the docstring of the command, with its examples.
      required: flags that must be given.

    Raises:
      ConfigError: an unknown flag or field, a value of the wrong type, a missing flag, or a config
        file that cannot be used.
    """
    if any(argument in HELP for argument in argv[1:]):
        show(help_text(values, doc))
        sys.exit()
    if unknown := [field for field, _ in _overrides(argv) if field not in FIELDS]:
        raise ConfigError(unknown_field(unknown[0]))
    try:
        left = values(argv)[1:]
    except LljaxError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown_flag(error, list(values), argv[0])) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        for field, value in _overrides(argv):
            named = (f"config.{field}=", repr(field.rpartition(".")[2]))  # by absl, ConfigDict
            if value is not None and any(name in str(error) for name in named):
                _check_text(field, value)
        raise ConfigError(first_line(error)[:300]) from None
    if left:
        is_config = Path(left[0]).suffix in (".py", *YAML)
        hint = f"did you mean --config={left[0]}?" if is_config else "see --help"
        raise ConfigError(f"{short(left[0])} belongs to no flag: {hint}")
    for name in required:
        if values[name].value in (None, ""):
            raise ConfigError(f"--{name} is missing: {values[name].help}")


def show(text: str) -> None:
    """Prints `text`; it is no error if its reader is gone, as with `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(values: flags.FlagValues, doc: str) -> str:
    """The help of a command: its docstring, its flags, and the fields of a configuration."""
    rows = [(f"--{name}", " ".join(values[name].help.split())) for name in values]
    return "\n".join(
        [
            doc.strip(),
            "",
            "Flags:",
            *_columns(rows, 22),
            "",
            "Fields and their defaults; --config.FIELD=VALUE sets one:",
            *field_lines(),
        ]
    )


def field_lines() -> list[str]:
    """Every field with its default and comment, a line each."""
    rows = [(f"{field.name} = {field.default!r}", field.summary()) for field in FIELDS.values()]
    return _columns(rows, 46)


def _columns(rows: list[tuple[str, str]], width: int) -> list[str]:
    return [f"  {left:<{width}} {right}".rstrip() for left, right in rows]


# ---------------------------------------------------------------- the config file
class _ConfigFile(flags.ArgumentParser):
    def parse(self, argument: str) -> Config:
        return load_config(argument).lock()


def load_config(named: str) -> Config:
    """Loads FILE.py, FILE.py:ARGUMENT (get_config takes the argument), or a YAML file.

    A file that comes with the package may be named alone: `quickstart` is configs/quickstart.py.

    Raises:
      ConfigError: no such file (names the nearest), or it fails (names the line).
    """
    name, _, argument = named.partition(":") if ".py:" in named else (named, "", "")
    path = shipped_config(name)
    if not os.path.isfile(path):  # False also where the name is too long to be one
        raise ConfigError(f"--config={name[:300]}: there is no such file{_nearest_file(path)}")
    if path.suffix in YAML:
        return yaml_config.read(name)
    if path.suffix != ".py":
        raise ConfigError(f"--config={name}: a config file is Python (.py) or YAML (.yaml, .yml)")
    try:
        with _importing_beside(path):
            spec = importlib.util.spec_from_file_location("lljax_run_config", path)
            assert spec and spec.loader, "a .py file has a loader"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise ConfigError(f"{path}: it has no get_config(): see configs/ for examples")
            config = module.get_config(*([argument] if argument else []))
    except LljaxError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(_failed(path, error)) from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config() returned {short(config)}: return the "
            "configuration that lljax.config.default_config() made"
        )
    return config


@contextlib.contextmanager
def _importing_beside(path: Path) -> Iterator[None]:
    """Lets a config file import modules beside it, and packages beside its folder."""
    before = list(sys.path)
    sys.path += [str(path.resolve().parent), str(path.resolve().parent.parent)]
    try:
        yield
    finally:
        sys.path[:] = before


def _failed(path: Path, error: Exception) -> str:
    """The error message for a config file that raised `error`."""
    places = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path.absolute() or frame.filename == str(path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else places[-1] if places else None
    where = f"{path}:{line}" if line else str(path)
    if unknown := re.search(r'Key "(\w+)" does not exist', str(error)):
        source = linecache.getline(str(path), line or 0)
        written = re.search(rf"\w\.([\w.]*\b{unknown[1]})\b", source)
        return f"{where}: {unknown_field(written[1] if written else unknown[1])}"
    return f"{where}: {type(error).__name__}: {first_line(error)[:300]}"


def _nearest_file(path: Path) -> str:
    """A hint: the file beside `path`, or in configs/, whose name is most like it."""
    by_stem = {}
    for folder in (path.parent, Path("configs"), CONFIGS):
        for file in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
            if file.suffix in (".py", *YAML):
                by_stem.setdefault(file.stem, file)
    near = difflib.get_close_matches(path.stem, by_stem, 1)
    return f": did you mean {str(by_stem[near[0]])!r}?" if near else ": see configs/ for some"


# ---------------------------------------------------------------- fields on the command line
def _unknown_flag(
    error: flags.UnrecognizedFlagError, flag_names: Sequence[str], command: str
) -> str:
    """The error message for an unknown flag, which may be a field without its `config.`"""
    name, hint = error.flagname, f"see {command} --help"
    names = {field.rpartition(".")[2] for field in FIELDS} | also_called().keys()
    if ("." in name or name in names) and (field := nearest_field(name)):
        hint = f"did you mean --config.{field}?"
    elif near := difflib.get_close_matches(name, flag_names, 1):
        hint = f"did you mean --{near[0]}?"
    return f"there is no flag {short(f'--{name}')}: {hint}"


def _overrides(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """(field, text) of every --config.FIELD=TEXT; the text is None if it is the next argument."""
    pattern = re.compile(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
    matches = map(pattern.match, argv[1:])
    return [(match[1], match[2]) for match in matches if match]


def _check_text(field: str, text: str) -> None:
    """Raises ConfigError if `text` cannot be a value of `field`."""
    default = FIELDS[field].default
    try:
        value = ast.literal_eval(text) if isinstance(default, (int, float, tuple)) else text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        value = text
    if isinstance(default, bool):
        value = text.lower() in ("true", "false", "1", "0", "t", "f", "yes", "no") or text
    FIELDS[field](f"--config.{field}", value)
