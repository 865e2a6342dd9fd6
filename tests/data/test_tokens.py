import copy
import fcntl
import json
import os
import shutil
import time

import numpy as np
import pytest

from lljax.config import default_config
from lljax.data import sources, template_date, tokens
from lljax.data.formats import Document
from lljax.data.tokens import ABANDONED, LOCK, prepare, share
from lljax.errors import DataError, ModelError


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def texts(count, start=0):
    return [{"text": f"def f{i}(x): return x + {i}"} for i in range(start, start + count)]


@pytest.fixture
def run(tmp_path, tokenizer):
    def run(*paths, vocabulary=320, fingerprint="t", progress=lambda rows, title: rows, **fields):
        data = default_config().data
        data.train = paths
        for name, value in fields.items():
            data[name] = value
        return prepare(
            data,
            copy.deepcopy(tokenizer),
            vocabulary,
            tmp_path / "run" / "data",
            tokenizer_fingerprint=fingerprint,
            progress=progress,
        )

    return run


def contents(store, tokenizer) -> set[str]:
    return {tokenizer.decode(store.tokens(i)) for i in range(len(store))}


def test_documents_come_back_with_their_tokens_masks_and_counts(tmp_path, run, tokenizer):
    rows = [{"prompt": "abc ", "completion": "x"}, *texts(3)]
    store = run(write(tmp_path / "a.jsonl", rows)).train
    assert len(store) == 4 and store.tokens(0).dtype == np.uint32 and store.mask(0).dtype == bool
    assert tokenizer.decode(store.tokens(0)) == "abc x<end>"
    assert tokenizer.decode(store.tokens(0)[store.mask(0)]) == "x<end>"
    assert (
        tokenizer.decode(store.tokens(3)) == texts(3)[2]["text"] + "<end>" and store.mask(3).all()
    )
    assert store.lengths.tolist() == [len(store.tokens(i)) for i in range(4)]
    counts = store.statistics()
    assert counts["documents"] == 4 and counts["tokens"] == store.lengths.sum()
    assert counts["trained_tokens"] == sum(store.mask(i).sum() for i in range(4))
    assert counts["lengths"]["max"] == store.lengths.max()
    assert sum(counts["histogram"]["counts"]) == 4
    assert len(counts["histogram"]["edges"]) == len(counts["histogram"]["counts"]) + 1


def test_tokens_are_made_once_and_again_when_anything_they_depend_on_changes(tmp_path, run):
    file = write(tmp_path / "a.jsonl", texts(20))
    first = run(file)
    made = sorted(p.stat().st_mtime_ns for p in (tmp_path / "run" / "data").rglob("*.bin"))
    moved = write(tmp_path / "b.jsonl", texts(20))  # the same bytes elsewhere, at another time
    assert run(moved).fingerprint == first.fingerprint
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "run" / "data").rglob("*.bin")) == made
    others = [
        run(file, fingerprint="u"),
        run(file, loss_on="everything"),
        run(file, valid_fraction=0.5),
        run(write(tmp_path / "c.jsonl", texts(20, start=1))),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_the_tokens_that_end_a_document_are_among_what_the_cache_depends_on(tmp_path, tokenizer):
    data = default_config().data
    data.train = (write(tmp_path / "a.jsonl", texts(1)),)
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(5)
    for one in (tokenizer, other):
        store = prepare(
            data, copy.deepcopy(one), 320, tmp_path / "data", tokenizer_fingerprint="t"
        ).train
        assert store.tokens(0)[-1] == one.eos_token_id


def test_two_processes_may_make_the_same_tokens_at_once(tmp_path, run):
    file = write(tmp_path / "a.jsonl", texts(5))

    def overtaken(rows, title):
        assert len(run(file).train) == 5  # another one starts later and finishes first
        return rows

    assert len(run(file, progress=overtaken).train) == 5
    assert len(list((tmp_path / "run" / "data").iterdir())) == 1


def test_an_interrupted_build_is_not_taken_for_a_finished_one(tmp_path, run):
    file = write(tmp_path / "a.jsonl", texts(5))
    run(file)
    (folder,) = (tmp_path / "run" / "data").iterdir()
    (folder / "counts.json").unlink()
    folder.rename(folder.with_name(folder.name + ".tmp"))
    assert len(run(file).train) == 5


DAMAGE = ("a byte changed", "cut short", "missing")
FILES = ("train/tokens.bin", "valid/mask.bin", "train/offsets.npy", "bad_rows.jsonl", "counts.json")


# Without counts.json, the mark of a folder that is complete, it is built again.
@pytest.mark.parametrize(
    "name,damage",
    [
        (name, damage)
        for name in FILES
        for damage in DAMAGE
        if (name, damage) != ("counts.json", "missing")
    ],
)
def test_tokens_that_are_not_as_they_were_written_are_refused(tmp_path, run, name, damage):
    file, how = (
        write(tmp_path / "a.jsonl", [*texts(20), "{"]),
        {"valid_fraction": 0.5, "max_bad_fraction": 0.5},
    )
    run(file, **how)
    (folder,) = (tmp_path / "run" / "data").iterdir()
    content = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content[:-1] if damage == "cut short" else content)
    with pytest.raises(DataError, match="damaged .*delete the folder") as error:
        run(file, **how)
    assert "\n" not in str(error.value)
    shutil.rmtree(folder)
    assert len(run(file, **how).train)


