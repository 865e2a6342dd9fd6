"""The message for an unknown config field, which names the field that was probably meant."""

import difflib

from lljax.config.tree import FIELDS
from lljax.errors import short


def also_called() -> dict[str, str]:
    """Config fields by the names that other trainers have for them."""
    return {name: field.name for field in FIELDS.values() for name in field.other_names.split()}


def unknown_field(name: str) -> str:
    """The error message for an unknown field."""
    if member := next((field for field in FIELDS if field.startswith(f"{name}.")), None):
        return f"{name} is a group of fields: set them one by one, such as {member}"
    likely = nearest_field(name)
    hint = f"did you mean {likely!r}?" if likely else "--help lists all of them"
    return f"there is no config field {short(name)}: {hint}"


def nearest_field(name: str) -> str | None:
    """The field that was probably meant by `name`, if there is one."""
    last = name.rpartition(".")[2]
    if last.lower() in (others := also_called()):
        return others[last.lower()]
    by_last = {field.rpartition(".")[2]: field for field in FIELDS}
    candidates = [
        *(field for field in FIELDS if field.rpartition(".")[2] == last),
        *difflib.get_close_matches(name, FIELDS, 1, 0.75),
        *(by_last[near] for near in difflib.get_close_matches(last, by_last, 1)),
    ]
    return candidates[0] if candidates else None
