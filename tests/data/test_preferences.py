"""Rows of preferences: which prompt and which answers each form gives."""

import json

import pytest
from data.cases import reply, user

from lljax.data import formats, preferences
from lljax.data.preferences import CHOSEN, REJECTED, Group


def read(parse, **row) -> Group:
    return formats.parse(json.dumps(row).encode(), "file:1", parse)


def shown(group: Group) -> dict[int, list]:
    """For each role: the untrained part and the trained part, as text or as (role, content)."""
    parts = {}
    for role, document in group.answers:
        turns = [(turn["role"], turn["content"]) for turn in document.messages]
        given = document.given
        parts[role] = [turns[:given], turns[given:]] if turns else [document.prompt, document.text]
    return parts


def pair(prompt, chosen, rejected) -> dict[int, list]:
    return {CHOSEN: [prompt, chosen], REJECTED: [prompt, rejected]}


U, A, B = ("user", "u"), ("assistant", "a"), ("assistant", "b")
S, V, W = ("system", "s"), ("user", "v"), ("assistant", "w")
ASK, GOOD, BAD = user("u"), reply("a"), reply("b")
HUMAN, GPT_GOOD, GPT_BAD = (
    {"from": "human", "value": "u"},
    {"from": "gpt", "value": "a"},
    {"from": "gpt", "value": "b"},
)
PAIRS = {
    "texts": ({"prompt": "u", "chosen": "a", "rejected": "b"}, pair("u", "a", "b")),
    "an empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, pair("", "a", "b")),
    "texts with a system prompt": (
        {"prompt": "u", "chosen": "a", "rejected": "b", "system": "s"},
        pair([S, U], [A], [B]),
    ),
    "messages": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, pair([U], [A], [B])),
    "a prompt of messages, answers of text": (
        {"prompt": [ASK], "chosen": "a", "rejected": "b"},
        pair([U], [A], [B]),
    ),
    "answers that repeat the prompt": (
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        pair([U], [A], [B]),
    ),
    "UltraFeedback": (
        {"prompt": "u", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        pair([U], [A], [B]),
    ),
    "a text and replies": (
        {"prompt": "u", "chosen": [GOOD], "rejected": [BAD]},
        pair([U], [A], [B]),
    ),
    "implicit messages": (
        {"chosen": [ASK, GOOD, user("v"), reply("w")], "rejected": [ASK, GOOD, user("v"), BAD]},
        pair([U, A, V], [W], [B]),
    ),
    "implicit messages with a system prompt": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "system": "s"},
        pair([S, U], [A], [B]),
    ),
    # TRL: a space before the first difference belongs to the answers.
    "implicit texts": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        pair("The sky is", " blue.", " green."),
    ),
    "implicit texts that differ within a word": (
        {"chosen": "It is blue", "rejected": "It is black"},
        pair("It is bl", "ue", "ack"),
    ),
    "ms-swift, response": (
        {"messages": [ASK, GOOD], "rejected_response": "b"},
        pair([U], [A], [B]),
    ),
    "ms-swift, a later turn": (
        {"messages": [ASK, GOOD, user("v"), reply("w")], "rejected_response": "b"},
        pair([U, A, V], [W], [B]),
    ),
    "ms-swift, messages": (
        {"messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]},
        pair([U], [A], [B]),
    ),
    "ms-swift, query": (
        {"query": "u", "response": "a", "rejected_response": "b", "history": [["v", "w"]]},
        pair([V, W, U], [A], [B]),
    ),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD},
        pair([U], [A], [B]),
    ),
    "LLaMA-Factory, messages": (
        {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
        pair([U], [A], [B]),
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "u", "input": "i", "chosen": "a", "rejected": "b"},
        pair([("user", "u\ni")], [A], [B]),
    ),
    "a question": (
        {"system": "s", "question": "u", "chosen": "a", "rejected": "b"},
        pair([S, U], [A], [B]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("parse", [preferences.pairs, preferences.judged])
def test_every_form_of_a_pair_gives_its_prompt_and_its_two_answers(name, parse):
    row, expected = PAIRS[name]
    group = read(parse, **row)
    assert shown(group) == expected and group.unread == ()


LABELED = {
    "TRL": ({"prompt": "u", "completion": "a"}, ["u", "a"]),
    "TRL, messages": ({"prompt": [ASK], "completion": [GOOD]}, [[U], [A]]),
    "ms-swift": ({"messages": [ASK, GOOD]}, [[U], [A]]),
    "ms-swift, the last round": (
        {"messages": [ASK, GOOD, user("v"), reply("w")]},
        [[U, A, V], [W]],
    ),
    "LLaMA-Factory, ShareGPT": ({"conversations": [HUMAN, GPT_GOOD]}, [[U], [A]]),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "u", "output": "a", "history": [["v", "w"]]},
        [[V, W, U], [A]],
    ),
    "query and response": ({"query": "u", "response": "a", "system": "s"}, [[S, U], [A]]),
}


