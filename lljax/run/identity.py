"""The identity of a run: settings and files that must stay the same, so that a resumed run ends as
if it had not been interrupted.
"""

import itertools
import json
import os
from typing import Any

from lljax.config import Config, identity
from lljax.errors import ConfigError

SHOWN = 60  # characters of a value in a message


def identity_of(config: Config, **files) -> dict:
    """The identity of a run of `config`. files: fingerprints, by name."""
    return {**files, **identity(config)}


def check_identity(saved: dict, now: dict, step: int | None = None) -> None:
    """Refuses to resume a run under another base, tokenizer, data or setting. The weights of the
    base have a check of their own, `check_weights`.

    step: the newest checkpoint. If it is the last step of the saved schedule, the schedule may have
      become longer.

    Raises:
      ConfigError: a field differs; the message names it with the old and the new value.
    """
    later = {"special_tokens", "adapter"} - saved.keys()  # runs of earlier versions have none
    # The tokens of the data depend on the tokenizer: name the cause before its consequence.
    for field in sorted(
        (saved.keys() | now.keys()) - {"weights"} - later,
        key=lambda field: (field == "data", field),
    ):
        old, new = (json.loads(json.dumps(values.get(field))) for values in (saved, now))
        longer = field == "context.schedule" and lengthens(old, new)
        if old == new or longer and old[-1][0] == step:
            continue
        hint = f"; when step {old[-1][0]} is done it may be made longer" if longer else ""
        raise ConfigError(
            f"this run was started with another {field} ({_difference(old, new)}): restore it, or "
            f"give a new --workdir{hint}"
        )


def _difference(old: Any, new: Any) -> str:
    """Two values of JSON in words; of long values the first place that differs."""
    place = ""
    while max(len(str(old)), len(str(new))) > SHOWN:
        if isinstance(old, list) and isinstance(new, list):
            pairs = dict(enumerate(itertools.zip_longest(old, new, fillvalue="nothing")))
        elif isinstance(old, dict) and isinstance(new, dict):
            pairs = {key: (old.get(key, "nothing"), new.get(key, "nothing")) for key in old | new}
        else:
            break
        index = next(key for key, (before, after) in pairs.items() if before != after)
        old, new = pairs[index]
        place += f"[{index!r}]"
    old, new = str(old), str(new)
    same = len(os.path.commonprefix([old, new]))
    start = max(0, same - SHOWN // 2) if max(len(old), len(new)) > SHOWN else 0
    old, new = (("..." if start else "") + text[start : start + SHOWN] for text in (old, new))
    return f"{place and f'at {place}: '}{old}, now {new}"


def lengthens(old, new) -> bool:
    """Whether a schedule has the stages of an old one, the last longer or followed by others."""
    old, new = ([list(stage) for stage in schedule] for schedule in (old, new))
    last = len(old) - 1
    return (
        len(new) > last
        and new[:last] == old[:last]
        and new[last][1:] == old[last][1:]
        and new[last][0] >= old[last][0]
        and new[-1][0] > old[-1][0]
    )


def check_weights(saved: dict, now: dict) -> None:
    """Refuses a base with other weights than the run was started with.

    saved, now: {name: crc32}, as lljax.interop.huggingface.load_weights returns it. A name that
      only one of them has does not count: another version may read more tensors, and runs of
      earlier versions have no checksums.

    Raises:
      ConfigError: a tensor differs; the message names the first one.
    """
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name]:
            raise ConfigError(
                f"model.path holds other weights than those this run was started with ({name} "
                "differs): put them back, or give a new --workdir"
            )
