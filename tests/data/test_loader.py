import json

import numpy as np
import pytest

from lljax.data.loader import eval_batches, make_loader, rows_per_epoch
from lljax.data.packing import IGNORED, Pieces
from lljax.data.token_store import TokenStore, TokenWriter
from lljax.errors import DataError

T = 32


@pytest.fixture
def store(tmp_path) -> TokenStore:
    """Documents of tokens 1, 2, 3 ... all different, some longer than two rows."""
    rng, writer, first = np.random.default_rng(1), TokenWriter(tmp_path / "store"), 1
    for n in rng.integers(1, 100, 29):
        writer.add(np.arange(first, first + n, dtype=np.uint32), rng.random(n) < 0.7)
        first += n
    writer.close()
    return TokenStore(tmp_path / "store")


def loader(store, **arguments):
    return make_loader(
        store,
        **({"length": T, "rows": 2, "packing": True, "overlong": "split", "seed": 3} | arguments),
    )


def content(batch) -> tuple[bytes, ...]:
    return tuple(batch[name].tobytes() for name in ("tokens", "targets", "segments", "positions"))


def predicted(batches) -> list[int]:
    return sorted(
        int(token) for batch in batches for token in batch["targets"].ravel() if token != IGNORED
    )


def trained_tokens(store) -> list[int]:
    return [
        int(token) for i in range(len(store)) for token in store.tokens(i)[1:][store.mask(i)[1:]]
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("local_rows", [None, [1]])
def test_resuming_anywhere_gives_the_batches_that_would_have_come(store, packing, local_rows):
    arguments = {"packing": packing, "local_rows": local_rows}
    stream = loader(store, **arguments)
    epochs = 3 * len(Pieces(store, T, "split"))  # one piece a row: batches beyond the third epoch
    states, batches = [], []
    for _ in range(epochs // 2 + 4):
        states.append(json.dumps(stream.get_state()))
        batches.append(content(next(stream)))
    for k in range(0, len(batches) - 3, 5):
        resumed = loader(store, **arguments)
        resumed.set_state(json.loads(states[k]))
        assert [content(next(resumed)) for _ in range(3)] == batches[k : k + 3], k


def test_the_order_is_a_function_of_the_seed(store):
    first, same, other = (content(next(loader(store, seed=seed))) for seed in (3, 3, 4))
    assert first == same != other
    assert content(next(loader(store, seed=3 + 2**32))) == first  # any Python int will do


def test_batches_have_the_shape_and_type_of_the_contract(store):
    batch = next(loader(store, rows=5))
    assert sorted(batch) == ["positions", "segments", "targets", "tokens"]
    assert all(x.shape == (5, T) and x.dtype == np.int32 for x in batch.values())


@pytest.mark.parametrize("packing", [True, False])
def test_shares_of_a_batch_are_its_rows_and_leave_the_same_state(store, packing):
    whole, shares = (
        loader(store, rows=4, packing=packing),
        [loader(store, rows=4, packing=packing, local_rows=m) for m in ([0, 2], [1, 3])],
    )
    for _ in range(20):
        batch, parts = next(whole), [next(share) for share in shares]
        for name, x in batch.items():
            np.testing.assert_array_equal(
                x[[0, 2, 1, 3]], np.concatenate([part[name] for part in parts])
            )
        assert whole.get_state() == shares[0].get_state() == shares[1].get_state()


def test_an_epoch_reads_everything_once_in_an_order_of_its_own(store):
    stream, pieces = loader(store, rows=1, packing=False), len(Pieces(store, T, "split"))
    epochs = [[next(stream) for _ in range(pieces)] for _ in range(2)]
    for epoch in epochs:
        assert predicted(epoch) == trained_tokens(store)
    assert [content(batch) for batch in epochs[0]] != [content(batch) for batch in epochs[1]]


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_per_epoch_are_those_that_hold_every_trained_token_once(store, packing, overlong):
    rows = rows_per_epoch(store, length=T, packing=packing, overlong=overlong, seed=3)
    pieces = Pieces(store, T, overlong)
    asked = sum(int((pieces[i]["targets"] != IGNORED).sum()) for i in range(len(pieces)))
    stream = loader(store, rows=1, packing=packing, overlong=overlong)
    found = len(predicted(next(stream) for _ in range(rows)))
    # When rows are packed, the next epoch fills the last ones up.
    assert abs(found - asked) < 16 * T if packing else found == asked


def test_no_piece_is_refused(tmp_path):
    writer = TokenWriter(tmp_path / "long")
    writer.add(np.arange(9, dtype=np.uint32), np.ones(9, bool))
    writer.close()
    with pytest.raises(DataError, match=r"no piece of at most 2 tokens \(data\.overlong='drop'\)"):
        loader(TokenStore(tmp_path / "long"), length=2, overlong="drop")


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_evaluation_reads_held_out_pieces_once_and_fills_the_last_batch_up(store, rows):
    batches = list(eval_batches(store, length=T, rows=rows, limit=10**9))
    assert all(
        x.shape == (rows, T) and x.dtype == np.int32 for batch in batches for x in batch.values()
    )
    assert predicted(batches) == trained_tokens(store)
    again = list(eval_batches(store, length=T, rows=rows, limit=10**9))
    assert list(map(content, batches)) == list(map(content, again))
    limited = list(eval_batches(store, length=T, rows=rows, limit=5))
    assert sum((batch["segments"][:, 0] > 0).sum() for batch in limited) == 5 and len(limited) == -(
        -5 // rows
    )
