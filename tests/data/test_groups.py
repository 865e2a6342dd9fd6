"""Groups of answers: trunk and branches, pieces, packed rows."""

import copy
import json

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from data.cases import answers, prepared, reply, spans, user
from data.templates import KINDS as TEMPLATES
from data.templates import byte_tokenizer, of_kind

from lljax.attention.mask import branched, causal, visible
from lljax.data import preferences
from lljax.data.batch import IGNORED, dtypes
from lljax.data.groups import ANSWERS, GroupPieces, branch_positions, encode_group
from lljax.data.kinds import KINDS
from lljax.data.loader import eval_batches, make_loader, rows_per_epoch
from lljax.data.packing import pack
from lljax.data.preferences import CHOSEN, MISMATCHED, REJECTED
from lljax.data.statistics import remarks, statistics
from lljax.data.template import encode, with_template
from lljax.data.token_store import TokenStore, TokenWriter
from lljax.errors import ConfigError, DataError
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize


def encoded(row, tokenizer, parse=preferences.pairs):
    return encode_group(parse(row, "file:1"), tokenizer, "assistant")


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of bytes without a template."""
    return byte_tokenizer(None, eos="<e>")


# ---------------------------------------------------------------- trunk and branches
def test_the_trunk_is_the_prompt_and_only_answers_are_trained():
    qwen = of_kind(TEMPLATES["qwen"])
    row = {
        "messages": [user("a"), reply("yes"), user("b"), reply("c")],
        "rejected_response": "d",
        "system": "s",
    }
    texts = answers(encoded(row, qwen), qwen)
    trunk = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert texts[0] == trunk
    assert texts[CHOSEN].startswith("[<think>") and texts[CHOSEN].endswith("c<|im_end|>]\n")
    assert texts[REJECTED].endswith("d<|im_end|>]\n") and sorted(texts) == [0, CHOSEN, REJECTED]


def test_thoughts_are_part_of_their_answers():
    qwen = of_kind(TEMPLATES["qwen"])
    thinking = reply("c") | {"reasoning_content": "hm"}
    texts = answers(
        encoded({"prompt": [user("b")], "chosen": [thinking], "rejected": [reply("d")]}, qwen),
        qwen,
    )
    assert texts[0] == "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert texts[CHOSEN] == "[<think>\nhm\n</think>\n\nc<|im_end|>]\n"
    assert texts[REJECTED].startswith("[<think>\n") and "d<|im_end|>]" in texts[REJECTED]


@pytest.mark.parametrize("name", TEMPLATES)
def test_trunk_and_branch_are_the_tokens_of_the_whole_document(name):
    """Whatever the template: system prompts, thoughts, its own ends of turns."""
    chat = of_kind(TEMPLATES[name])
    turns = [user("a"), reply("yes"), user("b")]
    row = {"prompt": turns, "chosen": [reply("I do")], "rejected": [reply("I")]}
    group = preferences.pairs(row, "file:1")
    found = encode_group(group, chat, "assistant")
    for role, document in group.answers:
        tokens, mask = encode(document, chat, "assistant")
        own = (found.branches == 0) | (found.branches == role)
        assert found.tokens[own].tolist() == tokens.tolist()
        assert found.mask[own].tolist() == mask.tolist()
    trunk = found.tokens[found.branches == 0]
    assert not found.mask[found.branches == 0].any()
    assert chat.decode(trunk).count("yes") == 1 and "I" not in chat.decode(trunk)[-6:]
    # Nothing of the prompt is read twice.
    assert all(found.mask[found.branches == role][0] for role in (CHOSEN, REJECTED))


def test_tools_of_a_row_are_in_the_trunk():
    qwen = of_kind(TEMPLATES["qwen"])
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"prompt": "b", "chosen": "c", "rejected": "d", "tools": tools}
    assert "look" in answers(encoded(row, qwen), qwen)[0]


@pytest.mark.parametrize(
    "prompt,chosen,rejected,expected",
    [
        ("ab", "cd", "ce", {0: "ab", 1: "[cd<e>]", 2: "[ce<e>]"}),
        # Though the answers begin alike, each of their tokens is trained.
        ("ab", "c", "cd", {0: "ab", 1: "[c<e>]", 2: "[cd<e>]"}),
        ("", "ab", "ac", {1: "[ab<e>]", 2: "[ac<e>]"}),
    ],
)
def test_the_trunk_ends_where_training_begins(letters, prompt, chosen, rejected, expected):
    group = encoded({"prompt": prompt, "chosen": chosen, "rejected": rejected}, letters)
    assert answers(group, letters) == expected
    assert group.tokens.dtype == np.uint32 and group.branches.dtype == np.uint8


def test_a_token_across_the_end_of_the_prompt_belongs_to_its_answer(tokenizer):
    """The tokenizer has a token "urn" across the end of the prompt "x retu": the answers' tokens
    differ before the end of the prompt.
    """
    row = {"prompt": "x retu", "chosen": "rn", "rejected": "xyz"}
    group = encoded(row, tokenizer)
    for role, key in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        own = (group.branches == 0) | (group.branches == role)
        ids = tokenizer(row["prompt"] + row[key])["input_ids"]
        assert group.tokens[own].tolist() == [*ids, tokenizer.eos_token_id]
    assert answers(group, tokenizer) == {0: "x ret", 1: "[urn<end>]", 2: "u[xyz<end>]"}


def test_the_trunk_of_a_single_answer_is_all_before_its_first_trained_token(letters):
    row = {"prompt": "ab", "completion": "cd", "label": 0}
    assert answers(encoded(row, letters, preferences.judged), letters) == {0: "ab", 2: "[cd<e>]"}


def test_answers_of_the_same_tokens_are_refused():
    phi = of_kind(TEMPLATES["llama"])  # trims contents
    row = {"prompt": [user("u")], "chosen": [reply("a")], "rejected": [reply("a ")]}
    with pytest.raises(ValueError, match="have the same tokens"):
        encoded(row, phi)


# ---------------------------------------------------------------- pieces
def make_store(folder, groups) -> TokenStore:
    """groups: (trunk, {role: answer}) of token lists; every token of an answer is trained."""
    writer = TokenWriter(folder / "store", ("branches",))
    for trunk, roles in groups:
        parts = [(0, trunk), *sorted(roles.items())]
        branches = np.repeat([role for role, _ in parts], [len(part) for _, part in parts])
        tokens = np.concatenate([np.asarray(part, np.uint32) for _, part in parts])
        writer.add(tokens, branches > 0, branches.astype(np.uint8))
    writer.close()
    return TokenStore(folder / "store")


def sequences(row, segment=1) -> dict[int, tuple[list, list]]:
    """For each branch of a segment: its own sequence's inputs, and its targets after the trunk."""
    inside = row["segments"] == segment if "segments" in row else np.ones(len(row["tokens"]), bool)
    tokens, targets, branches = (row[name][inside] for name in ("tokens", "targets", "branches"))
    trunk = branches == 0
    return {
        int(branch): (
            tokens[trunk | (branches == branch)].tolist(),
            targets[branches == branch].tolist(),
        )
        for branch in np.unique(branches[~trunk])
    }


