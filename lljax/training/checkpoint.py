"""Checkpoints of what a step changes (not of the frozen base), with a checksum per leaf.

Orbax commits a step by renaming its folder, so a killed process leaves the step before; but it does not notice a
flipped bit. A step that does not restore to its checksums is set aside and the one before it is taken.
"""

import json
import logging
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from lljax.errors import ConfigError


class Checkpoints:
    """The checkpoints of a run, in `workdir`/checkpoints: every N steps or M minutes, the last `keep` of them."""

    def __init__(self, workdir: Path, *, every_steps: int, every_minutes: float, keep: int):
        self.folder = Path(workdir).resolve() / "checkpoints"
        self.every_steps, self.every_seconds = every_steps, 60 * every_minutes
        self._keep = keep
        self._manager = self._open()
        self._last = time.monotonic()

    def _open(self):
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True,
                                               enable_async_checkpointing=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0 or time.monotonic() - self._last >= self.every_seconds

    def save(self, step: int, items: dict, loader_state: dict, identity: dict, *, wait: bool = False) -> None:
        """Saves named pytrees, this process' loader state and the run's identity, in the background.

        The host copy is taken before this returns, so the arrays may be donated afterwards.
        """
        if step not in self._manager.all_steps():
            note = {"identity": identity, "loader": {str(jax.process_index()): loader_state},
                    "checksums": {name: checksums(item) for name, item in items.items()}}
            self._manager.save(step, args=ocp.args.Composite(
                note=ocp.args.JsonSave(note), **{name: ocp.args.StandardSave(item) for name, item in items.items()}))
            self._last = time.monotonic()
        if wait:
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def identity(self, step: int) -> dict:
        return self._note(step)["identity"]

    def restore(self, like: dict, step: int | None = None):
        """(step, items, loader state) of the newest sound checkpoint (or of `step`), or None where there is none.

        like: {name: pytree of `jax.ShapeDtypeStruct` with shardings} of the items that are wanted.

        Raises:
          ConfigError: `step` is asked for and is not there, or is damaged.
        """
        if step is not None and step not in self.steps():
            raise ConfigError(f"{self.folder}: no checkpoint of step {step}; there are {self.steps() or 'none'}")
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                note = self._note(candidate)
                restored = self._manager.restore(candidate, args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in like.items()}))
                for name in like:
                    if checksums(restored[name]) != note["checksums"][name]:
                        raise ValueError(f"a checksum of {name} differs")
                return candidate, dict(restored.items()), note["loader"][str(jax.process_index())]
            except Exception as error:       # Orbax reports damage as many kinds of exception
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if step is not None:
                    raise ConfigError(f"{self.folder / str(step)}: damaged ({reason}); choose another step") from None
                self._set_aside(candidate, reason)
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        aside = self.folder.parent / f"damaged-checkpoint-{step}"
        logging.warning("checkpoint of step %d is damaged (%s): moved to %s; the one before it is used", step, reason, aside)
        self._manager.close()
        (self.folder / str(step)).rename(aside)
        self._manager = self._open()

    def _note(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """What `restore` needs to know of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def checksums(state) -> dict[str, int]:
    """crc32 of every leaf, by its path. Over the shards that this process holds, in order."""
    def crc(leaf):
        total = 0
        for shard in sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)[:1] \
                if leaf.is_fully_replicated else leaf.addressable_shards:
            total = zlib.crc32(np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8), total)
        return total
    return {jax.tree_util.keystr(path): crc(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def check_identity(saved: dict, now: dict) -> None:
    """Refuses to go on with a run under another base, tokenizer, data or setting.

    Raises:
      ConfigError: the line names what differs, with the old and the new value.
    """
    for field in sorted(saved.keys() | now.keys()):
        old, new = (json.loads(json.dumps(x.get(field))) for x in (saved, now))
        if old != new:
            short = [str(x)[:60] for x in (old, new)]
            raise ConfigError(f"this run was started with another {field} ({short[0]}, now {short[1]}): restore it, or "
                              "give a new --workdir")
