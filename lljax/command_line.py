"""Flags of the scripts that take a config file."""

import re

from absl import flags

from lljax.errors import ConfigError


def read_flags(argv, *required: str) -> None:
    """Parses the command line; what is wrong with it becomes one line.

    Raises:
      ConfigError: an unknown flag or field, a value of the wrong type, or a required flag that is missing.
    """
    flags.mark_flags_as_required(required)
    try:
        flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error)
        field = re.search(r'''Key "(\w+)"|^\W*(\w+)\W+n?Did you mean''', text)
        nearest = re.search(r'Did you mean "(\w+)"', text)
        if field:
            hint = f": did you mean {nearest[1]!r}?" if nearest else ""
            raise ConfigError(f"there is no config field {(field[1] or field[2])!r}{hint}") from None
        raise ConfigError(text.strip().splitlines()[0]) from None
