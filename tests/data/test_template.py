import copy

import numpy as np
import pytest
import tokenizers
from data.templates import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from lljax.data.formats import Document
from lljax.data.template import adds_bos, encode, with_template

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<s>system\\nHelp.<e>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<s>' + m.role + '\\n' + m.content + '<e>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}"
    "{%- generation -%}{{ m.content + '<e>' }}"
    "{%- endgeneration -%}{% else %}{{ 'U:' + m.content + '<e>' }}{% endif %}{% endfor %}"
)
# Thoughts are shown in the last reply alone, as in Qwen3.
FORGETFUL = (
    "{% for m in messages %}{{ '<s>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{% endif %}{{ m.content + '<e>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
# The generation prompt opens a thought that the history does not show, as in DeepSeek-R1; there as
# in Qwen3-Thinking.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<b>' + m.content }}{% else %}"
    "{{ '<s>' + m.content.split('</think>')[-1] + '<e>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s><think>\\n' }}{% endif %}"
)
THINKING = FORGETFUL.replace(
    "'<s>assistant\\n' }}{% endif %}", "'<s>assistant\\n<think>' }}{% endif %}"
)
# Takes thoughts out of the content, and shows calls of tools.
SPLITTING = FORGETFUL.replace(
    "{{ m.content + '<e>\\n' }}",
    "{{ m.content.split('</think>')[-1] }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name }}{% endfor %}{{ '<e>\\n' }}",
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m.content + ']' }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "yes or no?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "sure? yes or no"},
    {"role": "assistant", "content": "no"},
]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def reply(content: str, **fields) -> dict:
    return {"role": "assistant", "content": content} | fields


def make(template=None, *, bos=False):
    return byte_tokenizer(template, eos="<e>", bos="<b>" if bos else None, adds_bos=bos)


def trained(tokenizer, messages, loss_on="assistant") -> list[str]:
    """The runs of trained tokens, as text."""
    tokens, mask = encode(Document("file:1", messages=tuple(messages)), tokenizer, loss_on)
    assert tokens.dtype == np.uint32 and mask.dtype == bool and tokens.shape == mask.shape
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
    return [tokenizer.decode(tokens[start:stop]) for start, stop in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", [None, CHATML, MARKED])
def test_replies_are_trained_with_the_token_that_ends_them_and_nothing_else(template):
    assert trained(make(template), TALK) == ["yes<e>", "no<e>"]


def test_tokens_are_those_of_the_chat_template():
    tokenizer = make(CHATML, bos=True)  # whose bos is for the template to write
    tokens, _ = encode(Document("file:1", messages=tuple(TALK)), tokenizer, "assistant")
    assert tokens.tolist() == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]


def test_replies_are_found_where_a_template_shows_the_last_one_otherwise():
    assert trained(make(FORGETFUL), TALK) == ["yes<e>", "<think></think>no<e>"]
    thoughtful = [
        TALK[0],
        TALK[1] | {"reasoning_content": "hm"},
        TALK[2],
        TALK[3] | {"reasoning_content": "ho"},
    ]
    assert trained(make(FORGETFUL), thoughtful) == ["yes<e>", "<think>ho</think>no<e>"]


def test_the_user_is_not_trained_where_the_history_drops_what_the_generation_prompt_opens():
    assert trained(make(R1), TALK) == ["yes<e>", "no<e>"]
    assert trained(make(R1), [user("q"), reply("<think>hm</think>yes"), *TALK[:2]]) == [
        "yes<e>",
        "yes<e>",
    ]
    assert trained(make(THINKING), TALK) == ["yes<e>", "</think>no<e>"]


@pytest.mark.parametrize("content", ["<div>", "<think", "s", "e", ""])
def test_a_reply_that_begins_as_a_dropped_thought_is_trained_whole(content):
    assert trained(make(R1), [user("q"), reply(content)]) == [content + "<e>"]
    assert trained(make(THINKING), [user("q"), reply(content), *TALK[:2]])[0] == content + "<e>"