def test_every_branch_of_a_piece_begins_with_the_last_token_of_the_trunk(tmp_path):
    store = make_store(tmp_path, [([5, 6, 7], {1: [8, 9], 2: [10]})])
    piece = GroupPieces(store, 16, "drop")[0]
    assert piece["tokens"].tolist() == [5, 6, 7, 8, 7]
    assert piece["targets"].tolist() == [IGNORED, IGNORED, 8, 9, 10]
    assert piece["branches"].tolist() == [0, 0, 1, 1, 2]
    assert branch_positions(piece).tolist() == [0, 1, 2, 3, 2]
    assert branch_positions(piece).dtype == np.int32


def test_without_a_trunk_the_first_token_of_an_answer_has_no_target(tmp_path):
    store = make_store(tmp_path, [([], {1: [8, 9, 3], 2: [10, 11]})])
    piece = GroupPieces(store, 16, "drop")[0]
    assert piece["tokens"].tolist() == [8, 9, 10]
    assert piece["targets"].tolist() == [9, 3, 11]
    assert branch_positions(piece).tolist() == [0, 1, 0]


def test_a_trunk_of_one_token_is_in_the_branches_alone(tmp_path):
    piece = GroupPieces(make_store(tmp_path, [([5], {1: [8], 2: [9]})]), 16, "drop")[0]
    assert piece["tokens"].tolist() == [5, 5] and piece["targets"].tolist() == [8, 9]
    assert branch_positions(piece).tolist() == [0, 0]


