"""Small chat templates in the shape of real ones, a tokenizer of bytes, and random conversations.

Each template comes with a regular expression that finds its replies, with what ends them, in a
rendered conversation: written by hand from the template, and right as long as no text of the
conversation holds such tokens.
"""

import dataclasses
import random
import re

import tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from lljax.data.template import with_template


@dataclasses.dataclass(frozen=True)
class Kind:
    """tokens: those that are special, eos first. ends: of these, what ends a turn. replies: finds
    them. alternates: user and assistant must. thoughts: it shows those of a last reply. calls: how
    many calls of tools in one reply it shows."""

    template: str
    tokens: tuple[str, ...]
    ends: tuple[str, ...]
    replies: str
    alternates: bool = False
    thoughts: bool = False
    calls: int = 0


# Earlier thoughts are dropped; tools stand in the system's turn.
QWEN = Kind(
    r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n' }}{%- endif %}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = m.reasoning_content or '' %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- said }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""",
    (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
    ),
    ("<|im_end|>",),
    r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    thoughts=True,
    calls=2,
)

# Contents are trimmed; one call a reply, its arguments an object.
LLAMA = Kind(
    r"""
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if loop.first and tools %}{{- tools | tojson + '\n\n' }}{%- endif %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length > 1 or m.content -%}
            {{- raise_exception('one call') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {{- m.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    (
        "<|end_of_text|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    ("<|eot_id|>",),
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    calls=1,
)

# The marker of the next turn ends a reply.
GLM = Kind(
    r"""
{{- '[gMASK]<sop>' }}
{%- if tools %}{{- '<|system|>\n' + tools | tojson }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'system' %}
        {{- '<|' + m.role + '|>\n' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<|assistant|>\n<think>' + (m.reasoning_content or '') | trim + '</think>' }}
        {%- if m.content | trim %}{{- '\n' + m.content | trim }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>' + call.function.name }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' }}
                {%- if value is string %}{{- value }}{%- else %}{{- value | tojson }}{%- endif %}
                {{- '</arg_value>' }}
            {%- endfor %}
            {{- '\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
""",
    (
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
    ("<|user|>", "<|system|>", "<|observation|>"),
    r"<\|assistant\|>(.*?(?:<\|user\|>|<\|observation\|>|<\|system\|>|(?=<\|assistant\|>)))",
    thoughts=True,
    calls=2,
)

# Thoughts are stripped, and the prompt opens one; arguments are text, calls come without content.
R1 = Kind(
    r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {{- m.content }}
    {%- elif m.role == 'user' %}
        {{- '<|User|>' + m.content }}
    {%- elif m.role == 'assistant' and m.content is none %}
        {{- '<|Assistant|><|calls|>' }}
        {%- for call in m.tool_calls %}
            {{- '<|call|>' + call.function.name + '\n' + call.function.arguments + '<|/call|>' }}
        {%- endfor %}
        {{- '<|/calls|>' + eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '<|out|>' + m.content + '<|/out|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}
""",
    (
        "<|end|>",
        "<|begin|>",
        "<|User|>",
        "<|Assistant|>",
        "<|calls|>",
        "<|/calls|>",
        "<|call|>",
        "<|/call|>",
        "<|out|>",
        "<|/out|>",
        "<think>",
        "</think>",
    ),
    ("<|end|>",),
    r"<\|Assistant\|>(?:<think>\n)?(.*?<\|end\|>)",
    thoughts=True,
    calls=2,
)

# Of gpt-oss: a last reply ends otherwise than others, whose <|end|> also stands behind a thought.
HARMONY = Kind(
    r"""
{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}
{%- if messages[0].role in ('system', 'developer') or tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- if messages[0].role in ('system', 'developer') %}{{- messages[0].content }}{%- endif %}
    {%- for tool in tools or [] %}{{- '\ntype ' + tool.function.name }}{%- endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set ns = namespace(name='') %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- if m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- set ns.name = m.tool_calls[0].function.name %}
        {{- '<|start|>assistant to=functions.' + ns.name }}
        {{- '<|channel|>commentary json<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
        {%- if m.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' }}
        {{- m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'user' %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
""",
    (
        "<|endoftext|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
    ),
    ("<|return|>", "<|call|>"),
    r"<\|start\|>assistant((?:<\|channel\|>analysis<\|message\|>[^|]*<\|end\|><\|start\|>assistant)?"
    r"(?:<\|channel\|>final| to=).*?(?:<\|return\|>|<\|call\|>|(?=<\|end\|>)))",
    thoughts=True,
    calls=1,
)

# The token at the very end begins as the marker of the next turn does.
PHI = Kind(
    r"""
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}
""",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ("<|end|>",),
    r"<\|assistant\|>\n(.*?<\|end\|>)",
)
KINDS = {"qwen": QWEN, "llama": LLAMA, "glm": GLM, "r1": R1, "harmony": HARMONY, "phi": PHI}


def byte_tokenizer(
    template: str | None,
    tokens=("<s>", "<e>", "<b>"),
    *,
    eos: str,
    bos: str | None = None,
    adds_bos=False,
):
    """A tokenizer of single bytes and a few special tokens, so that every boundary is exact."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + len(tokens),
        special_tokens=list(tokens),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([""], trainer)
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return with_template(tokenizer)


def of_kind(kind: Kind, tokenizer=None):
    """A tokenizer with the kind's template: of bytes, or the one given, with the tokens it
    lacks.
    """
    if tokenizer is None:
        return byte_tokenizer(
            kind.template,
            kind.tokens,
            eos=kind.tokens[0],
            bos=next((token for token in kind.tokens if "begin" in token), None),
        )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in kind.tokens]
    )
    tokenizer.eos_token, tokenizer.chat_template = kind.tokens[0], kind.template
    return tokenizer


TEXTS = (
    "yes",
    "no",
    "  code\n\n",
    "\u00e9 \u00fc ",
    "<div>",
    "<think",
    "a\n\n```py\nx = 1\n```",
    "s",
    "\u65e5\u672c \U0001f642",
    '{"a": 1}',
    "assistant\nuser",
    "User: hi",
    "42.",
    "\tq",
    "[x]",
    "one two three four five",
    "I'm",
    "a<b>c</b>",
    'say "it"\\n',
)
NAMES = ("look", "w")
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string", "description": "x"}}}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in NAMES
)
ARGUMENTS = ({"n": 3, "q": "x"}, {}, '{"q": "x", "n": [1, null]}')


def random_conversation(seed: int, kind: Kind):
    """(messages, tools, untrained): what the kind's template can show."""
    r, messages, untrained = random.Random(seed), [], set()

    def call(n: int) -> dict:
        arguments = r.choice([{"q": r.choice(TEXTS)}, *ARGUMENTS])
        return {
            "id": f"call0000{n}",
            "type": "function",
            "function": {"name": r.choice(NAMES), "arguments": arguments},
        }

    def reply(calls: int = 0) -> None:
        message = {"role": "assistant", "content": r.choice(TEXTS)}
        if calls:
            message |= {
                "content": r.choice(["", None]),
                "tool_calls": [call(n) for n in range(calls)],
            }
        elif r.random() < 0.06:
            message["content"] = ""
        elif r.random() < 0.3 and kind.thoughts:
            thought = r.choice(["hm", "let me\nsee"])
            if kind is HARMONY or kind is not R1 and r.random() < 0.5:
                message["reasoning_content"] = thought
            else:
                message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
        if r.random() < 0.2:
            untrained.add(len(messages))
        messages.append(message)

    if r.random() < 0.4:
        role = "developer" if kind is HARMONY and r.random() < 0.5 else "system"
        messages.append({"role": role, "content": r.choice(TEXTS)})
    for _ in range(r.randint(1, 5)):
        messages.append({"role": "user", "content": r.choice(TEXTS)})
        while kind.calls and r.random() < 0.25:
            reply(n := r.randint(1, kind.calls))
            messages.extend(
                {"role": "tool", "content": r.choice(TEXTS), "tool_call_id": f"call0000{k}"}
                for k in range(n)
            )
        reply()
        if r.random() < 0.04 and not kind.alternates and messages[-1]["content"]:
            reply()
    if r.random() < 0.1:
        messages.append({"role": "user", "content": "more"})
    called = any(message.get("tool_calls") for message in messages)
    return messages, TOOLS if called and kind is not R1 else (), frozenset(untrained)


def spans(kind: Kind, text: str) -> list[tuple[int, int]]:
    """Where the replies of a rendered conversation are, in characters."""
    return [found.span(1) for found in re.finditer(kind.replies, text, re.DOTALL)]