def test_a_conversation_that_starts_with_a_reply_does_not_train_what_stands_before_it():
    for template in (None, CHATML, R1, FORGETFUL):
        assert trained(make(template), [reply("Help."), *TALK[:1], reply("fine")])[0] == "Help.<e>"


def test_replies_in_a_row_do_not_train_the_header_between_them():
    talk = [user("q"), reply("one"), reply("two")]
    assert trained(make(CHATML), talk) == trained(make(R1), talk) == ["one<e>", "two<e>"]
    assert trained(make(FORGETFUL), talk) == ["one<e>", "<think></think>two<e>"]


def test_thoughts_in_the_content_that_the_template_drops_are_not_looked_for():
    talk = [user("q"), reply("<think>hm</think>yes"), user("yes?"), reply("no")]
    assert trained(make(SPLITTING), talk) == ["yes<e>", "<think></think>no<e>"]


def test_a_call_of_a_tool_is_trained_without_content():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    talk = [user("q"), reply("", tool_calls=call), user("42"), reply("it is 42")]
    assert trained(make(SPLITTING), talk) == ["<call>f<e>", "<think></think>it is 42<e>"]


def test_a_content_that_the_template_does_not_show_is_refused():
    hiding = FORGETFUL.replace(
        "{{ m.content +", "{{ (m.content if loop.last or m.role == 'user' else 'x') +"
    )
    with pytest.raises(ValueError, match=r"does not show message 1 \(assistant\) as it is"):
        trained(make(hiding), TALK)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_replies_of_a_prompt_of_messages_are_not_trained(template):
    tokenizer = make(template)
    tokens, mask = encode(
        Document("file:1", messages=(*TALK[:3], reply("gold")), given=3), tokenizer, "assistant"
    )
    assert tokenizer.decode(tokens[mask]).removeprefix("A:") == "gold<e>"
    with pytest.raises(ValueError, match="no assistant message"):
        encode(Document("file:1", messages=tuple(TALK[:3]), given=2), tokenizer, "assistant")


def test_white_space_of_a_reply_is_trained():
    talk = [TALK[0], TALK[1] | {"content": "  code\n\n"}, TALK[2], TALK[3] | {"content": "é ü "}]
    assert trained(make(CHATML), talk) == ["  code\n\n<e>", "é ü <e>"]


def test_a_conversation_that_ends_with_the_user_trains_the_reply_before():
    assert trained(make(CHATML), TALK[:3]) == ["yes<e>"]


def test_everything_trains_every_token():
    tokens, mask = encode(Document("file:1", messages=tuple(TALK)), make(CHATML), "everything")
    assert mask.all() and len(mask) == len(tokens)


def test_text_gets_bos_where_the_tokenizer_adds_one_and_eos():
    for bos, expected in ((False, "ab<e>"), (True, "<b>ab<e>")):
        tokenizer = make(bos=bos)
        assert adds_bos(tokenizer) == bos
        tokens, mask = encode(Document("file:1", text="ab"), tokenizer, "assistant")
        assert tokenizer.decode(tokens) == expected and mask.all()


def test_of_prompt_and_completion_the_completion_is_trained():
    tokenizer = make(bos=True)
    tokens, mask = encode(Document("file:1", prompt="ab", text="cd"), tokenizer, "assistant")
    assert tokenizer.decode(tokens) == "<b>abcd<e>" and tokenizer.decode(tokens[mask]) == "cd<e>"


