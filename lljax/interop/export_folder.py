"""The folder of an export: it appears whole or not at all, and replaces only an earlier export."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lljax.config.shipped import absolute_path
from lljax.data.files import atomic_write
from lljax.errors import DISK_FULL, ConfigError, Stopped, first_line, printable, short

# {"format": ..., "files": [...]}, what `extend_record` adds, and "card": {file: sha256} of what
# `add_card` wrote.
RECORD = "lljax_export.json"


Result = TypeVar("Result")


class _Signal(SystemExit):
    """A signal, as an exception that passes the `except Exception` of libraries."""


def check_out(out: Path, overwrite: bool = False) -> None:
    """Refuses a folder that is not empty; with `overwrite`, a folder that holds more than an
    export.

    Raises:
      ConfigError: it is refused, or cannot be read.
    """
    try:
        held = sorted(out.iterdir()) if out.is_dir() else []
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out={_shown(out)} is a file: name a folder")
    except OSError as error:
        raise _no_folder(out, error) from None
    if not held:
        return
    ours, others = _exported(out)
    if not ours:
        raise ConfigError(
            f"--out={_shown(out)} is a folder that is not empty, and no export that "
            "lljax recorded: name another, or remove it"
        )
    if others:
        raise ConfigError(
            f"--out={_shown(out)} holds an export and also {_shown(others[0])}: name "
            "another, or move that"
        )
    if not overwrite:
        raise ConfigError(
            f"--out={_shown(out)} holds an earlier export: --overwrite replaces it, "
            "or name another folder"
        )


def write_folder(
    out: Path, format: str, write: Callable[[Path], Result], overwrite: bool = False
) -> Result:
    """Runs `write(folder)` on a folder that becomes `out` when it is complete; returns its result.

    SIGTERM, SIGHUP and errors leave nothing behind. The next export removes the leftovers of a
    killed process.

    Raises:
      ConfigError: `out` is taken or cannot be written.
      Stopped: on a signal.
    """
    check_out(out, overwrite)
    out = out.resolve()
    unfinished, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        check_out(out, overwrite)  # an earlier export may have come back
        unfinished.mkdir()
    except OSError as error:
        if DISK_FULL.search(str(error)):  # has a line of its own, see lljax.errors.exit_cleanly
            raise
        raise _no_folder(out, error) from None
    try:
        with _signals_raise():
            result = write(unfinished)
            files = [file for file in unfinished.rglob("*") if file.is_file()]
            names = sorted(str(file.relative_to(unfinished)) for file in files)
            record = json.dumps({"format": format, "files": names}, indent=2)
            (unfinished / RECORD).write_text(record + "\n")
        check_out(out, overwrite)  # another process may have been quicker
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, _Signal):
            raise Stopped(f"{error} during the export: nothing was written") from None
        raise
    if out.exists() and any(out.iterdir()):
        out.rename(old)
        unfinished.rename(out)
        shutil.rmtree(old)
    elif out.exists():  # filled, not replaced: the user's shell may be there
        for child in unfinished.iterdir():
            child.rename(out / child.name)
        unfinished.rmdir()
    else:
        unfinished.rename(out)
    return result


def read_record(out: Path, flag: str = "--export") -> dict[str, Any]:
    """The record of the export in `out`.

    flag: of `out`, for the message of an error.

    Raises:
      ConfigError: `out` holds no export of lljax, or lacks files of it.
    """
    shown = f"{flag}={_shown(out)}"
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files, card = [str(file) for file in record["files"]], record.setdefault("card", {})
        if not files or not isinstance(record["format"], str) or not isinstance(card, dict):
            raise ValueError("it names no format or no file")
    except FileNotFoundError:
        there = "holds no export that lljax recorded" if out.is_dir() else "there is no such folder"
        raise ConfigError(f"{shown}: {there}; `lljax export` writes one") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{shown}: {RECORD} is damaged ({first_line(error)}): export again with --overwrite"
        ) from None
    for file in [*files, *card]:
        if not (out / file).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{shown}: {short(file)} of {RECORD} is outside the folder")
    if missing := [file for file in files if not (out / file).is_file()]:
        raise ConfigError(
            f"{shown}: the export is not complete, {printable(missing[0])} is missing: export "
            "again with --overwrite"
        )
    return record


def extend_record(
    out: Path, *, usage: str, base: str, trained: bool = True, step: int | None = None
) -> None:
    """Adds to the record of the export in `out` what the card of `lljax push` says about it.

    usage: the lines that load it, as its writer returned them. base: path or hub id of the base.
    trained: False for a base that was converted alone. step: of the checkpoint.
    """
    facts = {
        "usage": usage,
        "written_to": str(out),  # as the lines name the folder
        "base": absolute_path(base),
        "trained": trained,
        "step": step,
    }
    _write_facts(out, facts)


def _write_facts(out: Path, facts: Mapping[str, Any]) -> None:
    record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    atomic_write(out / RECORD, json.dumps({**record, **facts}, indent=2) + "\n")


def add_card(out: Path, record: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Writes the files of a card beside the export in `out` and their hashes into its record.

    An earlier card's files that the new one lacks are removed, unless they were edited.

    Raises:
      ConfigError: the folder cannot be written.
    """
    card = dict(record["card"])
    try:
        for file in set(card) - set(files):
            if not edited(out, record, file):
                (out / file).unlink(missing_ok=True)
                del card[file]
        for file, content in files.items():
            atomic_write(out / file, content)
            card[file] = hashlib.sha256(content).hexdigest()
        _write_facts(out, {"card": card})
    except OSError as error:
        if DISK_FULL.search(str(error)):
            raise
        raise ConfigError(
            f"{_shown(out)}: the card cannot be written there ({first_line(error)})"
        ) from None
    record["card"] = card


def edited(out: Path, record: Mapping[str, Any], file: str) -> bool:
    """Whether `file` is in `out` and is not what `add_card` wrote."""
    path = out / file
    if not path.is_file():
        return path.is_symlink()
    return hashlib.sha256(path.read_bytes()).hexdigest() != record["card"].get(file)


def _exported(out: Path) -> tuple[bool, list[Path]]:
    """Whether `out` holds an export of lljax, and its other files."""
    try:
        record = json.loads((out / RECORD).read_text())
        files = {Path(file) for file in record["files"]} | {Path(RECORD)}
        files |= {Path(file) for file in record.get("card", {}) if not edited(out, record, file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False, []
    held = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    return True, sorted({path.relative_to(out) for path in held} - files)


def _remove_leftovers(out: Path) -> None:
    """Removes the leftovers of killed exports to `out`; puts back an export that was being
    replaced.
    """
    for path in out.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(\d+)\.(tmp|old)", path.name)
        if match is None or path.is_symlink() or not path.is_dir() or _alive(int(match[1])):
            continue
        if match[2] == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise in this context, so that unfinished folders are removed.

    Python gives signals to the main thread alone.
    """

    def receive(number: int, _: object) -> None:
        raise _Signal(signal.Signals(number).name)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                previous[number] = signal.signal(number, receive) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _no_folder(out: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"--out={_shown(out):.200}: no folder can be there ({error.strerror}: "
        f"{_shown(error.filename):.200})"
    )


def _shown(path: Path) -> str:
    return printable(str(path))
