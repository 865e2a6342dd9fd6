"""A row of the table of config fields, and conditions on fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lljax.config.access import Config, get
from lljax.config.checks import Check, Choices, Condition, Several, Value

Conditions = Mapping[str, Condition]  # by the field that each is about


def equals(*values: Any) -> Value:
    return Value(lambda x: x in values, " or ".join(map(repr, values)))


def differs(value: Any) -> Value:
    return Value(lambda x: x != value, f"not {value!r}")


GIVEN = Value(bool, "given")
EMPTY = Value(lambda x: not x, "empty")


def hold(conditions: Conditions, config: Config) -> bool:
    """Whether all of the conditions hold."""
    return all(value.holds(get(config, field)) for field, value in conditions.items())


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the configuration.

    name: dotted. comment: shown by --help. check: raises ConfigError for an illegal value.
    identity: True: a run resumes only with its original value. False: the value itself is not
      compared; what it selects (base, tokenizer, special tokens, tokenized data) is compared by
      fingerprint in `lljax.run.identity`. Conditions: the value is compared if all of them hold.
      A later field whose default changes nothing uses {name: differs(default)}, because older
      checkpoints do not record it.
    yaml: the name in the flat YAML, such as "scheduler.type". other_names: names that other
      trainers have for it, in lower case.
    path: holds paths, which become absolute in the run's config.json.
    text_or_number: takes both, whatever the type of the default.
    required: the hint for a run that leaves the field empty; "" if that is legal.
    """

    name: str
    default: Any
    comment: str
    _: dataclasses.KW_ONLY
    check: Check
    identity: bool | Conditions
    yaml: str = ""
    other_names: str = ""
    path: bool = False
    text_or_number: bool = False
    required: str = ""

    def __call__(self, name: str, value: Any) -> None:
        """Raises ConfigError if `value` is illegal; name: the field as the user wrote it."""
        self.check(name, value)

    @property
    def choices(self) -> Choices | None:
        """The words it takes, or its items take."""
        check = self.check.item if isinstance(self.check, Several) else self.check
        return check if isinstance(check, Choices) else None

    @property
    def type(self) -> str:
        return "str | float" if self.text_or_number else type(self.default).__name__

    def summary(self) -> str:
        """The comment, after the choices as far as they are known without an import."""
        if not (self.choices and self.choices.words):
            return self.comment
        others = ("...",) if self.choices.owner else ()
        return f"{' | '.join((*self.choices.words, *others))}: {self.comment}"

    def identity_in_words(self) -> str | bool:
        if isinstance(self.identity, bool):
            return self.identity
        return "if " + " and ".join(f"{name} is {x.wanted}" for name, x in self.identity.items())
