import json

import pytest

from lljax.data import formats
from lljax.data.formats import BadRow, Document


def write(path, *lines: bytes):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def parse(**row) -> Document:
    return formats.parse(json.dumps(row).encode(), "file:1")


def turns(document: Document) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in document.messages]


def test_every_row_form_becomes_the_conversation_or_text_it_says():
    assert turns(
        parse(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    ) == [("user", "a"), ("assistant", "b")]
    assert turns(parse(system="s", history=[["a", "b"]], query="c", response="d")) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    assert turns(parse(instruction="do", input="this", output="done", system="s")) == [
        ("system", "s"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]
    assert turns(parse(instruction="do", input="", output="done")) == [
        ("user", "do"),
        ("assistant", "done"),
    ]
    prompt, completion = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    document = parse(prompt=prompt, completion=completion)
    assert turns(document) == [("user", "a"), ("assistant", "b")] and document.given == 1
    assert turns(parse(instruction="do", output="done", history=[["a", "b"]])) == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "do"),
        ("assistant", "done"),
    ]
    document = parse(prompt="a", completion="b")
    assert (document.prompt, document.text) == ("a", "b")
    assert parse(text=" kept as it is\n").text == " kept as it is\n"


def test_further_keys_of_a_message_are_left_alone():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    reply = {"role": "assistant", "content": None, "tool_calls": call}
    assert parse(messages=[{"role": "user", "content": "a"}, reply]).messages[1] == reply


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"q": 1}}}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"conversations": TALK},
        {"conversation": [{"human": "a", "assistant": "b"}]},
        {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, TALK[1]]},
    ],
)
def test_conversations_are_read_in_the_spellings_of_the_field(row):
    assert parse(**row).messages == tuple(TALK)


