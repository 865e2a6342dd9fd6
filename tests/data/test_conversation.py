"""What is trained of random conversations, against regular expressions over their renderings."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from data.templates import (
    GLM,
    HARMONY,
    KINDS,
    LLAMA,
    QWEN,
    R1,
    Kind,
    of_kind,
    random_conversation,
    spans,
)
from transformers import PreTrainedTokenizerFast

from lljax.data import conversation
from lljax.data.conversation import Refused
from lljax.data.formats import Document
from lljax.data.template import encode, turn_ends
from lljax.interop.open import end_tokens

TOKENIZERS = Path(os.environ.get("TOKENIZERS", Path(__file__).parents[2] / "tokenizers"))


def check(tokenizer, kind: Kind, seeds, least: float, may_say=()) -> None:
    """Trained tokens are those of the spans, and every reply ends with a token that ends a turn.

    least: the share of the conversations that the template takes. may_say: why it refuses others.
    """
    base = type("Base", (), {"generation_config": None, "config": {}})
    stops, ends, taken = end_tokens(base, tokenizer), set(turn_ends(tokenizer)), 0
    assert ends and ends <= stops
    for seed in seeds:
        messages, tools, untrained = random_conversation(seed, kind)
        try:
            document = Document("f:1", messages=tuple(messages), tools=tools, untrained=untrained)
            tokens, mask = encode(document, tokenizer, "assistant")
        except Refused as refused:
            said = ("has no assistant message", *may_say)
            assert any(reason in str(refused) for reason in said), seed
            continue
        taken, text = taken + 1, tokenizer.decode(tokens)
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert out["input_ids"] == tokens.tolist(), seed
        found = spans(kind, text)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(found) == len(replies), seed
        wanted = np.zeros(len(tokens), bool)
        for i, (start, stop) in zip(replies, found, strict=True):
            inside = np.array([start <= a < b <= stop for a, b in out["offset_mapping"]])
            if i not in untrained:
                wanted |= inside
            followed = i + 1 < len(messages) and messages[i + 1]["role"] == "assistant"
            if kind is not HARMONY and not (kind is GLM and followed):
                assert tokens[np.flatnonzero(inside)[-1]] in ends, seed
        assert (wanted == mask).all(), seed
    assert taken >= least * len(seeds)


@pytest.mark.parametrize("name", KINDS)
def test_trained_spans_of_random_conversations_are_those_found_by_hand(name):
    check(of_kind(KINDS[name]), KINDS[name], range(60), 0.9)


ALTERNATE = "roles must alternate"
OWN = dataclasses.replace(QWEN, template="", thoughts=False, calls=0)
REAL = {  # by folder: the kind, with the tokenizer's own template or ours
    "qwen3": dataclasses.replace(QWEN, template=""),
    "llama3_1": dataclasses.replace(OWN, replies=LLAMA.replies),
    "gemma3": dataclasses.replace(
        OWN, replies=r"<start_of_turn>model\n(.*?<end_of_turn>)", alternates=True
    ),
    "deepseek_v3": dataclasses.replace(OWN, replies=r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)"),
    "gptoss": HARMONY,
    "qwen3 as GLM": GLM,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_trained_spans_under_real_tokenizers_are_those_found_by_hand(name):
    """make tokenizers brings them. gpt-oss's comes without a template, and gets one of ours."""
    folder, kind = TOKENIZERS / name.split()[0], REAL[name]
    if not folder.is_dir():
        pytest.skip(f"no {folder}: make tokenizers")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    check(
        of_kind(kind, tokenizer) if kind.template else tokenizer,
        kind,
        range(500),
        0.9,
        may_say=(ALTERNATE,) if kind.alternates else (),
    )


# ---------------------------------------------------------------- time
@pytest.fixture
def rendered(monkeypatch):
    """How many renderings a conversation takes."""
    jobs, own = [], conversation.render
    monkeypatch.setattr(
        conversation, "render", lambda tokenizer, these: jobs.extend(these) or own(tokenizer, these)
    )

    def count(tokenizer, messages) -> int:
        turn_ends(tokenizer)
        jobs.clear()
        encode(Document("f:1", messages=tuple(messages)), tokenizer, "assistant")
        return len(jobs)

    return count


@pytest.mark.parametrize("name", KINDS)
def test_the_number_of_renderings_does_not_grow_with_the_turns(name, rendered):
    tokenizer = of_kind(KINDS[name])

    def renderings(n: int) -> int:
        talk = [
            {"role": role, "content": f"{thought}{i} words"}
            for i in range(n)
            for role, thought in (("user", ""), ("assistant", "<think>hm</think>"))
        ]
        return rendered(tokenizer, talk)

    assert renderings(40) == renderings(10) <= 12


def test_nor_do_calls_of_tools_add_renderings(rendered):
    """Numbers in arguments, which no mark hides, and answers without text between the replies."""
    tokenizer = of_kind(QWEN)

    def renderings(n: int) -> int:
        talk = [
            message
            for i in range(n)
            for message in (
                {"role": "user", "content": f"question {i}"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "look", "arguments": {"q": "x", "n": i}}}],
                },
                {"role": "tool", "content": ""},
                {"role": "assistant", "content": f"answer {i}"},
            )
        ]
        return rendered(tokenizer, talk)

    assert renderings(40) == renderings(10) <= 12


@pytest.mark.parametrize(
    "content",
    ["/no_think", "Be brief. /no_think", "<tool_response>\n42\n</tool_response>", "<think>"],
)
def test_what_a_template_looks_for_in_a_text_stays_in_it(content):
    looks = (
        "{%- if '/no_think' in messages[0].content or messages[0].content.startswith('<t') %}"
        "{{- 'seen' }}{%- endif %}"
    ) + QWEN.template
    tokenizer = of_kind(dataclasses.replace(QWEN, template=looks))
    talk = ({"role": "user", "content": content}, {"role": "assistant", "content": "no"})
    tokens, mask = encode(Document("f:1", messages=talk), tokenizer, "assistant")
    assert tokenizer.decode(tokens[mask]) == "<think>\n\n</think>\n\nno<|im_end|>"
    assert tokenizer.decode(tokens).startswith("seen")


@pytest.mark.parametrize("change", ["| upper", ".split('\n')[0]", "[:40]", ".replace('x', 'y')"])
def test_a_text_that_a_template_changes_is_refused(change):
    changes = QWEN.template.replace("m.content + '<|im", f"m.content{change} + '<|im")
    tokenizer = of_kind(dataclasses.replace(QWEN, template=changes))
    talk = (
        {"role": "user", "content": "x" * 50 + "\nline"},
        {"role": "assistant", "content": "no"},
    )
    with pytest.raises(Refused, match=r"does not show message 0 \(user\) as it is"):
        encode(Document("f:1", messages=talk), tokenizer, "assistant")


def test_a_thought_that_the_template_strips_is_trained_where_the_prompt_opens_it():
    tokenizer = of_kind(R1)
    for message in (
        {"content": "<think>\nhm\n</think>\n\nyes"},
        {"content": "yes", "reasoning_content": "hm"},
    ):
        talk = ({"role": "user", "content": "q"}, {"role": "assistant"} | message)
        tokens, mask = encode(Document("f:1", messages=talk), tokenizer, "assistant")
        assert tokenizer.decode(tokens[mask]) == "hm\n</think>\n\nyes<|end|>"
        assert tokenizer.decode(tokens[~mask]) == "<|begin|><|User|>q<|Assistant|><think>\n"
