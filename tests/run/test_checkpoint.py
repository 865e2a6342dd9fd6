"""What was saved comes back bit for bit or not at all, on whatever mesh; a damaged step never costs
a sound one.
"""

import itertools
import logging
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from run.cases import bits, limit_file_size

from lljax.errors import ConfigError, LljaxError
from lljax.run.checkpoint import Checkpoints, abstract

IDENTITY = {"base": "b" * 64, "tokenizer": "t", "data": "d", "lora.rank": 8}


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp")[-len(shape) :])


def state(where: Mesh, seed: int = 0):
    """A trained subtree with the optax.partition state of two roles, after one update, and the
    rest of a state.
    """
    rows = NamedSharding(where, PartitionSpec(None, "fsdp"))
    trainable = {
        "a": jax.device_put(jax.random.normal(jax.random.key(seed), (3, 8, 4)), rows),
        "norm": jnp.array([0.0, -0.0, 1e-40, 3.0], jnp.bfloat16),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"lora_a": optax.adamw(1e-3), "norm": optax.adamw(1e-4)},
            {"a": "lora_a", "norm": "norm"},
        ),
    )
    _, moments = optimizer.update(trainable, optimizer.init(trainable), trainable)
    return {
        "trainable": trainable,
        "rest": {
            "optimizer": moments,
            "step": jnp.int32(seed),
            "key": jax.random.key_data(jax.random.key(seed)),
            "norms": jnp.array([1.5, np.nan, -np.inf], jnp.float32),
            "bad": jnp.int32(0),
        },
    }


def like(items, where: Mesh):
    """Where `items` are to lie on another mesh."""

    def place(x):
        spec = PartitionSpec(None, "fsdp") if x.ndim == 3 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(where, spec))

    return jax.tree.map(place, items)


def checkpoints(workdir, **changes):
    return Checkpoints(workdir, **{"every_steps": 10, "every_minutes": 30.0, "keep": 3} | changes)


def saved(workdir, *steps):
    c = checkpoints(workdir)
    for step in steps:
        c.save(step, state(mesh(8), step), {"row": step}, IDENTITY)
    c.close()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shape", [(8,), (1,), (2, 4), (4, 2)])
def test_a_state_comes_back_bitwise_on_any_mesh(tmp_path, shape):
    saved(tmp_path, 10)
    before = state(mesh(8), 10)
    step, items, loader = checkpoints(tmp_path).restore(like(before, mesh(*shape)))
    assert (step, loader) == (10, {"row": 10})
    assert bits(items) == bits(before)
    assert jax.tree.structure(items) == jax.tree.structure(before)
    assert items["trainable"]["a"].sharding.mesh.shape == mesh(*shape).shape


def test_a_part_of_the_items_restores_alone(tmp_path):
    saved(tmp_path, 10)
    before = {"trainable": state(mesh(8), 10)["trainable"]}
    assert bits(checkpoints(tmp_path).restore(jax.tree.map(abstract, before))[1]) == bits(before)


def test_what_changes_after_save_returns_is_not_in_the_checkpoint(tmp_path):
    c, before = checkpoints(tmp_path), state(mesh(8))
    expected = bits(before)
    spoil = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + jnp.ones_like(x), tree), donate_argnums=0
    )
    c.save(1, before, {}, IDENTITY)
    after = jax.block_until_ready(spoil(before))
    c.close()
    assert bits(checkpoints(tmp_path).restore(jax.tree.map(abstract, after))[1]) == expected


def test_the_newest_are_kept_and_a_saved_step_is_not_written_again(tmp_path):
    c = checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 3):
        c.save(step, state(mesh(8), step), {}, IDENTITY, wait=True)
    assert c.steps() == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_due_by_steps_or_by_minutes_since_the_last_save(tmp_path):
    now = [0.0]
    c = checkpoints(tmp_path, every_steps=10, every_minutes=1.0, clock=lambda: now[0])
    assert [step for step in range(1, 31) if c.due(step)] == [10, 20, 30]
    now[0] = 59.0
    assert not c.due(31)
    now[0] = 60.0
    assert c.due(31)
    c.save(31, state(mesh(8)), {}, IDENTITY)
    assert not c.due(32)


def test_nothing_saved_is_none(tmp_path):
    c = checkpoints(tmp_path)
    assert (
        c.steps() == []
        and c.identity() is None
        and c.restore(like(state(mesh(8)), mesh(8))) is None
    )


def test_a_missing_step_lists_the_ones_there_are(tmp_path):
    saved(tmp_path, 10, 20)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 15; there are \[10, 20\]"):
        checkpoints(tmp_path).restore(like(state(mesh(8)), mesh(8)), step=15)


# ---------------------------------------------------------------- rollback
def test_the_last_checkpoint_to_go_back_to_is_kept_beside_the_newest(tmp_path):
    c = checkpoints(tmp_path, keep=2, rollback=True)
    for step in (10, 13, 20, 23, 25, 27):  # those between were saved by the clock
        c.save(step, state(mesh(8), step), {}, IDENTITY)
    c.close()
    assert checkpoints(tmp_path).steps() == [20, 25, 27]