def test_a_file_that_changes_while_it_is_read_leaves_no_tokens(tmp_path, run, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 100)
    file = write(tmp_path / "a.jsonl", texts(50))

    def rewritten(rows, title):
        yield next(rows)
        write(tmp_path / "a.jsonl", texts(3))
        yield from rows

    with pytest.raises(DataError, match="a.jsonl: the file changed while it was read"):
        run(file, progress=rewritten)
    assert not list((tmp_path / "run" / "data").iterdir()) and len(run(file).train) == 3


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(tmp_path, run):
    data = tmp_path / "run" / "data"
    for name in ("killed", "alive", "early", "old"):
        (data / f"{name}.tmp" / "train").mkdir(parents=True)
    for name in ("killed", "alive"):
        (data / f"{name}.tmp" / LOCK).touch()
    os.utime(data / "old.tmp", (0, time.time() - ABANDONED - 1))
    with open(data / "alive.tmp" / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(write(tmp_path / "a.jsonl", texts(3)))
        assert sorted(path.name for path in data.glob("*.tmp")) == ["alive.tmp", "early.tmp"]
    run(write(tmp_path / "a.jsonl", texts(3)))
    assert [path.name for path in data.glob("*.tmp")] == ["early.tmp"]


@pytest.mark.parametrize(
    "name,make", [("run/data", "file"), ("run/bad_rows.jsonl", "folder"), ("run", "file")]
)
def test_a_file_in_the_place_of_a_folder_is_named_in_one_line(tmp_path, run, name, make):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch() if make == "file" else path.mkdir()
    with pytest.raises(
        DataError, match=f"{name}.*: move it away, or use another --workdir"
    ) as error:
        run(write(tmp_path / "a.jsonl", [*texts(3), "{"]), max_bad_fraction=0.5)
    assert "\n" not in str(error.value)


DATED = (
    "{{ strftime_now('%d %b %Y') }} "
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
)


def test_the_date_in_a_template_is_that_of_the_first_reading_of_the_run(
    tmp_path, run, tokenizer, monkeypatch
):
    file = write(
        tmp_path / "a.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    )

    class Clock(template_date.datetime):
        day = 3

        @classmethod
        def now(cls):
            return cls(2024, 2, cls.day)

    monkeypatch.setattr(template_date, "datetime", Clock)
    monkeypatch.setattr(tokenizer, "chat_template", DATED)
    first = run(file)
    assert tokenizer.decode(first.train.tokens(0)).startswith("03 Feb 2024 a")
    Clock.day = 4
    assert run(file).fingerprint == first.fingerprint
    (folder,) = (path for path in (tmp_path / "run" / "data").iterdir() if path.is_dir())
    shutil.rmtree(folder)
    assert tokenizer.decode(run(file).train.tokens(0)).startswith("03 Feb 2024 a")
    (tmp_path / "run" / "data" / "clock").unlink()  # as in another folder
    other = run(file)
    assert tokenizer.decode(other.train.tokens(0)).startswith("04 Feb 2024 a")
    assert other.fingerprint != first.fingerprint
    (tmp_path / "run" / "data" / "clock").write_text("soon")
    with pytest.raises(DataError, match="clock: not the date and time"):
        run(file)


def test_a_library_that_encodes_otherwise_makes_tokens_of_its_own(tmp_path, run, monkeypatch):
    file, encode = write(tmp_path / "a.jsonl", texts(5)), tokens.encode
    first = run(file).fingerprint
    monkeypatch.setattr(tokens, "encode", lambda *how: tuple(part[:-1] for part in encode(*how)))
    assert run(file).fingerprint != first


def test_what_is_not_read_is_counted_by_file_and_key(tmp_path, run, tokenizer, monkeypatch):
    talk = [
        {"role": "user", "content": "a", "mood": 1, "when": 2},
        {"role": "assistant", "content": "b"},
    ]
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m.mood }}{{ m.content }}{% endfor %}"
    )
    first = write(
        tmp_path / "a.jsonl",
        [{"messages": talk, "id": 1}, *({"text": f"{i}", "id": i} for i in range(9))],
    )
    second = write(tmp_path / "b.jsonl", ["{", {"text": "c", "meta": {"x": 1}}])
    found = run(first, valid=(second,), max_bad_fraction=0.5).counts
    assert found["train"] == {
        "rows": 10,
        "bad_rows": 0,
        "conversations": 1,
        "unread": {first: {"id": 10, "messages.when": 1}},
    }
    assert found["valid"] == {
        "rows": 2,
        "bad_rows": 1,
        "conversations": 0,
        "unread": {second: {"meta": 1}},
    }
    assert run(first, valid=(second,), max_bad_fraction=0.5).counts == found  # from the cache


