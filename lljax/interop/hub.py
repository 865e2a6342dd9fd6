"""The HuggingFace hub: the license of a base there, and the upload of an export."""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lljax.config.shipped import absolute_path
from lljax.errors import ConfigError, LljaxError, first_line, printable, short

# The hub's ids of licenses by what their texts begin with.
LICENSE_TEXTS = {
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "mit",
    r"LLAMA 2 COMMUNITY LICENSE": "llama2",
    r"(META )?LLAMA 3 COMMUNITY LICENSE": "llama3",
    r"LLAMA 3\.1 COMMUNITY LICENSE": "llama3.1",
    r"LLAMA 3\.2 COMMUNITY LICENSE": "llama3.2",
    r"LLAMA 3\.3 COMMUNITY LICENSE": "llama3.3",
    r"LLAMA 4 COMMUNITY LICENSE": "llama4",
    r"Gemma Terms of Use": "gemma",
}
LICENSE_FIELDS = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class HubError(LljaxError):
    """The hub refuses a request, or cannot be reached; the same command tries again."""

    exit_code = 68  # EX_NOHOST of sysexits.h


def check_repo(repo: str) -> None:
    """Raises ConfigError unless `repo` can be the name of a repository with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "" if repo.count("/") == 1 else "give the owner too, as in --repo=me/my-model"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = reason or first_line(error).partition(": '")[0]
    if reason:
        raise ConfigError(f"--repo={short(repo)} is no name on the hub: {reason}")


def is_hub_id(base: str) -> bool:
    """Whether a base of this name was read from the hub and not from a folder or file here."""
    return bool(HUB_ID.fullmatch(base)) and not Path(absolute_path(base)).is_absolute()


def license_of_base(base: str, export: Path, *, online: bool) -> dict[str, str]:
    """The fields of LICENSE_FIELDS that the base's card has, or else its license file; {} if they
    are unknown.

    base: its path or hub id. export: a folder that may hold a copy of its license file. online:
    asks the hub if nothing here has the base's card.
    """
    folders = [export, export / "base"]
    if is_hub_id(base):
        license = _license_of_card(_cached_card(base)) or (_license_on_hub(base) if online else {})
    else:
        folder = Path(absolute_path(base))
        folder = folder.parent if folder.suffix == ".gguf" else folder
        license, folders = _license_of_card(folder / "README.md"), [folder, *folders]
    return license or _license_of_text(folders)


def _cached_card(base: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base, "README.md")
    return Path(cached) if isinstance(cached, str) else None


def _license_of_card(path: Path | None) -> dict[str, str]:
    import yaml
    from huggingface_hub import metadata_load

    with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):
        return _license_fields(metadata_load(path) if path and path.is_file() else {})
    return {}


def _license_on_hub(base: str) -> dict[str, str]:
    """The license that the hub has for a base; {} if it does not tell."""
    from huggingface_hub import HfApi

    with contextlib.suppress(ConfigError, HubError), _hub_errors(base):
        return _license_fields(HfApi().model_info(base, timeout=30).card_data)
    return {}


def _license_fields(card: Any) -> dict[str, str]:
    known = {name: card.get(name) if card else None for name in LICENSE_FIELDS}
    return {name: value for name, value in known.items() if value and isinstance(value, str)}


def _license_of_text(folders: list[Path]) -> dict[str, str]:
    for file in [file for folder in folders for file in sorted(folder.glob("LICENSE*"))]:
        start = file.read_text(errors="replace")[:600] if file.is_file() else ""
        for pattern, name in LICENSE_TEXTS.items():
            if re.search(pattern, start, re.IGNORECASE):
                return {"license": name}
    return {}


def check_token() -> None:
    """Raises ConfigError without a token for the hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise ConfigError(
            "there is no token for the hub: `hf auth login` stores one, or set HF_TOKEN"
        )


def make_repo(repo: str, *, private: bool = False, revision: str | None = None) -> None:
    """Makes the repository and the branch `revision`, if they are not there.

    private: the repository must be private.

    Raises:
      ConfigError: the hub does not accept the token, the repository or the revision; or `private`
        and the repository is public.
      HubError: the hub fails or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:  # as it was before
            raise ConfigError(
                f"--private: {repo} is there and public: make it private in its settings on the "
                "hub, or name another --repo"
            )
        if revision not in (None, "main"):
            api.create_branch(repo, branch=revision, exist_ok=True)


def upload(
    repo: str, files: Mapping[str, Path | bytes], *, revision: str | None = None, message: str
) -> str:
    """Uploads files by their names in the repository and returns the address of the commit. Other
    files of the repository stay.

    Raises:
      ConfigError, HubError: as `make_repo`.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo), tempfile.TemporaryDirectory(prefix="lljax-push-") as name:
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=_stage(Path(name), files),
            revision=revision,
            commit_message=message,
        )
    return str(commit.commit_url)


def _stage(folder: Path, files: Mapping[str, Path | bytes]) -> Path:
    """A folder with links to the files, so that these are uploaded and no others."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.symlink_to(content.resolve())
    return folder


ADVICE = {  # by the status of the hub's answer
    401: "the hub does not accept the token: `hf auth login` stores another",
    402: "the hub wants a payment for this: see your account's settings",
    403: "the token may not write there: it needs the role write, and you the right to write in "
    "that namespace; `hf auth login` stores another",
    404: "there is no such repository or revision for this token",
    409: "the hub reports a conflict: give the same command again",
    413: "the hub takes no more: see your account's storage",
    429: "the hub takes no more requests now: give the same command again later",
}


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into one line with the way out."""
    from huggingface_hub import errors

    network: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that this version uses
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        told = printable(error.server_message or "").strip()
        reason = ADVICE.get(status, "the hub fails: give the same command again")
        kind = ConfigError if status in ADVICE and status not in (409, 429) else HubError
        raise kind(f"--repo={repo}: {reason} ({status}{told and ': '}{told:.200})") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"--repo={repo}: {first_line(error)}") from None
    except errors.LocalTokenNotFoundError:
        raise ConfigError("there is no token for the hub: `hf auth login` stores one") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(
            "HF_HUB_OFFLINE is set, so nothing is uploaded: unset it, or try --dry_run"
        ) from None
    except (network, ConnectionError, TimeoutError, RuntimeError) as error:
        raise HubError(
            f"--repo={repo}: the hub cannot be reached ({first_line(error):.200}): the same "
            "command goes on with the files that are missing there"
        ) from None
