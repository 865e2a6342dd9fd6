import grain
import numpy as np
import pytest

from lljax.data.batch import NEXT_TOKEN, Field, dtypes
from lljax.data.packing import IGNORED, Pieces, pack, row_of
from lljax.data.token_store import TokenStore, TokenWriter

T = 16
# around every multiple of T
LENGTHS = (1, 2, 3, 15, 16, 17, 18, 31, 32, 33, 34, 47, 48, 49, 100, 5, 5, 5)


def make_store(folder, lengths=LENGTHS, trained=0.7, seed=0) -> TokenStore:
    """Documents of tokens 1, 2, 3 ... all different, so that a token says which document it is
    of.
    """
    rng, writer, first = np.random.default_rng(seed), TokenWriter(folder / "store"), 1
    for n in lengths:
        writer.add(np.arange(first, first + n, dtype=np.uint32), rng.random(n) < trained)
        first += n
    writer.close()
    return TokenStore(folder / "store")


def trained_tokens(store, documents=None) -> list[int]:
    """Every token to be predicted once an epoch: the first of a document has nothing before it."""
    documents = range(len(store)) if documents is None else documents
    return [int(token) for i in documents for token in store.tokens(i)[1:][store.mask(i)[1:]]]


def predicted(rows) -> list[int]:
    return sorted(
        int(token) for row in rows for token in row["targets"].ravel() if token != IGNORED
    )


def packed_rows(store, *, packing, overlong="split"):
    pieces = grain.MapDataset.source(Pieces(store, T, overlong)).to_iter_dataset()
    return list(pack(pieces, T, packing=packing))


@pytest.mark.parametrize("trained", [0.0, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("packing", [True, False])
def test_split_asks_for_every_trained_token_exactly_once(tmp_path, packing, trained):
    store = make_store(tmp_path, trained=trained)
    rows = packed_rows(store, packing=packing)
    assert predicted(rows) == trained_tokens(store)
    # no row without anything to learn
    assert all((row["targets"] != IGNORED).any() for row in rows)


@pytest.mark.parametrize("packing", [True, False])
def test_no_document_sees_or_predicts_another(tmp_path, packing):
    store = make_store(tmp_path)
    document = np.concatenate([[-1], np.repeat(np.arange(len(store)), store.lengths)])
    several = 0
    for row in packed_rows(store, packing=packing):
        assert all(row[name].dtype == np.int32 and row[name].shape == (T,) for name in row)
        tokens, targets, segments, positions = (
            row[name] for name in ("tokens", "targets", "segments", "positions")
        )
        asked = targets != IGNORED
        assert (targets[asked] == tokens[asked] + 1).all()  # the next token of the same document
        assert (document[targets[asked]] == document[tokens[asked]]).all()
        padding = segments == 0
        assert (
            (tokens[padding] == 0).all()
            and not asked[padding].any()
            and (positions[padding] == 0).all()
        )
        assert set(segments[~padding]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert len(set(document[tokens[inside]])) == 1
            assert (positions[inside] == np.arange(inside.sum())).all()
        several += segments.max() > 1
    assert (several > 0) == packing


@pytest.mark.parametrize("trained", [0.0, 0.05, 0.7])
@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_what_is_trained_and_what_is_left_out_is_counted(tmp_path, trained, overlong):
    store = make_store(tmp_path, trained=trained)
    pieces, expected = Pieces(store, T, overlong), []
    for i, n in enumerate(store.lengths):
        starts = (
            range(0, n, T)
            if overlong == "split"
            else [0]
            if n <= T or overlong == "truncate"
            else []
        )
        expected += [(i, s) for s in starts if store.mask(i)[s + 1 : s + T + 1].any()]
    assert list(zip(pieces.document.tolist(), pieces.start.tolist(), strict=True)) == expected
    counts = pieces.counts()
    assert counts["documents"] == len({i for i, _ in expected}) and counts["pieces"] == len(
        expected
    )
    assert counts["dropped"] == (sum(n > T for n in store.lengths) if overlong == "drop" else 0)
    assert counts["documents"] + counts["dropped"] + counts["untrained"] == len(store)
    assert counts["tokens"] == sum(len(pieces[i]["tokens"]) for i in range(len(pieces)))


def test_pieces_of_a_document_follow_one_another_without_a_gap(tmp_path):
    store = make_store(tmp_path, (100,), trained=1.0)
    pieces = Pieces(store, T, "split")
    assert (
        np.concatenate([pieces[i]["tokens"] for i in range(len(pieces))]).tolist()
        == store.tokens(0).tolist()
    )
    assert all(len(pieces[i]["tokens"]) == T for i in range(len(pieces) - 1))


def test_truncate_keeps_the_beginning_and_drop_keeps_what_fits(tmp_path):
    store = make_store(tmp_path, trained=1.0)
    beginnings = [int(token) for i in range(len(store)) for token in store.tokens(i)[1 : T + 1]]
    assert predicted(packed_rows(store, packing=True, overlong="truncate")) == beginnings
    short = [i for i in range(len(store)) if store.lengths[i] <= T]
    assert predicted(packed_rows(store, packing=True, overlong="drop")) == trained_tokens(
        store, short
    )


def test_first_fit_leaves_little_padding(tmp_path):
    lengths = np.random.default_rng(0).integers(2, T + 1, 400)
    rows = packed_rows(make_store(tmp_path, lengths, trained=1.0), packing=True)
    assert np.mean([(row["segments"] == 0).mean() for row in rows]) < 0.15


def test_a_row_of_an_empty_piece_is_padding_alone():
    nothing = np.zeros(0, np.int32)
    row = row_of({"tokens": nothing, "targets": nothing}, T)
    assert (
        (row["targets"] == IGNORED).all()
        and not row["segments"].any()
        and not row["positions"].any()
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_field_of_an_objective_follows_its_tokens(tmp_path, packing):
    """Computed from tokens and targets of a piece, padded with its value, in its dtype."""
    half = Field("half", np.float32, -1.0, lambda piece: piece["tokens"] / 2)
    store = make_store(tmp_path)
    pieces = grain.MapDataset.source(Pieces(store, T, "split")).to_iter_dataset()
    plain = packed_rows(store, packing=packing)
    rows = list(pack(pieces, T, packing=packing, fields=(*NEXT_TOKEN, half)))
    assert len(rows) == len(plain)
    for row, without in zip(rows, plain, strict=True):
        assert {name: row[name].dtype for name in row} == {
            name: dtype for name, dtype in dtypes((*NEXT_TOKEN, half)).items() if name != "index"
        }
        wanted = np.where(row["segments"] == 0, -1.0, row["tokens"] / 2)
        np.testing.assert_array_equal(row["half"], wanted)
        for name in without:
            np.testing.assert_array_equal(row[name], without[name])
