import copy
import json
import os

import numpy as np
import pytest

from lljax.config import default_config
from lljax.data.formats import Document
from lljax.data.tokens import prepare, share
from lljax.errors import DataError, ModelError


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
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
        return prepare(data, copy.deepcopy(tokenizer), vocabulary, tmp_path / "run" / "data",
                       tokenizer_fingerprint=fingerprint, progress=progress)
    return run


def contents(store, tokenizer) -> set[str]:
    return {tokenizer.decode(store.tokens(i)) for i in range(len(store))}


def test_documents_come_back_with_their_tokens_masks_and_counts(tmp_path, run, tokenizer):
    rows = [{"prompt": "abc ", "completion": "x"}, *texts(3)]
    store = run(write(tmp_path / "a.jsonl", rows)).train
    assert len(store) == 4 and store.tokens(0).dtype == np.uint32 and store.mask(0).dtype == bool
    assert tokenizer.decode(store.tokens(0)) == "abc x<end>"
    assert tokenizer.decode(store.tokens(0)[store.mask(0)]) == "x<end>"
    assert tokenizer.decode(store.tokens(3)) == texts(3)[2]["text"] + "<end>" and store.mask(3).all()
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
    moved = write(tmp_path / "b.jsonl", texts(20))       # the same bytes elsewhere, at another time
    assert run(moved).fingerprint == first.fingerprint
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "run" / "data").rglob("*.bin")) == made
    others = [run(file, fingerprint="u"), run(file, loss_on="everything"), run(file, valid_fraction=0.5),
              run(write(tmp_path / "c.jsonl", texts(20, start=1)))]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_the_tokens_that_end_a_document_are_among_what_the_cache_depends_on(tmp_path, tokenizer):
    data = default_config().data
    data.train = (write(tmp_path / "a.jsonl", texts(1)),)
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(5)
    for one in (tokenizer, other):
        store = prepare(data, copy.deepcopy(one), 320, tmp_path / "data", tokenizer_fingerprint="t").train
        assert store.tokens(0)[-1] == one.eos_token_id


def test_two_processes_may_make_the_same_tokens_at_once(tmp_path, run):
    file = write(tmp_path / "a.jsonl", texts(5))

    def overtaken(rows, title):
        assert len(run(file).train) == 5                 # another one starts later and finishes first
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


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin"])
def test_tokens_that_are_cut_short_are_refused(tmp_path, run, name):
    file = write(tmp_path / "a.jsonl", texts(5))
    run(file)
    (kept,) = (tmp_path / "run" / "data").glob(f"*/train/{name}")
    os.truncate(kept, kept.stat().st_size - 4)
    with pytest.raises(DataError, match="cut short: delete the folder"):
        run(file)


def test_a_document_is_held_out_whatever_stands_beside_it(tmp_path, run, tokenizer):
    small = run(write(tmp_path / "a.jsonl", texts(60)), valid_fraction=0.3)
    large = run(write(tmp_path / "b.jsonl", texts(30, start=60) + texts(60)[::-1]), valid_fraction=0.3)
    assert 5 < len(small.valid) < 35 and len(small.train) + len(small.valid) == 60
    assert not contents(small.train, tokenizer) & contents(small.valid, tokenizer)
    assert contents(small.valid, tokenizer) <= contents(large.valid, tokenizer)
    assert contents(small.train, tokenizer) <= contents(large.train, tokenizer)
    assert 0 <= share(Document("file:1", text="a")) == share(Document("other:9", text="a")) < 1


def test_files_named_as_held_out_are_held_out(tmp_path, run, tokenizer):
    held = write(tmp_path / "b.jsonl", texts(3, start=50))
    documents = run(write(tmp_path / "a.jsonl", texts(5)), valid=(held,))
    assert len(documents.train) == 5 and contents(documents.valid, tokenizer) == {
        row["text"] + "<end>" for row in texts(3, start=50)}


def test_bad_rows_are_listed_without_their_text(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [*texts(98), "{secret", {"messages": [{"role": "user", "content": "secret"}]}])
    documents = run(file, max_bad_fraction=0.02)
    assert documents.bad == 2 and len(documents.train) == 98
    listed = (tmp_path / "run" / "bad_rows.jsonl").read_text()
    assert "secret" not in listed
    assert [(row["file"], row["line"], sorted(row)) for row in map(json.loads, listed.splitlines())] == [
        (file, line, ["file", "line", "reason"]) for line in (99, 100)]


def test_the_listed_bad_rows_are_those_of_this_run_also_from_the_cache(tmp_path, run):
    files = [write(tmp_path / f"{name}.jsonl", [*texts(1, start), "{"]) for start, name in enumerate("ab")]
    for file in (*files, files[0]):
        run(file, max_bad_fraction=0.9)
        assert json.loads((tmp_path / "run" / "bad_rows.jsonl").read_text())["file"] == file
    run(write(tmp_path / "c.jsonl", texts(3)))
    assert not (tmp_path / "run" / "bad_rows.jsonl").exists()


def test_too_many_bad_rows_stop_the_run_on_every_try(tmp_path, run):
    file = write(tmp_path / "a.jsonl", [*texts(97), "{", "{", "{"])
    for _ in range(2):                                   # the second finds the tokens in the cache
        with pytest.raises(DataError, match=r"3 of 100 rows .*a\.jsonl:98: ") as error:
            run(file, max_bad_fraction=0.02)
        assert error.value.exit_code == 3 and "\n" not in str(error.value)


def test_no_rows_at_all_are_refused(tmp_path, run):
    with pytest.raises(DataError, match="no usable row"):
        run(write(tmp_path / "a.jsonl", []))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, run):
    with pytest.raises(ModelError, match="vocabulary"):
        run(write(tmp_path / "a.jsonl", texts(3)), vocabulary=50)