@pytest.mark.parametrize(
    "since,damaged,back,left",
    [
        (0, (), 20, [10, 13, 20]),
        (20, (), 20, [10, 13, 20]),
        (0, (20,), 13, [10, 13]),
        (21, (), None, [10, 13, 20, 23]),
    ],
)
def test_a_rollback_finds_the_newest_sound_one_of_a_multiple_and_deletes_what_came_after(
    tmp_path, since, damaged, back, left
):
    c, before = checkpoints(tmp_path, keep=9), state(mesh(8), 20)
    for step in (10, 13, 20, 23):
        c.save(step, state(mesh(8), step), {}, IDENTITY)
    c.settle()
    for step in damaged:
        flip(largest(tmp_path / "checkpoints" / str(step) / "trainable"))
    assert c.rollback_target(since) == (None if back is None else 20)
    if back:
        step, items = c.roll_back(like(before, mesh(8)), since)
        assert step == back and bits(items) == bits(state(mesh(8), back))
    c.close()
    assert checkpoints(tmp_path).steps() == left
    assert c.newest() == left[-1]


def test_if_no_checkpoint_to_go_back_to_is_sound_the_run_ends(tmp_path):
    saved(tmp_path, 10, 20)
    flip(largest(tmp_path / "checkpoints" / "20" / "trainable"))
    c = checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint can be restored.*step 20"):
        c.roll_back(like(state(mesh(8)), mesh(8)), 11)
    assert c.steps() == [10, 20]


def test_a_wall_clock_that_jumps_saves_neither_more_nor_less(tmp_path, monkeypatch):
    jumps, wall = itertools.cycle([86_400, 0, -86_400]), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + next(jumps))
    c = checkpoints(tmp_path)
    assert not c.due(9) and c.due(10) and not c.due(11)
    now = time.monotonic()
    c._clock = lambda: now + 31 * 60
    assert c.due(11)


# ---------------------------------------------------------------- damage
def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


DAMAGE = {
    "bit flip": lambda step: flip(largest(step / "rest")),
    "truncated": lambda step: os.truncate(largest(step / "trainable"), 100),
    "emptied": lambda step: (step / "rest" / "_METADATA").write_text(""),
    "deleted": lambda step: (step / "trainable" / "manifest.ocdbt").unlink(),
    "half a note": lambda step: os.truncate(step / "note" / "metadata", 50),
    "no item": lambda step: shutil.rmtree(step / "rest"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_set_aside_for_the_one_before(tmp_path, damage, caplog):
    saved(tmp_path, 10, 20)
    damage(tmp_path / "checkpoints" / "20")
    (tmp_path / "damaged-checkpoint-20").mkdir()  # of an earlier misfortune
    c, before = checkpoints(tmp_path), state(mesh(8), 10)
    assert c.identity() == IDENTITY
    with caplog.at_level(logging.WARNING):
        step, items, loader = c.restore(like(before, mesh(8)))
    assert (step, loader) == (10, {"row": 10}) and bits(items) == bits(before)
    assert any(
        "step 20" in record.getMessage() and "step 10" in record.getMessage()
        for record in caplog.records
    )
    assert c.steps() == [10] and (tmp_path / "damaged-checkpoint-20-2").is_dir()
    c.save(20, state(mesh(8), 20), {}, IDENTITY, wait=True)
    assert c.steps() == [10, 20]


def test_another_place_in_the_data_is_damage_too(tmp_path):
    """What the note says is not in the checksums of the arrays."""
    saved(tmp_path, 10, 20)
    note = tmp_path / "checkpoints" / "20" / "note" / "metadata"
    note.write_text(
        note.read_text().replace('"row": 20', '"row": 21').replace('"row":20', '"row":21')
    )
    step, _, loader = checkpoints(tmp_path).restore(like(state(mesh(8)), mesh(8)))
    assert (step, loader) == (10, {"row": 10})


@pytest.mark.slow
def test_no_change_of_a_byte_anywhere_is_ever_silent(tmp_path):
    saved(tmp_path / "good", 10)
    before, silent = state(mesh(8), 10), []
    for i, path in enumerate(files(tmp_path / "good" / "checkpoints" / "10")):
        for share in (0.1, 0.5, 0.9):
            workdir = tmp_path / f"{i}-{share}"
            shutil.copytree(tmp_path / "good", workdir)
            victim = workdir / path.relative_to(tmp_path / "good")
            content = bytearray(victim.read_bytes())
            if content:
                content[int(len(content) * share)] ^= 1
                victim.write_bytes(content)
            try:
                items = checkpoints(workdir).restore(like(before, mesh(8)))[1]
                silent += [str(path)] * (bits(items) != bits(before))
            except ConfigError:
                pass
            shutil.rmtree(workdir)
    assert not silent


def test_if_nothing_is_sound_nothing_is_moved_and_the_run_does_not_begin_anew(tmp_path):
    saved(tmp_path, 10, 20)
    for step in ("10", "20"):
        flip(largest(tmp_path / "checkpoints" / step / "trainable"))
    c = checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint can be restored.*step 20.*step 10"):
        c.restore(like(state(mesh(8)), mesh(8)))
    assert c.steps() == [10, 20]


def test_checkpoints_of_which_no_note_can_be_read_are_no_empty_folder(tmp_path):
    """A run that began anew beside them would delete them."""
    saved(tmp_path, 10, 20)
    for step in ("10", "20"):
        os.truncate(tmp_path / "checkpoints" / step / "note" / "metadata", 5)
    with pytest.raises(ConfigError, match="no checkpoint can be read"):
        checkpoints(tmp_path).identity()


def test_another_model_is_refused_by_leaf_and_nothing_is_moved(tmp_path):
    saved(tmp_path, 10, 20)
    c, other = checkpoints(tmp_path), like(state(mesh(8)), mesh(8))
    everywhere = NamedSharding(mesh(8), PartitionSpec())
    other["trainable"]["a"] = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32, sharding=everywhere)
    with pytest.raises(
        ConfigError, match=r"trainable\['a'\] as \[\[3, 8, 4\], 'float32'\].*needs \[\[3, 8, 16\]"
    ):
        c.restore(other)
    assert c.steps() == [10, 20]


def test_a_reader_touches_nothing_of_a_run_that_goes_on(tmp_path):
    saved(tmp_path, 10, 20)
    flip(largest(tmp_path / "checkpoints" / "20" / "trainable"))
    being_written = tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp"
    being_written.mkdir()
    c = checkpoints(tmp_path, read_only=True)
    assert c.restore(like(state(mesh(8)), mesh(8)))[0] == 10
    c.close()
    assert being_written.is_dir() and (tmp_path / "checkpoints" / "20").is_dir()


def test_a_save_that_fails_is_said_in_one_line_and_costs_no_other(tmp_path, caplog):
    c = checkpoints(tmp_path)
    c.save(10, state(mesh(8), 10), {}, IDENTITY, wait=True)
    before = limit_file_size(2_000)  # stands for a full disk
    try:
        c.save(20, state(mesh(8), 20), {}, IDENTITY)
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(LljaxError, match="could not be written.*is of step 10"),
        ):
            c.save(30, state(mesh(8), 30), {}, IDENTITY, wait=True)
        assert any("could not be written" in record.getMessage() for record in caplog.records)
    finally:
        limit_file_size(before)
    c.save(40, state(mesh(8), 40), {}, IDENTITY, wait=True)
    c.close()
    assert checkpoints(tmp_path).restore(like(state(mesh(8)), mesh(8)))[0] == 40