@pytest.mark.parametrize(
    "row,given",
    [
        ({"messages": TALK}, 0),
        ({"messages": [{"role": "system", "content": "s"}, *TALK]}, 0),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 0),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, 2),
        ({"prompt": "a", "completion": "b"}, 2),
        ({"query": "a", "response": "b"}, 0),
    ],
)
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside_a_conversation_becomes_its_first_message(row, given, key):
    assert parse(**row, **{key: " "}) == parse(**row)
    document = parse(**row, **{key: "s"})
    assert turns(document) == [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert document.given == given and not document.unread


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize(
    "row", [{"messages": TALK}, {"query": "a", "response": "b"}, {"prompt": "a", "completion": "b"}]
)
def test_tools_reach_the_document_as_objects_or_as_their_json(row, tools):
    document = parse(**row, tools=tools)
    assert (
        document.tools == tuple(TOOLS) and document.messages == tuple(TALK) and not document.unread
    )
    assert document.content() != parse(**row).content()
    assert parse(**row, tools=[]) == parse(**row)


@pytest.mark.parametrize(
    "calls",
    [
        [{"role": "tool_call", "content": json.dumps(CALL["function"])}] * 2,
        [
            {
                "from": "function_call",
                "value": json.dumps([{"name": "look", "arguments": '{"q": 1}'}] * 2),
            }
        ],
    ],
)
def test_calls_in_messages_of_their_own_are_part_of_the_reply_before_them(calls):
    result, end = {"from": "observation", "value": "c"}, {"from": "gpt", "value": "d"}
    found = parse(messages=[*TALK, *calls, result, end]).messages
    assert found == (
        TALK[0],
        TALK[1] | {"tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "d"},
    )
    for reply in (
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"content": "", "tool_calls": None},
    ):
        joined = parse(
            messages=[TALK[0], {"role": "assistant", **reply}, *calls, result, end]
        ).messages
        assert (
            joined[1]["tool_calls"] == [CALL] * (2 + bool(reply.get("tool_calls")))
            and joined[1]["content"] == ""
        )
    alone = parse(messages=[TALK[0], *calls, result, end]).messages
    assert alone[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_mask", "loss_scale"])
def test_a_message_whose_loss_is_off_is_told_by_its_place(key):
    rows = [TALK[0], TALK[1] | {key: False}, TALK[0], TALK[1] | {key: 1}]
    assert parse(messages=rows).untrained == {1}
    assert parse(messages=rows, system="s").untrained == {2}
    assert parse(prompt=rows[:3], completion=rows[3:]).untrained == {1}
    assert parse(messages=[TALK[0] | {key: 0}, TALK[1] | {key: None}]).untrained == {0}
    assert parse(messages=[TALK[0] | {key: True}, TALK[1]]).unread == (
        f"messages.{key} (on, of no trained reply)",
    )


def test_keys_that_no_reader_knows_are_named_and_those_that_say_nothing_are_not():
    document = parse(
        messages=[TALK[0] | {"when": 1, "name": "x"}, TALK[1] | {"refusal": None}],
        id=7,
        images=[],
        source="",
        **{"Is it a text?": 1},
    )
    assert document.unread == ("messages.when", "(no name)", "id")
    assert parse(text="a", system="s", query="q").unread == ("query", "system")
    assert parse(text="a", id=7).content() == parse(text="a").content()


REPLY = b'{"role": "assistant", "content": "b"}'


@pytest.mark.parametrize(
    "line,reason",
    [
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
        (
            b'{"prompt": [' + REPLY + b'], "completion": [{"role": "user", "content": "a"}]}',
            "no assistant message",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "b", "weight": 0}]}',
            "loss of every assistant message is off",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]}',
            "message 0 .*'weight' is neither 0 nor 1",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "b", "train": "no"}]}',
            "'train' is neither",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "b", "weight": NaN}]}',
            "'weight' is neither",
        ),
        (
            b'{"messages": [{"role": "system", "content": "s"}, ' + REPLY + b'], "system": "t"}',
            "two system prompts",
        ),
        (
            b'{"query": "a", "response": "b", "system": "s", "system_prompt": "t"}',
            "two system prompts",
        ),
        (b'{"messages": [' + REPLY + b'], "system": 3}', "'system' is a int"),
        (b'{"messages": [' + REPLY + b'], "tools": "look"}', "'tools' is not JSON"),
        (b'{"messages": [' + REPLY + b'], "tools": ["look"]}', "'tools' is no list of tools"),
        (
            b'{"messages": [' + REPLY + b'], "tools": {"name": "look"}}',
            "'tools' is no list of tools",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "message 0: .*image_url. is no",
        ),
        (
            b'{"messages": [{"from": "moderator", "value": "a"}]}',
            "message 0 .moderator. is from none of human",
        ),
        (
            b'{"messages": [{"from": "function_call", "value": "look(1)"}]}',
            "message 0 .function_call. is not JSON",
        ),
        (
            b'{"messages": [{"from": "function_call", "value": "[1]"}]}',
            "message 0 .function_call. is no call",
        ),
        (b'{"prompt": [], "completion": [], "system": "s"}', "no assistant message"),
        (
            b'{"messages": [{"role": "system", "tool_calls": [{"name": "f"}]}, '
            + REPLY
            + b'], "system": "s"}',
            "two system prompts",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}',
            "'tool_calls' is not a list of calls",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": {}}]}',
            "'tool_calls' is not a list of calls",
        ),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "'chosen': .*objective.name='dpo'"),
        (
            b'{"messages": [' + REPLY + b'], "rejected_response": "c"}',
            "'rejected_response': .*objective.name='dpo'",
        ),
        (b'{"prompt": "a", "completion": "b", "label": false}', "'label': .*objective.name='kto'"),
        (b'{"messages": [' + REPLY + b'], "images": ["a.png"]}', "'images': models of text alone"),
        (b'{"text": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", "nested too deeply"),
        (
            b'{"messages": [' + REPLY + b'], "tools": "' + b"[" * 900 + b"]" * 900 + b'"}',
            "nested too deeply",
        ),
        (b"\xff{}", "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"words": "a"}', "unknown fields"),
        (b'{"text": null}', "unknown fields"),
        (b'{"text": ""}', "'text' is empty"),
        (b'{"text": "  \\n"}', "'text' is empty"),
        (b'{"text": ["a"]}', "'text' is a list"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b'{"messages": []}', "'messages'"),
        (b'{"messages": {}}', "'messages'"),
        (
            b'{"messages": [{"role": "assistant", "content": "a", '
            b'"tool_calls": [{"function": "f"}]}]}',
            "the name of a function",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "reasoning_content": 5}]}',
            "'reasoning_content' is no text",
        ),
        (b'{"messages": ["a"]}', "message 0 has no role"),
        (b'{"messages": [{"role": "user"}]}', "message 0 .* no text"),
        (
            b'{"messages": [{"role": "assistant", "content": 5, "tool_calls": [{"name": "f"}]}]}',
            "message 0 .* no text",
        ),
        (b'{"messages": [{"role": "assistant", "content": "a\\u0000"}]}', "NUL"),
        (b'{"text": "a\\ud800b"}', "surrogate"),
        (b'{"messages": [{"role": "assistant", "content": "a\\ud800"}]}', "surrogate"),
        (b'{"query": "a", "response": ""}', "'response' is empty"),
        (b'{"query": "a", "response": "b", "history": "c"}', "history"),
        (b'{"query": "a", "response": "b", "history": [["c"]]}', "history"),
        (b'{"instruction": "a", "output": 3}', "'output' is a int"),
        (b'{"prompt": "a", "completion": [1]}', "'completion' is a list"),
    ],
)
def test_a_broken_line_is_named_with_its_place_and_reason(tmp_path, line, reason):
    file = write(tmp_path / "rows.jsonl", b'{"text": "good"}', b"", line, b'{"text": "good too"}')
    good, bad, last = formats.read([file])
    assert isinstance(good, Document) and last.where == f"{file}:4"
    assert isinstance(bad, BadRow) and (bad.file, bad.line) == (str(file), 3)
    with pytest.raises(ValueError, match=reason):
        formats.parse(line, "file:1")


@pytest.mark.parametrize(
    "row", [{"secret " * 100: 1}, {"messages": [{"role": "secret\n" * 50, "content": 3}]}]
)
def test_a_reason_is_one_short_line(row):
    with pytest.raises(ValueError) as error:
        parse(**row)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_content_tells_documents_apart_wherever_they_stand():
    first, second = (formats.parse(b'{"text": "a"}', f"file:{line}") for line in (1, 2))
    assert first.content() == second.content() != parse(prompt="a", completion="a").content()
