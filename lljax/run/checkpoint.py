"""Checkpoints of everything a step changes (not of the frozen base), with a checksum per leaf.

Orbax commits a step by renaming its folder, so a killed process leaves the earlier step whole; but
it does not notice a flipped bit. A step that does not restore to its checksums is set aside, and
the step before it is taken.
"""

import fnmatch
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as managers

from lljax.errors import ConfigError, LljaxError, first_line, printable
from lljax.parallel.processes import any_of, from_all, is_first
from lljax.run.checksums import checksum, describe

LOOKS = 100  # tries of a reader while the run deletes the checkpoints that it has listed


class Checkpoints:
    """The checkpoints of a run, in `workdir`/checkpoints: every `every_steps` steps or
    `every_minutes` minutes, the newest `keep` of them.

    rollback: whether the run rolls back, see `rollback_target`; True also keeps the newest target.
    read_only: whether only a reader of a run, which may still be going, opens them; then nothing is
      cleaned up, moved or written.
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
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder = Path(workdir).resolve() / "checkpoints"
        # Orbax finds its files by a pattern that begins with the path of the folder.
        if "\\" in str(self.folder) or not fnmatch.fnmatchcase(str(self.folder), str(self.folder)):
            raise ConfigError(
                f"--workdir={workdir}: Orbax could not read checkpoints back from a path with \\ "
                "or [...] in it: name another folder"
            )
        self.every_steps, self.every_seconds = every_steps, 60 * every_minutes
        self._keep, self._rollback, self._read_only, self._clock = keep, rollback, read_only, clock
        self._manager = self._open()
        self._last_save = clock()

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only and is_first():
            # left unfinished by a killed process; Orbax would delete them in a thread, later
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        kept: list[Any] = [managers.LatestN(self._keep)]
        if self._rollback:
            kept.append(managers.EveryNSteps(self.every_steps, max_to_keep=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept), create=not self._read_only
        )
        return self._list_again(lambda: ocp.CheckpointManager(self.folder, options=options))

    def due(self, step: int) -> bool:
        """Whether to save after `step`. The clock of any process decides for all."""
        return step % self.every_steps == 0 or any_of(
            self._clock() - self._last_save >= self.every_seconds
        )

    def save(
        self, step: int, items: dict, progress: dict, identity: dict, *, wait: bool = False
    ) -> bool:
        """Saves named pytrees, the run's progress (position in the data and rollbacks; the same in
        every process) and its identity, in the background. Returns whether it did: a step that is
        saved already stays as it is.

        The host copy is taken before this returns, so the arrays may be donated afterwards. An
        error in the background is a warning, and the next save tries again.

        wait: returns when the step is committed. The first save of a run waits too: it shows
          whether the folder can be written.

        Raises:
          LljaxError: with `wait`, the step could not be written.
        """
        self.settle()
        wait = wait or not self._manager.all_steps()
        self._last_save = self._clock()
        new = step not in self._manager.all_steps()
        if new:
            leaves = {name: describe(item) for name, item in items.items()}
            note = {"identity": identity, "loader": progress, "leaves": leaves}
            note |= {"checksum": checksum(note)}
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
        return new

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The newest complete step, read from the folder: any thread may ask, whatever the others
        wait for.
        """
        return max(
            (int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()),
            default=None,
        )

    def identity(self) -> dict | None:
        """The identity in the newest readable checkpoint; None if there is no checkpoint.

        Raises:
          ConfigError: no checkpoint can be read. A run that started over beside them would delete
            them.
        """

        def newest_of(steps: list[int]) -> dict | None:
            unreadable = []
            for step in reversed(steps):
                try:
                    identity = self._note(step)["identity"]
                except Exception as error:
                    unreadable.append(f"{step}: {_first_line(error)}")
                    continue
                if unreadable:
                    logging.warning(
                        "%s: the notes of some steps cannot be read (%s)",
                        self.folder,
                        "; ".join(unreadable),
                    )
                return identity
            if steps:
                raise ConfigError(
                    f"{self.folder}: no checkpoint can be read (steps {'; '.join(unreadable)}): "
                    "repair the folder, or give a new --workdir"
                )
            return None

        return self._look_again(newest_of)

    def restore(self, like: dict, step: int | None = None) -> tuple[int, dict, dict] | None:
        """(step, items, progress) of the newest sound checkpoint, or of `step`; None if there
        is no checkpoint.

        Newer damaged checkpoints are moved to `workdir`/damaged-checkpoint-<step>, with a warning.

        like: {name: pytree of `jax.ShapeDtypeStruct` with shardings} of the items to restore.

        Raises:
          ConfigError: there is no checkpoint of `step`, no checkpoint is sound, or they belong to
            another model.
        """

        def sound_of(steps: list[int]) -> tuple[int, dict, dict] | None:
            if step is not None and step not in steps:
                raise ConfigError(
                    f"{self.folder}: no checkpoint of step {step}; there are {steps or 'none'}"
                )
            return self._newest_sound([step] if step is not None else reversed(steps), like)

        return self._look_again(sound_of)

    def _list_again(self, list_steps: Callable) -> Any:
        """list_steps(), which lists the checkpoints; again if a run deleted one meanwhile."""
        for _ in range(LOOKS):
            try:
                return list_steps()
            except FileNotFoundError:
                if not self._read_only:
                    raise
        return list_steps()

    def _look_again(self, look: Callable[[list[int]], Any]) -> Any:
        """look(steps); again if it fails and a run has written and deleted steps meanwhile."""
        for _ in range(LOOKS):
            steps = self.steps()
            try:
                return look(steps)
            except ConfigError:
                if not self._read_only:
                    raise
                self._list_again(self._manager.reload)
                if self.steps() == steps:
                    raise
        return look(self.steps())

    def rollback_target(self, since: int) -> int | None:
        """The step to roll back to: the newest multiple of `every_steps` from step `since` on.

        Steps saved by the clock or by a signal do not count, so that a run that was interrupted
        goes back as far as an uninterrupted one.
        """
        self.settle()
        steps = [step for step in self.steps() if step % self.every_steps == 0 and step >= since]
        return from_all(max(steps, default=None))[0]

    def roll_back(self, like: dict, since: int) -> tuple[int, dict]:
        """(step, items) of `rollback_target(since)`; if that is damaged, of the newest sound step
        between `since` and it. Later checkpoints are deleted.

        Raises:
          ConfigError: no such checkpoint is sound.
        """
        target = self.rollback_target(since)
        assert target is not None, "the caller has asked for the target"
        candidates = [step for step in reversed(self.steps()) if since <= step <= target]
        restored = self._newest_sound(candidates, like)
        assert restored is not None, "there is at least the target"
        step, items, _ = restored
        # The newest first: a run that is killed meanwhile resumes from a later one and comes here.
        for later in reversed(self.steps()):
            if later > step:
                self._manager.delete(later)
        return step, items

    def _newest_sound(self, candidates: Iterable[int], like: dict) -> tuple[int, dict, dict] | None:
        """As `restore`, from the first sound step of `candidates`."""
        damaged: dict[int, str] = {}
        for candidate in candidates:
            items, progress, reason = self._try(candidate, like)
            if not reason:
                self._set_aside(damaged, candidate)
                return candidate, items, progress
            damaged[candidate] = reason
        if damaged:  # all of them: more likely the fault of the machine, so none is moved
            listed = "; ".join(f"step {number}: {reason}" for number, reason in damaged.items())
            raise ConfigError(
                f"{self.folder}: no checkpoint can be restored ({listed}): repair the folder, ask "
                "for another step, or give a new --workdir"
            )
        return None

    def _try(self, step: int, like: dict) -> tuple[dict, dict, str]:
        """(items, progress, "") of a sound step; ({}, {}, damage) if any process finds some."""
        note: dict = {}
        restored: Any = None
        try:
            note = self._note(step)
            saved = note["leaves"]
            _same_model({name: saved.get(name, {}) for name in like}, like, self.folder / str(step))
            arguments = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
            reason = ""
        except (LljaxError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not the fault of the checkpoint
        except Exception as error:  # Orbax reports damage as many kinds of exception
            reason = _first_line(error)
        if reasons := [reason for reason in from_all(reason) if reason]:
            return {}, {}, reasons[0]
        items = {name: restored[name] for name in like}
        wrong = [
            f"the checksum of {name}{leaf} differs"
            for name, item in items.items()
            for leaf, (*_, crc) in describe(item).items()
            if crc != note["leaves"][name][leaf][-1]
        ]
        wrong = sum(from_all(wrong), [])
        return ({}, {}, wrong[0]) if wrong else (items, note["loader"], "")

    def _set_aside(self, damaged: dict[int, str], sound: int) -> None:
        for step, reason in damaged.items():
            aside = self.folder.parent / f"damaged-checkpoint-{step}"
            number = 2
            while aside.exists():
                aside, number = aside.with_name(f"damaged-checkpoint-{step}-{number}"), number + 1
            logging.warning(
                "the checkpoint of step %d is damaged (%s): going on from step %d%s",
                step,
                reason,
                sound,
                "" if self._read_only else f"; the damaged one is kept as {aside}",
            )
            if not self._read_only and is_first():
                (self.folder / str(step)).rename(aside)
        if damaged and not self._read_only:
            from_all(None)  # nobody looks before all are moved
            self._manager.reload()

    def _note(self, step: int) -> dict:
        arguments = ocp.args.Composite(note=ocp.args.JsonRestore())
        note = self._manager.restore(step, args=arguments)["note"]
        saved = note.pop("checksum", None)  # runs of earlier versions have none
        if saved not in (None, checksum(note)):
            raise ValueError("the checksum of its note differs")
        return note

    def settle(self, *, fatal: bool = False) -> None:
        """Waits for the save in the background and reports its outcome."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error, None, fatal)

    def _failed(self, error: Exception, step: int | None, fatal: bool) -> None:
        self._manager.reload()  # forget the step that is not there
        subject = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        saved = self.steps()
        newest = (
            f"; the last one saved is of step {saved[-1]}"
            if saved
            else ", or name another; none is there yet"
        )
        text = (
            f"{subject} could not be written to {printable(str(self.folder))} "
            f"({_first_line(error)}): make room or mend the folder{newest}"
        )
        if fatal:
            raise LljaxError(text) from error
        logging.warning("%s", text)

    def close(self) -> None:
        self.settle(fatal=True)
        self._manager.close()


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, for `Checkpoints.restore`."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _same_model(saved: dict, like: dict, where: Path) -> None:
    """Raises ConfigError if leaves are missing, left over, or of another shape or dtype."""
    for name, item in like.items():
        wanted = {
            jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)]
            for path, x in jax.tree_util.tree_leaves_with_path(item)
        }
        for leaf in sorted(saved[name].keys() | wanted.keys()):
            old, new = saved[name].get(leaf, ["none"])[:2], wanted.get(leaf, ["none"])
            if old != new:
                raise ConfigError(
                    f"{where}: it holds {name}{leaf} as {old} and this configuration needs {new}: "
                    "use the configuration of that run, or give a new --workdir"
                )


def _first_line(error: Exception) -> str:
    # the settings of the array store follow
    return first_line(error).partition(" [tensorstore_spec")[0][:300]