def test_untrained_tokens_of_an_answer_have_no_target(tmp_path):
    writer = TokenWriter(tmp_path / "store", ("branches",))
    mask = np.array([0, 0, 1, 0, 1, 0], bool)
    branches = np.array([0, 0, 1, 1, 1, 2], np.uint8)
    writer.add(np.arange(1, 7, dtype=np.uint32), mask, branches)
    writer.close()
    piece = GroupPieces(TokenStore(tmp_path / "store"), 16, "drop")[0]
    assert piece["tokens"].tolist() == [1, 2, 3, 4, 2]
    assert piece["targets"].tolist() == [IGNORED, 3, IGNORED, 5, IGNORED]


LONG = (list(range(100, 120)), {1: [1, 2], 2: [3, 4, 5]})  # 19 + 5 tokens in a row


@pytest.mark.parametrize("T", [5, 6, 7, 12, 13, 23, 24])
def test_truncation_cuts_the_middle_of_the_trunk_and_no_answer(tmp_path, T):
    pieces = GroupPieces(make_store(tmp_path, [LONG]), T, "truncate")
    piece, kept = pieces[0], min(T - 5 + 1, 20)
    assert len(piece["tokens"]) == min(T, 24)
    first = kept // 2
    trunk = LONG[0] if kept == 20 else [*LONG[0][:first], *LONG[0][20 - kept + first :]]
    assert len(trunk) == kept and trunk[-1] == 119  # the question's end predicts the answers
    assert sequences(piece) == {
        1: ([*trunk, 1], [1, 2]),
        2: ([*trunk, 3, 4], [3, 4, 5]),
    }
    assert pieces.counts()["truncated"] == (T < 24) and pieces.counts()["dropped"] == 0


@pytest.mark.parametrize("T,overlong", [(4, "truncate"), (4, "drop"), (23, "drop")])
def test_groups_that_do_not_fit_are_left_out_and_counted(tmp_path, T, overlong):
    store = make_store(tmp_path, [LONG, ([7], {1: [1], 2: [2]})])
    pieces = GroupPieces(store, T, overlong)
    assert pieces.document.tolist() == [1]
    assert pieces.counts() == {
        "documents": 1,
        "dropped": 1,
        "truncated": 0,
        "untrained": 0,
        "pieces": 1,
        "tokens": 2,
    }


def test_groups_are_never_split(tmp_path):
    with pytest.raises(ConfigError, match="data.overlong='split': groups .* are never split"):
        GroupPieces(make_store(tmp_path, [LONG]), 8, "split")


def random_groups(count, seed=0, single=False):
    rng = np.random.default_rng(seed)
    groups, first = [], 1
    for n in range(count):
        lengths = rng.integers((0, 1, 1), (9, 6, 6))
        # Without a trunk, an answer of one token has no target.
        lengths = np.maximum(lengths, 2) if not lengths[0] else lengths
        parts = []
        for length in lengths:
            parts.append(list(range(first, first + length)))
            first += length
        roles = {1 + n % 2: parts[1]} if single else {1: parts[1], 2: parts[2]}
        groups.append((parts[0], roles))
    return groups


