import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lljax.data.formats import Document
from lljax.data.template import adds_bos, encode, with_template

CHATML = ("{% if messages[0].role != 'system' %}{{ '<s>system\\nHelp.<e>\\n' }}{% endif %}{% for m in messages %}"
          "{{ '<s>' + m.role + '\\n' + m.content + '<e>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}")
MARKED = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}{%- generation -%}{{ m.content + '<e>' }}"
          "{%- endgeneration -%}{% else %}{{ 'U:' + m.content + '<e>' }}{% endif %}{% endfor %}")
# Thoughts are shown in the last reply alone, as in Qwen3.
FORGETFUL = ("{% for m in messages %}{{ '<s>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
             "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<e>\\n' }}"
             "{% endfor %}"
             "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}")
# The generation prompt opens a thought that the history does not show, as in DeepSeek-R1; there as in Qwen3-Thinking.
R1 = ("{% for m in messages %}{% if m.role == 'user' %}{{ '<b>' + m.content }}{% else %}"
      "{{ '<s>' + m.content.split('</think>')[-1] + '<e>' }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<s><think>\\n' }}{% endif %}")
THINKING = FORGETFUL.replace("'<s>assistant\\n' }}{% endif %}", "'<s>assistant\\n<think>' }}{% endif %}")
# Takes thoughts out of the content, and shows calls of tools.
SPLITTING = FORGETFUL.replace(
    "{{ m.content + '<e>\\n' }}", "{{ m.content.split('</think>')[-1] }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name }}{% endfor %}{{ '<e>\\n' }}")
ALTERNATING = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('roles must alternate') }}{% endif %}{{ '[' + m.content + ']' }}{% endfor %}")
TALK = [{"role": "user", "content": "yes or no?"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "sure? yes or no"}, {"role": "assistant", "content": "no"}]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def reply(content: str, **fields) -> dict:
    return {"role": "assistant", "content": content} | fields


def make(template=None, *, bos=False):
    """A tokenizer of single bytes and a few special tokens, so that every boundary is exact."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=261, special_tokens=["<s>", "<e>", "<b>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([""], trainer)
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing("<b> $A", special_tokens=[("<b>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", bos_token="<b>" if bos else None)
    tokenizer.chat_template = template
    return with_template(tokenizer)


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
    tokenizer = make(CHATML, bos=True)     # whose bos is for the template to write
    tokens, _ = encode(Document("file:1", messages=tuple(TALK)), tokenizer, "assistant")
    assert tokens.tolist() == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]


def test_replies_are_found_where_a_template_shows_the_last_one_otherwise():
    assert trained(make(FORGETFUL), TALK) == ["yes<e>", "<think></think>no<e>"]
    thoughtful = [TALK[0], TALK[1] | {"reasoning_content": "hm"}, TALK[2], TALK[3] | {"reasoning_content": "ho"}]
    assert trained(make(FORGETFUL), thoughtful) == ["yes<e>", "<think>ho</think>no<e>"]


def test_the_user_is_not_trained_where_the_history_drops_what_the_generation_prompt_opens():
    assert trained(make(R1), TALK) == ["yes<e>", "no<e>"]
    assert trained(make(R1), [user("q"), reply("<think>hm</think>yes"), *TALK[:2]]) == ["yes<e>", "yes<e>"]
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
    hiding = FORGETFUL.replace("{{ m.content +", "{{ (m.content if loop.last or m.role == 'user' else 'x') +")
    with pytest.raises(ValueError, match=r"does not show message 1 \(assistant\) as it is"):
        trained(make(hiding), TALK)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_replies_of_a_prompt_of_messages_are_not_trained(template):
    tokenizer = make(template)
    tokens, mask = encode(Document("file:1", messages=(*TALK[:3], reply("gold")), given=3), tokenizer, "assistant")
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


def test_a_completion_is_tokenised_together_with_its_prompt():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())      # puts a space before each text, as SentencePiece does
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["<e>"], show_progress=False)
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


@pytest.mark.parametrize("messages,reason", [
    (TALK[:1], "no assistant message"), ([TALK[0], TALK[0], TALK[1]], "roles must alternate")])
def test_a_conversation_that_cannot_be_used_says_why(messages, reason):
    with pytest.raises(ValueError, match=reason):
        encode(Document("file:1", messages=tuple(messages)), make(ALTERNATING), "assistant")


def test_a_template_of_the_tokenizer_is_kept():
    assert make(CHATML).chat_template == CHATML and make().chat_template