def test_a_completion_is_tokenized_together_with_its_prompt():
    # puts a space before each text, as SentencePiece does
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<e>"], show_progress=False
    )
    backend.train_from_iterator(["ab 4 ="] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokens, mask = encode(Document("file:1", prompt="ab=", text="4"), tokenizer, "assistant")
    assert tokenizer.decode(tokens) == "ab=4<e>" and tokenizer.decode(tokens[mask]) == "4<e>"


@pytest.mark.parametrize("template", [None, MARKED])
def test_a_document_longer_than_the_tokenizer_expects_prints_nothing(template, capfd):
    tokenizer = make(template)
    tokenizer.model_max_length = 4
    encode(Document("file:1", messages=tuple(TALK)), tokenizer, "assistant")
    encode(Document("file:1", text="a long text"), tokenizer, "assistant")
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- the end of a turn
PHI = (
    "{% for m in messages %}{{ '<s>' + m.role + ':' + m.content + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% else %}{{ '<s>!' }}{% endif %}"
)
NEXT = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' else '<b>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<b>{% endif %}"
)  # as GLM-4.5
# no special token
TEXT = (
    "{% for m in messages %}{{ '|' + m.role + '|' + m.content + ' |end|' }}{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}"
)


def test_a_token_after_the_end_of_a_reply_is_not_trained():
    """Behind the last reply as before the next turn stands <s>."""
    assert trained(make(PHI), TALK) == ["yes<e>", "no<e>"]


def test_the_marker_that_ends_a_turn_is_trained_also_behind_the_last_reply():
    assert trained(make(NEXT), TALK) == ["yes<s>", "no<s>"]
    assert trained(make(NEXT), TALK[:3]) == ["yes<s>"]


def test_a_reply_without_a_token_that_ends_it_gets_eos_when_it_is_the_last():
    assert trained(make(TEXT), TALK) == ["yes |end|", "no |end|<e>"]


def test_a_marker_of_the_next_turn_is_never_trained_in_part():
    closing = TEXT.replace("' |end|'", "('|last|' if loop.last and m.role == 'assistant' else '')")
    assert trained(make(closing), TALK) == ["yes", "no|last|<e>"]


def test_a_generation_block_without_the_end_of_the_turn_trains_it_all_the_same():
    inside = MARKED.replace("{{ m.content + '<e>' }}", "{{ m.content }}").replace(
        "{%- endgeneration -%}", "{%- endgeneration -%}{{ '<e>' }}"
    )
    assert trained(make(inside), TALK) == ["yes<e>", "no<e>"]
    assert trained(make(MARKED.replace("'<e>' }}\n", "'<e>and more' }}")), TALK) == [
        "yes<e>",
        "no<e>",
    ]


# ---------------------------------------------------------------- what a row says
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"q": "x"}}}]


@pytest.mark.parametrize("template", [None, CHATML, MARKED])
@pytest.mark.parametrize("loss_on", ["assistant", "everything"])
def test_replies_whose_loss_is_off_are_not_trained(template, loss_on):
    tokenizer = make(template)
    tokens, mask = encode(
        Document("f:1", messages=tuple(TALK), untrained=frozenset({1})), tokenizer, loss_on
    )
    assert "yes<e>" not in tokenizer.decode(tokens[mask]).replace(TALK[0]["content"], "")
    assert tokenizer.decode(tokens[mask]).rstrip().endswith("no<e>")
    with pytest.raises(ValueError, match="no assistant message that is trained"):
        encode(
            Document("f:1", messages=tuple(TALK[:3]), untrained=frozenset({1})), tokenizer, loss_on
        )


def test_the_plain_template_shows_tools_calls_thoughts_and_roles():
    tokenizer = make()
    talk = [
        user("q"),
        reply(None, tool_calls=CALL),
        {"role": "tool", "content": "42"},
        reply("done", reasoning_content="hm"),
    ]
    tokens, mask = encode(
        Document("f:1", messages=tuple(talk), tools=({"name": "look"},)), tokenizer, "assistant"
    )
    assert tokenizer.decode(tokens) == (
        '### Tools:\n[{"name": "look"}]\n\n### User:\nq\n'
        '### Assistant:\n{"name": "look", "arguments": {"q": "x"}}<e>'
        "\n### Tool:\n42\n### Assistant:\n<think>\nhm\n</think>\n\ndone<e>\n"
    )
    assert tokenizer.decode(tokens[mask]) == (
        '{"name": "look", "arguments": {"q": "x"}}<e><think>\nhm\n</think>\n\ndone<e>'
    )


