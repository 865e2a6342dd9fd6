import pytest
from data.templates import KINDS, byte_tokenizer, of_kind

from lljax.data.template import turn_ends
from lljax.data.turn_ends import turns


@pytest.mark.parametrize("name", KINDS)
def test_what_ends_a_turn_is_seen_in_renderings(name):
    kind = KINDS[name]
    tokenizer = of_kind(kind)
    assert set(turns(tokenizer).ends) == set(kind.ends)
    assert set(turn_ends(tokenizer)) == set(tokenizer.convert_tokens_to_ids(kind.ends))


REPLY = (
    "{% for m in messages %}{{ '<b>' + m.content }}"
    "{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "end,expected",
    [
        ("<e>", {"<e>"}),
        ("<e>\n", {"<e>"}),
        (" <e>", {"<e>"}),
        ("{% if loop.last %}<e>{% else %}<s>{% endif %}", {"<e>", "<s>"}),
        ("{% if loop.last %}<e>{% endif %}", {"<e>", "<b>"}),
        ("", {"<b>"}),
        ("\n", {"<b>"}),
        ("###", {"<b>"}),
        ("### <e>", {"<e>"}),
        ("<e><s>", {"<e>"}),
    ],
)
def test_the_end_is_what_stands_behind_replies_or_the_marker_of_the_next_turn(end, expected):
    """The last: <s> is bos, which begins the next text."""
    bos = "<s>" if end == "<e><s>" else None
    tokenizer = byte_tokenizer(REPLY.replace("END", end), eos="<e>", bos=bos)
    assert set(turns(tokenizer).ends) == expected


@pytest.mark.parametrize(
    "template",
    ["", "{{ messages[0].content }}", "{{ raise_exception('no') }}", "{{ messages[7].content }}"],
)
def test_a_template_that_shows_no_reply_has_no_end(template):
    assert turn_ends(byte_tokenizer(template, eos="<e>")) == ()


def test_a_tokenizer_without_a_template_has_no_end():
    tokenizer = byte_tokenizer("x", eos="<e>")
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == ()


def test_another_template_is_looked_at_anew():
    tokenizer = of_kind(KINDS["qwen"])
    assert set(turns(tokenizer).ends) == {"<|im_end|>"}
    tokenizer.chat_template = REPLY.replace("END", "<|endoftext|>")
    assert set(turns(tokenizer).ends) == {"<|endoftext|>"}


def test_white_space_tokens_end_nothing():
    """Gemma has tokens of line breaks."""
    tokenizer = byte_tokenizer(
        REPLY.replace("END", "<e>\n"), ("<s>", "<e>", "<b>", "\n"), eos="<e>"
    )
    assert set(turns(tokenizer).ends) == {"<e>"}