def test_many_unknown_keys_are_counted_without_end(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [{"text": "a", f"key_{i}": 1} for i in range(300)])
    unread = run(file).counts["train"]["unread"][file]
    assert len(unread) == 101 and sum(unread.values()) == 300 and unread["(others)"] == 200


def test_a_document_is_held_out_whatever_stands_beside_it(tmp_path, run, tokenizer):
    small = run(write(tmp_path / "a.jsonl", texts(60)), valid_fraction=0.3)
    large = run(
        write(tmp_path / "b.jsonl", texts(30, start=60) + texts(60)[::-1]), valid_fraction=0.3
    )
    assert 5 < len(small.valid) < 35 and len(small.train) + len(small.valid) == 60
    assert not contents(small.train, tokenizer) & contents(small.valid, tokenizer)
    assert contents(small.valid, tokenizer) <= contents(large.valid, tokenizer)
    assert contents(small.train, tokenizer) <= contents(large.train, tokenizer)
    assert 0 <= share(Document("file:1", text="a")) == share(Document("other:9", text="a")) < 1


def test_files_named_as_held_out_are_held_out(tmp_path, run, tokenizer):
    held = write(tmp_path / "b.jsonl", texts(3, start=50))
    documents = run(write(tmp_path / "a.jsonl", texts(5)), valid=(held,))
    assert len(documents.train) == 5 and contents(documents.valid, tokenizer) == {
        row["text"] + "<end>" for row in texts(3, start=50)
    }