@pytest.mark.parametrize("overlong,T", [("drop", 64), ("truncate", 12), ("drop", 9)])
def test_counts_are_those_of_the_pieces(tmp_path, overlong, T):
    pieces = GroupPieces(make_store(tmp_path, random_groups(50)), T, overlong)
    lengths = [len(pieces[i]["tokens"]) for i in range(len(pieces))]
    assert max(lengths) <= T and sum(lengths) == pieces.counts()["tokens"]
    assert pieces.counts()["documents"] + pieces.counts()["dropped"] == 50


# ---------------------------------------------------------------- mismatched answers
def test_judged_answers_come_with_the_answer_of_the_next_group(tmp_path):
    groups = [([5, 6], {1: [1, 2]}), ([7], {2: [3]}), ([8, 9], {1: [4], 2: [10, 11]})]
    pieces = GroupPieces(make_store(tmp_path, groups), 16, "drop", mismatched=True)
    assert [sequences(pieces[i]).get(MISMATCHED) for i in range(3)] == [
        ([5, 6], [3]),
        ([7], [4]),
        ([8, 9, 1], [1, 2]),
    ]
    assert sequences(pieces[2])[REJECTED] == ([8, 9, 10], [10, 11])
    assert pieces.counts()["unmatched"] == 0
    assert pieces.counts()["tokens"] == sum(len(pieces[i]["tokens"]) for i in range(3))


def test_a_mismatched_answer_has_another_prompt_and_other_tokens(tmp_path):
    """Unpaired data sets hold both answers of a prompt side by side."""
    groups = [([5, 6], {1: [1]}), ([5, 6], {2: [2]}), ([7, 8], {1: [1]}), ([9, 8], {1: [3]})]
    pieces = GroupPieces(make_store(tmp_path, groups), 16, "drop", mismatched=True)
    found = [sequences(pieces[i])[MISMATCHED][1] for i in range(4)]
    assert found == [[3], [1], [3], [1]]


@pytest.mark.parametrize("groups", [[([5], {1: [1]})], [([5], {1: [1]}), ([5], {2: [2]})]])
def test_groups_without_another_prompt_have_no_mismatched_answer(tmp_path, groups):
    pieces = GroupPieces(make_store(tmp_path, groups), 16, "drop", mismatched=True)
    assert all(MISMATCHED not in sequences(pieces[i]) for i in range(len(groups)))
    assert pieces.counts()["unmatched"] == len(groups)


def test_a_mismatched_answer_takes_no_room_from_a_group(tmp_path):
    groups = [([5, 6], {1: [1]}), ([7], {1: list(range(20, 28))})]
    pieces = GroupPieces(make_store(tmp_path, groups), 8, "drop", mismatched=True)
    assert len(pieces) == 2 and pieces.counts()["unmatched"] == 2
    assert MISMATCHED not in sequences(pieces[0])


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("packing", [True, False])
def test_packed_rows_hold_every_group_with_its_branches_and_positions(tmp_path, packing):
    groups, T = random_groups(40), 48
    pieces = GroupPieces(make_store(tmp_path, groups), T, "drop")
    stream = grain.MapDataset.source(pieces).to_iter_dataset()
    rows = list(pack(stream, T, packing=packing, fields=ANSWERS))
    found = []
    for row in rows:
        types = {name: dtype for name, dtype in dtypes(ANSWERS).items() if name != "index"}
        assert {name: row[name].dtype for name in row} == types
        padding = row["segments"] == 0
        assert not row["branches"][padding].any() and not row["positions"][padding].any()
        assert (row["targets"][padding] == IGNORED).all()
        for segment in range(1, row["segments"].max() + 1):
            inside = row["segments"] == segment
            branches, positions = row["branches"][inside], row["positions"][inside]
            trunk = int((branches == 0).sum())
            assert positions[branches == 0].tolist() == list(range(trunk))
            for role in (1, 2):
                count = int((branches == role).sum())
                assert positions[branches == role].tolist() == list(range(trunk, trunk + count))
            found.append(sequences(row, segment))
    expected = [
        {
            role: ([*trunk, *answer[:-1]], answer if trunk else answer[1:])
            for role, answer in roles.items()
        }
        for trunk, roles in groups
    ]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert (max(row["segments"].max() for row in rows) > 1) == packing


