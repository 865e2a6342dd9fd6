"""Prompts with columns: forms, tokens, pieces, round trip."""

import json

import numpy as np
import pytest
from data.cases import prepared, reply, user
from data.templates import KINDS as TEMPLATES
from data.templates import of_kind

from lljax.data import formats
from lljax.data.kinds import KINDS
from lljax.data.loader import eval_batches, make_loader, rows_per_epoch
from lljax.data.prompt_tokens import chat_tokens, text_tokens
from lljax.data.prompts import PromptPieces, encode_prompt, middle_cut, parse_prompt
from lljax.data.statistics import remarks, statistics
from lljax.data.token_store import TokenStore, TokenWriter
from lljax.errors import ConfigError, DataError


def read(**row):
    return formats.parse(json.dumps(row).encode(), "file:1", parse_prompt)


ASK = user("u")
FORMS = {
    "a text": ({"prompt": "u", "answer": 3}, "u", {"answer": 3}),
    "messages as a prompt": ({"prompt": [ASK], "answer": None}, [ASK], {"answer": None}),
    "messages": ({"messages": [ASK], "solution": "x"}, [ASK], {"solution": "x"}),
    "a text with a system prompt": (
        {"prompt": "u", "system": "s"},
        [{"role": "system", "content": "s"}, ASK],
        {},
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "u"}], "id": 1}, [ASK], {"id": 1}),
    "query": (
        {"query": "u", "history": [["a", "b"]], "label": True},
        [user("a"), reply("b"), ASK],
        {"label": True},
    ),
    "instruction": (
        {"instruction": "do", "input": "this", "output": "y"},
        [user("do\nthis")],
        {"output": "y"},
    ),
    "question": ({"question": "u", "answer": "4"}, [ASK], {"answer": "4"}),
    # As ms-swift, without the reply; here it is kept for the reward functions.
    "a reply at the end": ({"messages": [ASK, reply("x")]}, [ASK], {"solution": "x"}),
    "a reply at the end and no solution": (
        {"messages": [ASK, reply("x")], "solution": None},
        [ASK],
        {"solution": "x"},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_prompt_and_all_other_keys_as_columns(name):
    row, prompt, columns = FORMS[name]
    parsed = read(**row)
    assert (list(parsed.messages) or parsed.text) == prompt
    assert parsed.columns == columns and parsed.unread == ()


def test_keys_of_messages_that_nothing_reads_are_counted():
    assert read(messages=[ASK | {"mood": 1, "weight": 0}]).unread == (
        "messages.mood",
        "messages.weight",
    )
    answered = read(messages=[ASK, reply("x")], solution="y")
    assert answered.columns == {"solution": "y"}
    assert answered.unread == ("messages (the reply at the end)",)


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"answer": 3}, "no prompt; a row has prompt, messages"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": []}, "'prompt' is not a list of messages, or is empty"),
        ({"prompt": 3}, "'prompt' is a int"),
        ({"messages": [ASK], "prompt": "u"}, "'prompt' and 'messages' are two prompts"),
        ({"messages": [reply("x")]}, "the prompt is empty, or ends with a reply"),
        ({"prompt": [ASK, reply("x")]}, "the prompt is empty, or ends with a reply"),
        ({"prompt": "a\0"}, "NUL"),
        ({"prompt": "u", "images": ["i"]}, "'images': models of text alone"),
    ],
)
def test_a_row_without_a_usable_prompt_says_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        read(**row)


def test_a_prompt_is_in_one_part_of_the_data_whatever_its_columns():
    assert read(prompt="u", answer=1).content() == read(prompt="u", answer=2).content()
    assert read(prompt="u").content() != read(prompt=[ASK]).content()


def test_tokens_are_those_that_generation_reads():
    qwen = of_kind(TEMPLATES["qwen"])
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    found = encode_prompt(read(prompt=[ASK], tools=tools, answer=3), qwen, "assistant")
    assert found.tokens.tolist() == chat_tokens(qwen, [ASK], tools=tools)
    text = qwen.decode(found.tokens)
    assert "look" in text and text.endswith("u<|im_end|>\n<|im_start|>assistant\n")
    assert not found.mask.any() and len(found.mask) == len(found.tokens)
    plain = encode_prompt(read(prompt="u v"), qwen, "assistant")
    assert plain.tokens.tolist() == text_tokens(qwen, "u v")


def test_a_prompt_that_the_template_refuses_is_a_bad_row_without_its_text(tmp_path):
    llama = of_kind(TEMPLATES["llama"])
    llama.chat_template = (
        "{% set text = messages[0].content %}{{ raise_exception(text) if text == 'secret' }}x"
    )
    rows = [{"prompt": [user("secret")]}, *({"prompt": [user(f"{i}")]} for i in range(9))]
    documents = prepared(tmp_path, llama, rows, "prompts", max_bad_fraction=0.5)
    assert documents.bad == 1 and len(documents.train) == 9
    listed = (tmp_path / "run" / "bad_rows.jsonl").read_text()
    assert "the chat template refuses it" in listed and "secret" not in listed


