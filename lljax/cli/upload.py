"""The work of `lljax push`: the card into the export, and its files to the hub."""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lljax.data.files import read_object
from lljax.errors import ConfigError, counted, printable, short
from lljax.interop import hub
from lljax.interop.export_folder import RECORD, add_card, edited, read_record
from lljax.interop.folder import read_json
from lljax.report.card import CARD, Export, card_files
from lljax.report.run_files import read_run

LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def push(arguments: argparse.Namespace) -> None:
    """Writes the card, lists the files and uploads them. arguments: the flags of `lljax push`.

    Raises:
      ConfigError: a flag, an export that is not complete, or what the hub does not accept.
      HubError: the hub fails or cannot be reached.
    """
    hub.check_repo(arguments.repo)
    check(arguments)
    folder = arguments.export or arguments.workdir / "export" / (arguments.format or "peft")
    record = read_record(folder)
    run = read_run(arguments.workdir) if arguments.workdir else None
    local = base_of(folder, record, run.model if run and run.started else "")
    public = public_base(local, arguments.base_model)
    if not arguments.dry_run:
        hub.check_token()
        hub.make_repo(arguments.repo, private=arguments.private, revision=arguments.revision)
    license, source = license_of(arguments, folder, local, public)
    export = Export(
        folder=folder,
        repo=arguments.repo,
        record=record,
        base=public or Path(local).name,
        base_is_public=bool(public),
        license=license,
        license_from=source,
        revision=arguments.revision,
    )
    files = card_files(export, run)
    if not arguments.overwrite_card:
        files = {name: files[name] for name in files if not edited(folder, record, name)}
    add_card(folder, record, files)
    uploaded = files_to_upload(export)
    show(export, uploaded)
    if arguments.dry_run:
        print("Nothing is uploaded (--dry_run).")
        return
    address = hub.upload(
        arguments.repo,
        uploaded,
        revision=arguments.revision,
        message=arguments.message or f"Upload {export.name} ({export.format}) with lljax",
    )
    print(f"{arguments.repo} is uploaded: {address}")


def public_base(local: str, named: str | None) -> str:
    """The hub id of a base that was read as `local`; "" if it has none.

    named: by --base_model.

    Raises:
      ConfigError: `named` is another.
    """
    if not hub.is_hub_id(local):
        return named or ""
    if named not in (None, local):
        raise ConfigError(f"--base_model={named}: the export was made of {local}")
    return local


def license_of(
    arguments: argparse.Namespace, folder: Path, local: str, public: str
) -> tuple[dict[str, str], str]:
    """The license as fields of a card, {} if it is unknown, and who says so."""
    if arguments.license:
        return {"license": arguments.license}, "as its author says"
    license: dict[str, str] = {}
    for base in dict.fromkeys(filter(None, (public, local))):
        license = license or hub.license_of_base(base, folder, online=not arguments.dry_run)
    return license, "the license of the base"


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that exclude each other or hold no legal value."""
    if not arguments.workdir and not arguments.export:
        raise ConfigError("name a run with --workdir, or the folder of an export with --export")
    if arguments.export and arguments.format:
        raise ConfigError("--format and --export: the folder has a format; give one of the two")
    if arguments.base_model and not hub.HUB_ID.fullmatch(arguments.base_model):
        raise ConfigError(
            f"--base_model={short(arguments.base_model)} is no hub id: give OWNER/NAME"
        )
    if arguments.license is not None and not LICENSE_ID.fullmatch(arguments.license):
        raise ConfigError(
            f"--license={short(arguments.license)} is no id of the hub: give one such as "
            "apache-2.0, mit, llama3.1 or other"
        )


def base_of(folder: Path, record: Mapping[str, Any], run_model: str) -> str:
    """The base of an export as it was read: a path or a hub id; "" if nothing tells.

    run_model: the base of the run in --workdir; "" without one.

    Raises:
      ConfigError: the run has another base.
    """
    config = read_object(folder / "adapter_config.json")
    base = str(record.get("base") or config.get("base_model_name_or_path") or run_model)
    if run_model and base != run_model:
        raise ConfigError(
            f"the export was made of {short(base)}, and the run in --workdir trained "
            f"{short(run_model)}: name the run that was exported"
        )
    return base


def files_to_upload(export: Export) -> dict[str, Path | bytes]:
    """The files of the export and its card by name. An adapter's config names the base as the card
    does, and not by a path of this machine.
    """
    names = dict.fromkeys([*export.record["files"], CARD, *export.record["card"]])
    files: dict[str, Path | bytes] = {
        name: export.folder / name for name in names if (export.folder / name).is_file()
    }
    for name in [name for name in files if Path(name).name == "adapter_config.json"]:
        config = read_json(export.folder / name)
        base = export.repo if export.format == "split" else export.base  # of split: uploaded too
        if config.get("base_model_name_or_path") != base:
            config["base_model_name_or_path"] = base
            files[name] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def show(export: Export, files: Mapping[str, Path | bytes]) -> None:
    """Prints the files with their sizes, and what a user may want to change."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in files.items()
    }
    width = max(map(len, sizes))
    print(f"{export.repo}: {counted(len(sizes), 'file')}, {sum(sizes.values()):,} bytes")
    for name, size in sizes.items():
        print(f"  {printable(name):<{width}}  {size:>15,}")
    held = [path for path in export.folder.rglob("*") if not path.is_dir()]
    names = {str(path.relative_to(export.folder)) for path in held} - set(files) - {RECORD}
    if names:
        shown = ", ".join(map(printable, sorted(names)[:3]))
        print(f"Not part of the export, and stays here: {shown}{' ...' * (len(names) > 3)}")
    if edited(export.folder, export.record, CARD):
        print(f"{CARD} was edited and stays as it is: --overwrite_card writes it again.")
    if not export.base_is_public:
        print(
            f"The base is local, and the card names it {short(export.base)}: give its hub id with "
            "--base_model=OWNER/NAME, if it has one."
        )
    if not export.record.get("usage"):
        print(
            "How to load it is not recorded, so the card lacks it: export again with --overwrite."
        )
    if not export.license:
        print("The license of the base is not known here: --license=ID names one.")
