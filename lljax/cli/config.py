"""The fields of a config, with their types, defaults and comments.

lljax config
lljax config --json      # also the choices, and whether a resumed run must keep the value
"""

import json
from collections.abc import Sequence
from typing import Any

from lljax.cli.arguments import parser
from lljax.config import FIELDS, Field
from lljax.config.flags import show


def main(argv: Sequence[str]) -> None:
    """Prints the table of config fields, one per line, or as a JSON list of objects."""
    command = parser("config", __doc__)
    command.add_argument(
        "--json",
        action="store_true",
        help="a JSON list: name, type, default, comment, required, choices (or null), identity",
    )
    fields = FIELDS.values()
    if command.parse_args(argv).json:
        show(json.dumps([describe(field) for field in fields], indent=2))
    else:
        rows = [(f.name, f.type, repr(f.default), f.summary()) for f in fields]
        name, kind, default = (max(len(row[column]) for row in rows) for column in range(3))
        default = min(default, 30)
        show("\n".join(f"{a:{name}}  {b:{kind}}  {c:{default}}  {d}" for a, b, c, d in rows))


def describe(field: Field) -> dict[str, Any]:
    """A field as JSON. Imports the rooms that own choices.

    identity: whether a run resumes with the same value only, or the condition for that in words.
    """
    return {
        "name": field.name,
        "type": field.type,
        "default": field.default,
        "comment": field.comment,
        "required": bool(field.required),
        "choices": field.choices and field.choices.all(),
        "identity": field.identity_in_words(),
    }