ROWS = [
    {
        "prompt": [user(f"é {i}")],
        "answer": {"n": i},
        "tags": ["\u2028", None],
        "text": "😀",
    }
    for i in range(12)
]


def test_columns_come_back_as_they_were_given(tmp_path, tokenizer):
    documents = prepared(tmp_path, tokenizer, [*ROWS, {"prompt": "plain"}], "prompts")
    store = documents.train
    assert [store.row(i) for i in range(len(store))] == [*ROWS, {"prompt": "plain"}]
    assert documents.counts["train"]["conversations"] == 12
    again = prepared(tmp_path, tokenizer, [*ROWS, {"prompt": "plain"}], "prompts").train
    assert again.row(3) == ROWS[3]  # from the cache


@pytest.mark.parametrize("name", ["train/rows.jsonl", "train/rows.npy", "valid/rows.jsonl"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_columns_are_refused(tmp_path, tokenizer, name, damage):
    prepared(tmp_path, tokenizer, ROWS, "prompts", valid_fraction=0.5)
    (folder,) = (path for path in (tmp_path / "run" / "data").iterdir() if path.is_dir())
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "changed":
        content[-3] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="damaged .*delete the folder"):
        prepared(tmp_path, tokenizer, ROWS, "prompts", valid_fraction=0.5)


def make_store(folder, lengths) -> TokenStore:
    writer, first = TokenWriter(folder / "store", ("row",)), 1
    for n in lengths:
        tokens = np.arange(first, first + n, dtype=np.uint32)
        writer.add(tokens, np.zeros(n, bool), None, {"prompt": first})
        first += n
    writer.close()
    return TokenStore(folder / "store")


def test_long_prompts_are_dropped_or_lose_their_middle(tmp_path):
    store = make_store(tmp_path, (3, 8, 9, 20))
    dropped, cut = PromptPieces(store, 8, "drop"), PromptPieces(store, 8, "truncate")
    assert [piece["document"] for piece in map(dropped.__getitem__, range(len(dropped)))] == [0, 1]
    assert dropped.counts()["dropped"] == 2 and dropped.counts()["tokens"] == 11
    assert cut[3]["tokens"].tolist() == [21, 22, 23, 24, 37, 38, 39, 40]
    assert cut[2]["tokens"].dtype == np.int32 and store.row(cut[2]["document"]) == {"prompt": 12}
    assert cut.counts() == {
        "documents": 4,
        "dropped": 0,
        "truncated": 2,
        "untrained": 0,
        "pieces": 4,
        "tokens": 3 + 3 * 8,
    }
    with pytest.raises(ConfigError, match="prompts are never split"):
        PromptPieces(store, 8, "split")


@pytest.mark.parametrize("kept", range(0, 8))
def test_the_middle_cut_keeps_as_many_as_asked_and_the_last_first(kept):
    stays = middle_cut(7, kept).tolist()
    assert len(stays) == min(kept, 7) and stays == sorted(set(stays))
    assert not kept or stays[-1] == 6


def test_prompts_are_read_in_batches_that_resume(tmp_path):
    store, kind = make_store(tmp_path, (3, 8, 9, 5, 6)), KINDS["prompts"]

    def loader():
        return make_loader(
            store, length=8, rows=2, packing=True, overlong="drop", seed=1, kind=kind
        )

    stream, states, batches = loader(), [], []
    for _ in range(6):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    for batch in batches:
        assert batch["tokens"].shape == (2, 8) and batch["tokens"].dtype == np.int32
        for tokens, n, i in zip(*batch.values(), strict=True):
            assert tokens[:n].tolist() == store.tokens(i).tolist() and not tokens[n:].any()
    epoch = np.concatenate([batch["documents"] for batch in batches[:2]])
    assert sorted(epoch) == [0, 1, 3, 4]
    resumed = loader()
    resumed.set_state(json.loads(states[3]))
    assert next(resumed)["documents"].tolist() == batches[3]["documents"].tolist()
    assert rows_per_epoch(store, length=8, packing=True, overlong="drop", kind=kind) == 4
    held_out = list(eval_batches(store, length=8, rows=3, limit=9, kind=kind))
    numbers = [batch["documents"].tolist() for batch in held_out]
    assert numbers == [[0, 1, 3], [4, -1, -1]] and not held_out[1]["lengths"][1:].any()


def test_nothing_is_said_of_the_tokens_that_no_prompt_trains(tmp_path, tokenizer):
    documents, kind = prepared(tmp_path, tokenizer, ROWS, "prompts"), KINDS["prompts"]
    assert remarks(statistics(documents, "drop", [512], kind=kind), "drop", kind=kind) == []
    (line,) = remarks(statistics(documents, "drop", [2], kind=kind), "drop", kind=kind)
    assert line.startswith("12 of 12 prompts are longer than 2 tokens")
