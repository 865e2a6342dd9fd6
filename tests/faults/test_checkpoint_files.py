"""A checkpoint with a damaged file restores bit for bit, or the run resumes from the one before."""

import os
import shutil

import numpy as np
import pytest
from faults.runs import SAVED_EVERY, STEPS

pytestmark = pytest.mark.faults
FLIPS = 100  # of a bit, at random places of each file
WHOLE_FILE = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: os.truncate(path, 0),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
}


def flip(path, rng) -> None:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def cut(run, whole, last: int) -> None:
    """A copy of the whole run that has come to `last`, with its last two checkpoints."""
    shutil.copytree(whole.run.workdir, run.workdir)
    for step in whole.states:
        if step not in (last, last - SAVED_EVERY):
            shutil.rmtree(run.workdir / "checkpoints" / str(step))


@pytest.mark.parametrize("part", ["trainable", "rest", "note", "."])
def test_any_damage_to_a_file_is_seen_or_does_no_harm(whole, new_run, tally, part, caplog):
    run, rng = new_run("run"), np.random.default_rng(0)
    cut(run, whole, STEPS)
    folder = run.workdir / "checkpoints" / str(STEPS)
    files = sorted(
        path
        for path in (folder.iterdir() if part == "." else (folder / part).rglob("*"))
        if path.is_file()
    )
    assert files
    rows = {name: tally(f"checkpoint file {name}", len(files)) for name in WHOLE_FILE}
    rows["flipped"] = tally("checkpoint file with a flipped bit", FLIPS * len(files))
    fell_back = 0
    for path in files:
        content = path.read_bytes()
        for name, damage in [
            *WHOLE_FILE.items(),
            *[("flipped", lambda path: flip(path, rng))] * FLIPS,
        ]:
            damage(path)
            caplog.clear()
            try:
                left = run.newest()
                # The one before is as good only where it is said that the last is damaged.
                said = left.step == STEPS or f"step {STEPS} is damaged" in caplog.text
                rows[name].case(left == whole.states[left.step] and said, (path, left.step))
                fell_back += left.step != STEPS
            except Exception as error:
                rows[name].case(False, (path, f"{type(error).__name__}: {error}"))
            path.write_bytes(content)
    # of the marks beside the parts none is needed
    assert run.newest().step == STEPS and (fell_back or part == ".")
    for row in rows.values():
        row.done()


DAMAGE = {
    "a bit of the weights": lambda step, rng: flip(largest(step / "trainable"), rng),
    "half of the optimizer": lambda step, rng: os.truncate(largest(step / "rest"), 1_000),
    "no note": lambda step, rng: (step / "note" / "metadata").unlink(),
    "nothing": lambda step, rng: [shutil.rmtree(step), step.mkdir()],
}


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, new_run, tally):
    row, rng = (
        tally("runs resumed over a damaged checkpoint", len(DAMAGE)),
        np.random.default_rng(0),
    )
    for number, (name, damage) in enumerate(DAMAGE.items()):
        run = new_run(f"run-{number}")
        cut(run, whole, STEPS // 2)
        damage(run.workdir / "checkpoints" / str(STEPS // 2), rng)
        run.finish()
        row.case(
            f"resumed at step {STEPS // 2 - SAVED_EVERY}" in run.log.read_text()
            and run.newest() == whole.states[STEPS]
            and run.records() == whole.records,
            name,
        )
    row.done()