def test_the_mask_of_a_packed_row_shows_an_answer_its_own_sequence(tmp_path):
    pieces = GroupPieces(make_store(tmp_path, random_groups(12)), 32, "drop")
    stream = grain.MapDataset.source(pieces).to_iter_dataset()
    row = next(iter(pack(stream, 32, packing=True, fields=ANSWERS)))
    batch = {name: values[None] for name, values in row.items()}
    mask = branched(causal(1, 32, batch["segments"]), batch["positions"], batch["branches"])
    seen = np.asarray(visible(mask))[0]
    for t in np.flatnonzero(row["segments"]):
        own = (row["segments"] == row["segments"][t]) & np.isin(
            row["branches"], (0, row["branches"][t])
        )
        assert np.array_equal(
            np.flatnonzero(seen[t]), np.flatnonzero(own)[: row["positions"][t] + 1]
        )


def test_the_loader_resumes_with_groups(tmp_path):
    store = make_store(tmp_path, random_groups(30, single=True))

    def loader():
        return make_loader(
            store,
            length=40,
            rows=2,
            packing=True,
            overlong="truncate",
            seed=3,
            fields=ANSWERS,
            kind=KINDS["judged"],
        )

    stream, states, batches = loader(), [], []
    for _ in range(12):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    for k in (0, 5, 9):
        resumed = loader()
        resumed.set_state(json.loads(states[k]))
        for batch in batches[k : k + 3]:
            again = next(resumed)
            assert all(np.array_equal(again[name], batch[name]) for name in batch)
            assert sorted(batch) == ["branches", "positions", "segments", "targets", "tokens"]


def test_rows_per_epoch_and_evaluation_hold_every_group_once(tmp_path):
    store, kind = make_store(tmp_path, random_groups(21)), KINDS["pairs"]
    options = {"length": 40, "overlong": "drop", "kind": kind}
    assert rows_per_epoch(store, packing=False, **options) == 21
    assert 21 > rows_per_epoch(store, packing=True, **options) > 3
    batches = list(eval_batches(store, length=40, rows=4, limit=99, fields=ANSWERS, kind=kind))
    assert all(batch["branches"].shape == (4, 40) for batch in batches) and len(batches) == 6
    assert sum(int(batch["segments"][:, 0].sum()) for batch in batches) == 21
    assert not batches[-1]["segments"][1:].any()
    with pytest.raises(DataError, match="21 of 21 pairs are longer.*'truncate', or use"):
        make_loader(store, rows=1, packing=True, seed=0, **(options | {"length": 1}))
    with pytest.raises(DataError, match="within them: use longer rows"):
        short = options | {"length": 1, "overlong": "truncate"}
        make_loader(store, rows=1, packing=True, seed=0, **short)


# ---------------------------------------------------------------- from files
ROWS = [{"prompt": f"ask {i}: ", "chosen": f"yes {i}", "rejected": "no"} for i in range(30)]


def test_groups_come_back_from_the_store(tmp_path, tokenizer):
    store = prepared(tmp_path, tokenizer, ROWS[:3], "pairs").train
    texts = [
        spans(store.tokens(2)[inside], store.mask(2)[inside], tokenizer)
        for inside in (store.branches(2) == role for role in (0, 1, 2))
    ]
    assert "".join(texts).replace("][", "") == "ask 2: [yes 2<end>no<end>]"
    assert store.branches(2).dtype == np.uint8 and len(store) == 3