@pytest.mark.parametrize(
    "message,tools,reason",
    [
        ({"role": "developer", "content": "rules"}, (), r"message 0 \(developer\) as it is"),
        ({"role": "the keeper", "content": "rules"}, (), "message 0 as it is"),
        (reply("", tool_calls=CALL), (), r"a tool call of message 0 \(assistant\)"),
        (reply("yes", reasoning_content="hm"), (), r"the thought of message 0 \(assistant\)"),
        (user("q"), ({"type": "function", "function": {"name": "look"}},), "the tools of the row"),
    ],
)
def test_what_a_template_does_not_show_is_refused(message, tools, reason):
    template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
        "{{ '<s>' + m.role + ':' + m.content + '<e>' }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=f"does not show {reason}"):
        encode(Document("f:1", messages=(message, *TALK), tools=tools), make(template), "assistant")


def test_a_call_whose_arguments_a_template_wants_in_another_form_is_shown_in_that():
    call = "m.tool_calls[0].function.name + m.tool_calls[0].function.arguments"
    as_text = CHATML.replace(
        "m.content + '<e>", f"(m.content if m.content is not none else {call}) + '<e>"
    )
    as_object = CHATML.replace(
        "m.content + '<e>", f"m.content + ({call} | tojson if m.tool_calls else '') + '<e>"
    )
    given = [{"function": {"name": "look", "arguments": '{"q": "x"}'}}]
    for template in (as_text, as_object):
        for calls in (CALL, given):
            assert trained(make(template), [user("q"), reply(None, tool_calls=calls)]) == [
                'look{"q": "x"}<e>'
            ]


# ---------------------------------------------------------------- bos and eos
def test_a_text_that_has_bos_and_eos_gets_no_second():
    tokenizer = byte_tokenizer(None, eos="<e>", bos="<b>", adds_bos=True)
    for document in (
        Document("f:1", text="<b>ab<e>"),
        Document("f:1", prompt="<b>a", text="b<e>"),
        Document("f:1", text="ab"),
        Document("f:1", text="<b>ab"),
        Document("f:1", text="ab<e>"),
    ):
        tokens, mask = encode(document, tokenizer, "assistant")
        assert (
            tokenizer.decode(tokens) == "<b>ab<e>" and mask[-1] and mask[0] == (not document.prompt)
        )


def test_a_tokenizer_that_gets_the_plain_template_is_itself_left_without():
    tokenizer = copy.deepcopy(make())
    tokenizer.chat_template = None
    assert with_template(tokenizer).chat_template and tokenizer.chat_template is None


def test_the_plain_template_begins_with_bos_where_texts_do():
    assert trained(make(bos=True), TALK) == ["yes<e>", "no<e>"]
    for bos in (False, True):
        tokenizer = make(bos=bos)
        tokens, _ = encode(Document("f:1", messages=tuple(TALK)), tokenizer, "assistant")
        assert tokenizer.decode(tokens).startswith("<b>### User" if bos else "### User")
        assert tokenizer.decode(tokens).count("<b>") == bos


def test_a_text_on_which_a_tokenizer_panics_is_refused(monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    class Panics:
        bos_token_id = eos_token_id = None

        def __call__(self, *_, **__):
            raise panic("called `Result::unwrap()` on an `Err` value")

    with pytest.raises(ValueError, match="the tokenizer cannot read a text of it"):
        encode(Document("f:1", text="aaa"), Panics(), "assistant")


@pytest.mark.parametrize(
    "messages,reason",
    [(TALK[:1], "no assistant message"), ([TALK[0], TALK[0], TALK[1]], "roles must alternate")],
)
def test_a_conversation_that_cannot_be_used_says_why(messages, reason):
    with pytest.raises(ValueError, match=reason):
        encode(Document("file:1", messages=tuple(messages)), make(ALTERNATING), "assistant")


def test_a_template_of_the_tokenizer_is_kept():
    assert make(CHATML).chat_template == CHATML and make().chat_template
