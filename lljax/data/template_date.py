"""The date in a chat template: the same for all documents of a run, even if it resumes later."""

import copy
from datetime import datetime
from pathlib import Path
from typing import Any

from lljax.data.files import atomic_write
from lljax.errors import DataError, printable

LETTERS = "aAwdbBmyYHIMSfjUWpZzcxXGuVeDFTRCklsnrt"
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in LETTERS]


def dated(tokenizer: Any, cache: Path) -> Any:
    """The tokenizer that encodes the documents in `cache`.

    If its chat template uses the date (`strftime_now`), a copy whose template always gets the time
    of the first encoding, which `cache`/clock stores.

    Raises:
      DataError: `cache`/clock is not a date and time.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return tokenizer
    fixed, now = copy.copy(tokenizer), _moment(cache / "clock")
    if isinstance(tokenizer.chat_template, dict):  # several templates by name
        fixed.chat_template = {
            name: stopped(text, now) for name, text in tokenizer.chat_template.items()
        }
    else:
        fixed.chat_template = stopped(tokenizer.chat_template, now)
    return fixed


def stopped(template: str, now: datetime) -> str:
    """The template with a macro `strftime_now` that formats `now`.

    transformers passes no functions into a template, hence a macro.
    """
    values = {directive: now.strftime(directive) for directive in DIRECTIVES}
    replaced = "".join(f"|replace({name!r},{value!r})" for name, value in values.items())
    return (
        "{%- macro strftime_now(format) -%}{{ format|replace('%%','\\0')"
        + replaced
        + "|replace('\\0','%') }}{%- endmacro +%}"
        + template
    )


def _moment(path: Path) -> datetime:
    try:
        return datetime.fromisoformat(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        now = datetime.now().replace(microsecond=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, now.isoformat())
        return now
    except ValueError:
        raise DataError(
            f"{printable(str(path))}: not the date and time that the documents were "
            "encoded at: write it as 2026-01-31T12:00:00, or use a new --workdir"
        ) from None