def test_the_model_reads_an_answer_in_a_packed_group_as_in_a_row_of_its_own(tmp_path, tokenizer):
    """Also where a token stands across the end of the prompt, and without a prompt."""
    rows = [
        *({"prompt": [user(f"add {i}")], "chosen": "return", "rejected": "class"} for i in (1, 2)),
        {"prompt": "x retu", "chosen": "rn first", "rejected": "xyz"},
        {"prompt": "", "chosen": "name = 1", "rejected": "thing"},
    ]
    store = prepared(tmp_path, tokenizer, rows, "pairs").train
    stream = grain.MapDataset.source(GroupPieces(store, 160, "drop")).to_iter_dataset()
    row = next(iter(pack(stream, 160, packing=True, fields=ANSWERS)))
    model = Decoder(spec_from_hf(TINY))
    initialize(model, 0, deviation=0.2)

    def hidden(tokens, positions, **places):
        arrays = {name: x[None] for name, x in places.items()}
        return model(tokens[None], positions=positions[None], dtype=jnp.float32, **arrays)[0]

    places = {name: row[name] for name in ("segments", "branches")}
    packed = np.asarray(hidden(row["tokens"], row["positions"], **places))
    chat = with_template(copy.deepcopy(tokenizer))
    for segment, values in enumerate(rows, 1):
        for role, document in preferences.pairs(values, "file:1").answers:
            tokens, mask = encode(document, chat, "assistant")
            inputs = tokens[:-1].astype(np.int32)
            alone = np.asarray(hidden(inputs, np.arange(len(inputs))))[mask[1:]]
            own = (row["segments"] == segment) & (row["branches"] == role)
            own &= row["targets"] != IGNORED
            assert row["targets"][own].tolist() == tokens[1:][mask[1:]].tolist()
            np.testing.assert_allclose(packed[own], alone, atol=2e-5)


def test_each_kind_has_tokens_of_its_own(tmp_path, tokenizer):
    pairs = prepared(tmp_path, tokenizer, ROWS, "pairs", valid_fraction=0.3)
    judged = prepared(tmp_path, tokenizer, ROWS, "judged", valid_fraction=0.3)
    assert pairs.fingerprint != judged.fingerprint
    assert len(pairs.valid) == len(judged.valid) > 0


@pytest.mark.parametrize("name", ["train/branches.bin", "valid/branches.bin"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_branches_are_refused(tmp_path, tokenizer, name, damage):
    prepared(tmp_path, tokenizer, ROWS, "pairs", valid_fraction=0.5)
    (folder,) = (tmp_path / "run" / "data").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "changed":
        (folder / name).write_bytes(b"\2" + content[1:])
    with pytest.raises(DataError, match="damaged .*delete the folder"):
        prepared(tmp_path, tokenizer, ROWS, "pairs", valid_fraction=0.5)


def test_loss_on_everything_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="data.loss_on='everything' is for .*use 'assistant'"):
        prepared(tmp_path, tokenizer, ROWS, "pairs", loss_on="everything")


def test_statistics_count_answers_and_prompts_read_once(tmp_path, tokenizer):
    documents, kind = prepared(tmp_path, tokenizer, ROWS, "pairs"), KINDS["pairs"]
    counts = json.loads(json.dumps(statistics(documents, "drop", [4, 64], kind=kind)))
    store, train = documents.train, counts["train"]
    assert train["documents"] == 30 and train["read_once"] == sum(
        int((store.branches(i) == 0).sum()) for i in range(30)
    )
    for role, name in ((1, "chosen"), (2, "rejected")):
        lengths = [int((store.branches(i) == role).sum()) for i in range(30)]
        found = train["answers"][name]
        assert (found["answers"], found["tokens"]) == (30, sum(lengths))
        assert found["lengths"]["max"] == max(lengths)
    assert [at["dropped"] for at in train["at"]] == [30, 0]
    (line,) = remarks(counts, "drop", kind=kind)
    assert line.startswith("30 of 30 pairs are longer than 4 tokens (data.overlong='drop')")
    assert "'truncate' cuts their prompts" in line and "split" not in line
    short = statistics(documents, "truncate", [14], kind=kind)
    assert "the middle of their prompts is left out" in remarks(short, "truncate", kind=kind)[0]