@pytest.mark.parametrize("name", LABELED)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("label,role", [(True, CHOSEN), (False, REJECTED), (1, CHOSEN)])
def test_every_form_of_a_judged_answer_gives_its_prompt_and_its_role(name, key, label, role):
    row, expected = LABELED[name]
    group = read(preferences.judged, **row, **{key: label})
    assert shown(group) == {role: expected} and group.unread == ()


def test_a_reply_that_calls_tools_is_one_answer():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    used = [
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "3"},
        GOOD,
    ]
    group = read(preferences.judged, messages=[ASK, *used], label=True)
    ((role, document),) = group.answers
    assert (role, document.given, len(document.messages)) == (CHOSEN, 1, 4)


def test_unread_keys_are_those_of_the_row_and_of_its_messages():
    rated = {"chosen": [GOOD | {"mood": 1}], "rejected": [BAD]}
    group = read(preferences.pairs, prompt=[ASK], **rated, score_chosen=3.0, messages=[ASK, GOOD])
    assert group.unread == ("messages.mood", "messages", "score_chosen")


BAD_ROWS = [
    ({"prompt": "u", "chosen": "a"}, "'chosen' without 'rejected'"),
    ({"prompt": "u", "rejected": "a", "chosen": None}, "'rejected' without 'chosen'"),
    ({"prompt": "u", "chosen": "a", "rejected": "a"}, "are the same"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "are the same"),
    ({"prompt": "u", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
    ({"prompt": "u", "chosen": "a", "rejected": 3}, "'rejected' is a int, neither"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a int, neither"),
    ({"prompt": "x", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "'prompt' is none of"),
    ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "has no assistant message"),
    ({"chosen": "yes", "rejected": "no"}, "do not begin with the same prompt"),
    ({"chosen": "u: yes", "rejected": "u: yes, no"}, "begins with the whole other"),
    ({"chosen": [ASK], "rejected": [ASK, BAD]}, "begins with the whole other"),
    ({"chosen": "a", "rejected": [BAD]}, "without 'prompt', chosen and rejected are both"),
    ({"messages": [ASK], "rejected_response": "b"}, "the last message is no reply"),
    ({"messages": [ASK, GOOD], "rejected_response": ["b"]}, "message 1 has no role"),
    ({"messages": [ASK, GOOD], "label": True}, "'label': a judged answer, which .*'kto' trains"),
    ({"prompt": "u", "completion": "a"}, "unknown fields .completion, prompt.; a pair has chosen"),
    ({"prompt": "u", "chosen": "a\0", "rejected": "b"}, "NUL"),
    ({"prompt": "u", "chosen": "a\ud800", "rejected": "b"}, "surrogate"),
    ({"messages": [ASK, GOOD], "chosen": "a", "rejected": "b"}, "the prompt ends with a reply"),
    ({"prompt": [ASK], "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "loss of every"),
    ({"prompt": "u", "chosen": "a", "rejected": "b", "images": ["i"]}, "'images': models of text"),
    ([1], "not a JSON object but a list"),
]


@pytest.mark.parametrize("row,reason", BAD_ROWS)
def test_a_row_that_is_no_pair_says_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        formats.parse(json.dumps(row).encode(), "file:1", preferences.pairs)


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"prompt": "u", "completion": "a", "label": "true"}, "'label' is neither true nor false"),
        ({"prompt": "u", "completion": "a", "label": 2}, "'label' is neither true nor false"),
        ({"prompt": "u", "completion": "a"}, "a judged answer has prompt and completion"),
        ({"messages": [GOOD, ASK], "label": True}, "no reply follows the last message"),
        ({"text": "a", "label": True}, "unknown fields"),
    ],
)
def test_a_row_that_is_no_judged_answer_says_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        read(preferences.judged, **row)


@pytest.mark.parametrize(
    "row,objective",
    [
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, "dpo"),
        ({"messages": [ASK, GOOD], "rejected_response": "b"}, "dpo"),
        ({"prompt": "u", "completion": "a", "label": False}, "kto"),
        ({"messages": [ASK, GOOD], "kto_tag": False}, "kto"),
    ],
)
def test_preferences_are_no_documents_and_the_reason_names_their_objective(row, objective):
    with pytest.raises(ValueError, match=f"objective.name='{objective}'"):
        read(formats.document, **row)


@pytest.mark.parametrize(
    "row",
    [
        {"secret text": 1},
        {"prompt": "secret", "chosen": "secret", "rejected": "secret"},
        {"prompt": "secret", "chosen": [{"role": "secret\n", "content": 3}], "rejected": "a"},
        {"prompt": {"secret": 1}, "chosen": "secret", "rejected": "a"},
        {"prompt": "u", "completion": "secret", "label": "secret"},
        {"chosen": "secret", "rejected": "secret, too"},
    ],
)
@pytest.mark.parametrize("parse", [preferences.pairs, preferences.judged])
def test_a_reason_holds_no_text_of_the_row(row, parse):
    with pytest.raises(ValueError) as error:
        read(parse, **row)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