def test_bad_rows_are_listed_without_their_text(tmp_path, run):
    file = write(
        tmp_path / "a.jsonl",
        [*texts(98), "{secret", {"messages": [{"role": "user", "content": "secret"}]}],
    )
    documents = run(file, max_bad_fraction=0.02)
    assert documents.bad == 2 and len(documents.train) == 98
    listed = (tmp_path / "run" / "bad_rows.jsonl").read_text()
    assert "secret" not in listed
    assert [
        (row["file"], row["line"], sorted(row)) for row in map(json.loads, listed.splitlines())
    ] == [(file, line, ["file", "line", "reason"]) for line in (99, 100)]


def test_the_listed_bad_rows_are_those_of_this_run_also_from_the_cache(tmp_path, run):
    files = [
        write(tmp_path / f"{name}.jsonl", [*texts(1, start), "{"])
        for start, name in enumerate("ab")
    ]
    for file in (*files, files[0]):
        run(file, max_bad_fraction=0.9)
        assert json.loads((tmp_path / "run" / "bad_rows.jsonl").read_text())["file"] == file
    run(write(tmp_path / "c.jsonl", texts(3)))
    assert not (tmp_path / "run" / "bad_rows.jsonl").exists()


def test_too_many_bad_rows_stop_the_run_on_every_try(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [*texts(97), "{", "{", "{"])
    for _ in range(2):  # the second finds the tokens in the cache
        with pytest.raises(DataError, match=r"3 of 100 rows .*a\.jsonl:98: ") as error:
            run(file, max_bad_fraction=0.02)
        assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_no_rows_at_all_are_refused(tmp_path, run):
    with pytest.raises(DataError, match="no usable row"):
        run(write(tmp_path / "a.jsonl", []))


@pytest.mark.parametrize("valid_fraction,count", [(1e-9, "none"), (1 - 1e-9, "all")])
def test_a_share_that_holds_out_nothing_or_everything_is_refused(
    tmp_path, run, valid_fraction, count
):
    for _ in range(2):
        with pytest.raises(
            DataError, match=f"holds {count} of the 20 documents out: set another share"
        ):
            run(write(tmp_path / "a.jsonl", texts(20)), valid_fraction=valid_fraction)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_files_of_which_no_row_is_usable_are_refused_though_others_are(tmp_path, run, part):
    paths = {
        "train": write(tmp_path / "a.jsonl", texts(20)),
        "valid": write(tmp_path / "b.jsonl", texts(20, 20)),
    }
    paths[part] = write(tmp_path / "c.jsonl", ["{"])
    with pytest.raises(DataError, match=rf"data.{part}=.*c.jsonl.* holds no usable row"):
        run(paths["train"], valid=(paths["valid"],), max_bad_fraction=0.5)


@pytest.mark.parametrize("field,name", [("data.train", "train"), ("data.valid", "valid")])
def test_a_missing_file_is_named_with_its_field(tmp_path, run, field, name):
    file, missing = write(tmp_path / "a.jsonl", texts(3)), str(tmp_path / "none.jsonl")
    with pytest.raises(
        DataError, match=f"^{field}: {missing}: there is no such file; `lljax data folder`"
    ):
        run(
            *((missing,) if name == "train" else (file,)),
            valid=(missing,) if name == "valid" else (),
        )


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_also_from_the_cache(tmp_path, run):
    file = write(tmp_path / "a.jsonl", texts(3))
    with pytest.raises(ModelError, match="a.jsonl:1.*vocabulary has 50"):
        run(file, vocabulary=50)
    run(file)
    with pytest.raises(ModelError, match="vocabulary has 50"):
        run(file, vocabulary=50)


def test_the_limit_of_a_row_is_a_field_and_part_of_what_the_tokens_depend_on(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [*texts(3), {"text": "a" * 2000}])
    whole = run(file)
    limited = run(file, max_row_bytes=1024, max_bad_fraction=0.5)
    assert limited.bad == 1 and whole.bad == 0 and limited.fingerprint != whole.fingerprint
