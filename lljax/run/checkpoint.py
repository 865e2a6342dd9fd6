"""Checkpoints of what a step changes (not of the frozen base), with a checksum per leaf.

Orbax commits a step by renaming its folder, so a killed process leaves the step before; but it does
not notice a flipped bit. A step that does not restore to its checksums is set aside and the one
before it is taken.
"""

import fnmatch
import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as managers
from jax.experimental import multihost_utils

from lljax.errors import ConfigError, LljaxError, first_line, printable
from lljax.parallel.processes import any_of, first, from_all

LOOKS = 100  # at the checkpoints of a run that goes on and deletes those that were seen
GATHERED = 1 << 28  # bytes of an array that every device may hold for its checksum; else in slices


class Checkpoints:
    """The checkpoints of a run, in `workdir`/checkpoints: every N steps or M minutes, the last
    `keep` of them.

    rollback: for a run that goes back to them, see `point`; it keeps the last that it may go back
      to, beside the last `keep`.
    read_only: for a look at a run that may still be going; nothing is cleaned up, moved or written.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        every_steps: int,
        every_minutes: float,
        keep: int,
        rollback: bool = False,
        read_only: bool = False,
        clock=time.monotonic,
    ):
        self.folder = Path(workdir).resolve() / "checkpoints"
        # Orbax looks for its files by a pattern that begins with the folder's own path.
        if "\\" in str(self.folder) or not fnmatch.fnmatchcase(str(self.folder), str(self.folder)):
            raise ConfigError(
                f"--workdir={workdir}: Orbax could not read checkpoints back from a path with \\ or [...] "
                "in it: name another folder"
            )
        self.every_steps, self.every_seconds = every_steps, 60 * every_minutes
        self._keep, self._rollback, self._read_only, self._clock = keep, rollback, read_only, clock
        self._manager = self._open()
        self._last = clock()

    def _open(self):
        # what a killed process left half-written (Orbax does it in a thread)
        if not self._read_only and first():
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        kept = [managers.LatestN(self._keep)]
        if self._rollback:
            kept.append(managers.EveryNSteps(self.every_steps, max_to_keep=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept), create=not self._read_only
        )
        return self._listed(lambda: ocp.CheckpointManager(self.folder, options=options))

    def due(self, step: int) -> bool:
        """Whether to save after `step`. The clock of any process decides for all."""
        return step % self.every_steps == 0 or any_of(
            self._clock() - self._last >= self.every_seconds
        )

    def save(
        self, step: int, items: dict, loader_state: dict, identity: dict, *, wait: bool = False
    ) -> None:
        """Saves named pytrees, the loader state (the same in every process) and the run's identity,
        in the background.

        The host copy is taken before this returns, so the arrays may be donated afterwards. A step
        that is saved already is left as it is. What goes wrong in the background is a warning, and
        the next save tries again.

        wait: returns when the step is committed; so does the first save of a run, which shows
          whether the folder takes any.

        Raises:
          LljaxError: with `wait`, the step could not be written.
        """
        self.settle()
        wait = wait or not self._manager.all_steps()
        self._last = self._clock()
        if step not in self._manager.all_steps():
            leaves = {name: describe(item) for name, item in items.items()}
            note = {"identity": identity, "loader": loader_state, "leaves": leaves}
            note |= {"checksum": _checksum(note)}
            arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            try:
                self._manager.save(
                    step,
                    args=ocp.args.Composite(note=ocp.args.JsonSave(note), **arguments),
                    force=True,
                )
            except Exception as error:  # Orbax reports a full disk, say, as many kinds of exception
                self._failed(error, step, fatal=wait)
        if wait:
            self.settle(fatal=True)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The newest step that is there whole. From the folder: any thread may ask, whatever the
        others wait for.
        """
        return max(
            (int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()),
            default=None,
        )

    def identity(self) -> dict | None:
        """The identity that the newest readable checkpoint was saved with; None where there is no
        checkpoint.

        Raises:
          ConfigError: none of them can be read. A run that began anew beside them would delete
            them.
        """

        def newest_of(steps):
            unreadable = []
            for step in reversed(steps):
                try:
                    found = self._note(step)["identity"]
                except Exception as error:
                    unreadable.append(f"{step}: {_first_line(error)}")
                    continue
                if unreadable:
                    logging.warning(
                        "%s: the notes of some steps cannot be read (%s)",
                        self.folder,
                        "; ".join(unreadable),
                    )
                return found
            if steps:
                raise ConfigError(
                    f"{self.folder}: no checkpoint can be read (steps {'; '.join(unreadable)}): repair the "
                    "folder, or give a new --workdir"
                )
            return None

        return self._looked(newest_of)

    def restore(self, like: dict, step: int | None = None):
        """(step, items, loader state) of the newest sound checkpoint (or of `step`), or None where
        there is none.

        Damaged ones before it are moved to `workdir`/damaged-checkpoint-<step>, with a warning.

        like: {name: pytree of `jax.ShapeDtypeStruct` with shardings} of the items that are wanted.

        Raises:
          ConfigError: `step` is asked for and is not there, no checkpoint is sound, or they are of
            another model.
        """

        def sound_of(steps):
            if step is not None and step not in steps:
                raise ConfigError(
                    f"{self.folder}: no checkpoint of step {step}; there are {steps or 'none'}"
                )
            return self._newest_sound([step] if step is not None else reversed(steps), like)

        return self._looked(sound_of)

    def _listed(self, listing: Callable):
        """listing(), in which Orbax lists the checkpoints; and again where a run that goes on
        deleted one meanwhile.
        """
        for _ in range(LOOKS):
            try:
                return listing()
            except FileNotFoundError:
                if not self._read_only:
                    raise
        return listing()

    def _looked(self, look: Callable):
        """look(steps); and again where it fails and there are other steps by then, which a run that
        goes on has made and for which it has deleted those that were looked at.
        """
        for _ in range(LOOKS):
            steps = self.steps()
            try:
                return look(steps)
            except ConfigError:
                if not self._read_only:
                    raise
                self._listed(self._manager.reload)
                if self.steps() == steps:
                    raise
        return look(self.steps())

    def point(self, since: int) -> int | None:
        """The checkpoint to roll back to: the newest of a multiple of `every_steps`, from step
        `since` on. What a clock or a signal saved does not count, so that a run that was stopped in
        between goes back as far as one that was not.
        """
        self.settle()
        steps = [step for step in self.steps() if step % self.every_steps == 0 and step >= since]
        return from_all(max(steps, default=None))[0]

    def roll_back(self, like: dict, since: int):
        """(step, items) of `point(since)`, or, where that is damaged, of the newest sound one from
        `since` to it. Those of
        later steps are deleted: the run does not go by them any more.

        Raises:
          ConfigError: none of them is sound.
        """
        point = self.point(since)
        step, items, _ = self._newest_sound(
            [step for step in reversed(self.steps()) if since <= step <= point], like
        )
        # the newest first: killed among them, a run comes here again from the others
        for later in reversed(self.steps()):
            if later > step:
                self._manager.delete(later)
        return step, items

    def _newest_sound(self, candidates, like: dict):
        """As `restore`, of the steps `candidates`."""
        damaged: dict[int, str] = {}
        for candidate in candidates:
            found, reason = self._try(candidate, like)
            if not reason:
                self._set_aside(damaged, candidate)
                return candidate, *found
            damaged[candidate] = reason
        if damaged:  # all of them: more likely the machine's fault, so none is moved
            listed = "; ".join(f"step {number}: {reason}" for number, reason in damaged.items())
            raise ConfigError(
                f"{self.folder}: no checkpoint can be restored ({listed}): repair the folder, ask for "
                "another step, or give a new --workdir"
            )
        return None

    def _try(self, step: int, like: dict):
        """((items, loader state), "") or (None, what is damaged); what another process finds counts
        too.
        """
        try:
            note = self._note(step)
            saved = note["leaves"]
            _same_model({name: saved.get(name, {}) for name in like}, like, self.folder / str(step))
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in like.items()}
                ),
            )
            reason = ""
        except (LljaxError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as error:  # Orbax reports damage as many kinds of exception
            reason = _first_line(error)
        if reasons := [reason for reason in from_all(reason) if reason]:
            return None, reasons[0]
        items = {name: restored[name] for name in like}
        wrong = [
            f"the checksum of {name}{leaf} differs"
            for name, item in items.items()
            for leaf, (*_, checksum) in describe(item).items()
            if checksum != saved[name][leaf][-1]
        ]
        wrong = sum(from_all(wrong), [])
        return ((items, note["loader"]), "") if not wrong else (None, wrong[0])

    def _set_aside(self, damaged: dict[int, str], good: int) -> None:
        for step, reason in damaged.items():
            aside = self.folder.parent / f"damaged-checkpoint-{step}"
            number = 2
            while aside.exists():
                aside, number = aside.with_name(f"damaged-checkpoint-{step}-{number}"), number + 1
            logging.warning(
                "the checkpoint of step %d is damaged (%s): going on from step %d%s",
                step,
                reason,
                good,
                "" if self._read_only else f"; the damaged one is kept as {aside}",
            )
            if not self._read_only and first():
                (self.folder / str(step)).rename(aside)
        if damaged and not self._read_only:
            from_all(None)  # nobody looks before all are moved
            self._manager.reload()

    def _note(self, step: int) -> dict:
        note = self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))[
            "note"
        ]
        checksum = note.pop("checksum", None)  # older runs have none
        if checksum not in (None, _checksum(note)):
            raise ValueError("the checksum of its note differs")
        return note

    def settle(self, *, fatal: bool = False) -> None:
        """Waits for the save in the background and reports how it went."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error, None, fatal)

    def _failed(self, error: Exception, step: int | None, fatal: bool) -> None:
        self._manager.reload()  # forget the step that is not there
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        saved = self.steps()
        then = (
            f"; the last one saved is of step {saved[-1]}"
            if saved
            else ", or name another; none is there yet"
        )
        text = (
            f"{which} could not be written to {printable(str(self.folder))} ({_first_line(error)}): make room or mend the "
            f"folder{then}"
        )
        if fatal:
            raise LljaxError(text) from error
        logging.warning("%s", text)

    def close(self) -> None:
        self.settle(fatal=True)
        self._manager.close()


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """What `restore` needs to know of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def describe(item) -> dict[str, list]:
    """[shape, dtype, crc32] of every leaf by its path. The crc is of the whole array, however it is
    sharded.
    """

    def one(x):
        crc = 0
        for part in (
            [x] if x.nbytes <= GATHERED else _slices(x, max(1, len(x) * GATHERED // x.nbytes))
        ):
            whole = (
                np.asarray(part)
                if _at_hand(part)
                else multihost_utils.process_allgather(part, tiled=True)
            )
            crc = zlib.crc32(np.ascontiguousarray(whole).reshape(-1).view(np.uint8), crc)
        return [list(x.shape), str(x.dtype), crc]

    return {
        jax.tree_util.keystr(path): one(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(item)
    }


def _slices(x: jax.Array, rows: int):
    return (
        jax.lax.dynamic_slice_in_dim(x, start, min(rows, len(x) - start))
        for start in range(0, len(x), rows)
    )


def _checksum(note: dict) -> int:
    """The crc32 of a note, before it is written and when it is read again."""
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def _at_hand(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


def check_identity(saved: dict, now: dict, step: int | None = None) -> None:
    """Refuses to go on with a run under another base, tokenizer, data or setting. The weights are
    not looked at, see `check_weights`.

    step: of the newest checkpoint. Where it is the last of the schedule that was saved, that may
      have become longer.

    Raises:
      ConfigError: the line names what differs, with the old and the new value.
    """
    later = {"special_tokens"} - saved.keys()  # runs of earlier versions have none
    # Tokens of the data depend on the tokenizer: the cause is named, and not what follows from it.
    for field in sorted(
        (saved.keys() | now.keys()) - {"weights"} - later,
        key=lambda field: (field == "data", field),
    ):
        old, new = (json.loads(json.dumps(x.get(field))) for x in (saved, now))
        if old == new or field == "context.schedule" and old[-1][0] == step and lengthens(old, new):
            continue
        hint = ""
        if field == "context.schedule" and lengthens(old, new):
            hint = f"; when step {old[-1][0]} is done it may be made longer"
        short = [str(x)[:60] for x in (old, new)]
        raise ConfigError(
            f"this run was started with another {field} ({short[0]}, now {short[1]}): restore it, or "
            f"give a new --workdir{hint}"
        )


def lengthens(old, new) -> bool:
    """Whether a schedule has the same stages as an old one, the last for longer or followed by
    others.
    """
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
    """Refuses a base whose weights are others than those that a run was begun with.

    saved, now: {a name: crc32}, as `lljax.interop.huggingface.load_weights` returns it. What only
      one of them has, which a later version may read, does not count; nor does a run that was begun
      before there were such sums.

    Raises:
      ConfigError: the line names the first tensor that differs.
    """
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name]:
            raise ConfigError(
                f"model.path holds other weights than those this run was started with ({name} differs): put them "
                "back, or give a new --workdir"
            )


def _same_model(saved: dict, like: dict, where: Path) -> None:
    """Raises ConfigError where leaves are missing, left over, or of another shape or dtype."""
    for name, item in like.items():
        wanted = {
            jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)]
            for path, x in jax.tree_util.tree_leaves_with_path(item)
        }
        for leaf in sorted(saved[name].keys() | wanted.keys()):
            old, new = saved[name].get(leaf, ["none"])[:2], wanted.get(leaf, ["none"])
            if old != new:
                raise ConfigError(
                    f"{where}: it holds {name}{leaf} as {old} and this configuration needs {new}: use "
                    "the configuration of that run, or give a new --workdir"
                )


def _first_line(error: Exception) -> str:
    # what follows is the store's own settings
    return first_line(error).partition(" [tensorstore_spec")[0][:300]
