"""The date in a chat template: the same for all documents of a run, also when it resumes another
day.
"""

import copy
from datetime import datetime
from pathlib import Path

from lljax.data.files import atomic_write
from lljax.errors import DataError, printable

LETTERS = "aAwdbBmyYHIMSfjUWpZzcxXGuVeDFTRCklsnrt"
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in LETTERS]


def dated(tokenizer, cache: Path):
    """The tokenizer that the documents kept in `cache` are encoded with.

    If its chat template asks for the date (`strftime_now`), a copy whose template is always told
    the moment at which the first of them were encoded, which `cache`/clock keeps.

    Raises:
      DataError: `cache`/clock is no date and time.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return tokenizer
    fixed, now = copy.copy(tokenizer), _moment(cache / "clock")
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        fixed.chat_template = {
            name: stopped(text, now) for name, text in tokenizer.chat_template.items()
        }
    else:
        fixed.chat_template = stopped(tokenizer.chat_template, now)
    return fixed


def stopped(template: str, now: datetime) -> str:
    """The template with a `strftime_now` of its own, which formats `now`.

    A macro, because transformers passes no function into a template.
    """
    values = {directive: now.strftime(directive) for directive in DIRECTIVES}
    replaced = "".join(f"|replace({name!r},{value!r})" for name, value in values.items())
    return (
        "{%- macro strftime_now(format) -%}{{ format|replace('%%','\\0')"
        + replaced
        + "|replace('\\0','%') }}{%- endmacro +%}"
        + template
    )


def _moment(kept: Path) -> datetime:
    try:
        return datetime.fromisoformat(kept.read_text(encoding="ascii"))
    except FileNotFoundError:
        now = datetime.now().replace(microsecond=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, now.isoformat())
        return now
    except ValueError:
        raise DataError(
            f"{printable(str(kept))}: not the date and time that the documents were "
            "encoded at: write it as 2026-01-31T12:00:00, or use a new --workdir"
        ) from None