def test_a_first_save_that_fails_is_the_end_at_once(tmp_path):
    """Orbax takes the name for one of a bucket."""
    (tmp_path / "gs:").mkdir()
    c = checkpoints(tmp_path / "gs:")
    with pytest.raises(LljaxError, match="gs:/checkpoints.*or name another; none is there yet"):
        c.save(10, state(mesh(8), 10), {}, IDENTITY)


def test_a_reader_looks_again_if_the_run_deleted_the_step_that_it_saw(tmp_path):
    begun = []

    class Overtaken(Checkpoints):
        def _note(self, step):  # between the look and the read, twice
            if len(begun) < 2:
                begun.append(step)
                shutil.rmtree(tmp_path / "checkpoints" / str(step))
                saved(tmp_path, step + 10)
            return super()._note(step)

    saved(tmp_path, 10)
    reader = Overtaken(tmp_path, every_steps=10, every_minutes=30.0, keep=3, read_only=True)
    assert reader.restore(like(state(mesh(8)), mesh(8)))[0] == 30 and begun == [10, 20]
    begun.clear()
    assert reader.identity() == IDENTITY


SAVER = """
import sys, jax, jax.numpy as jnp
from lljax.run.checkpoint import Checkpoints
c = Checkpoints(sys.argv[1], every_steps=1, every_minutes=1e9, keep=2)
print("go", flush=True)
for step in range(1, 10_000):
    c.save(step, {"trainable": {"w": jnp.full((256, 256), float(step))}}, {"row": step}, {})
"""


def test_killed_at_any_moment_the_last_committed_step_restores_and_the_leavings_go(tmp_path):
    wanted = {"trainable": {"w": abstract(jnp.zeros((256, 256)))}}
    last = 0
    for pause in (0.3, 0.55, 0.8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path / str(pause))],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        process.stdout.readline()
        time.sleep(pause)
        process.kill()
        process.wait()
        process.stdout.close()
        (tmp_path / str(pause) / "checkpoints" / "99999.orbax-checkpoint-tmp").mkdir()
        c = checkpoints(tmp_path / str(pause))
        if restored := c.restore(wanted):
            step, items, loader = restored
            last = max(last, step)
            assert loader == {"row": step} and np.all(np.asarray(items["trainable"]["w"]) == step)
        c.close()
        assert not list((tmp_path / str(pause) / "checkpoints").glob("*tmp*"))
    assert last > 0


@pytest.mark.parametrize("name", ["a [red]x", "back\\x"])
def test_a_folder_that_checkpoints_could_not_be_read_back_from_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="name another folder"):
        Checkpoints(tmp_path / name, every_steps=1, every_minutes=1e9, keep=1)
