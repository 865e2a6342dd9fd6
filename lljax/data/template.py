"""Tokenizes documents and marks the trained tokens."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lljax.data.conversation import Refused, locate
from lljax.data.formats import Document
from lljax.data.turn_ends import turns

# For a base model without a chat template. It shows every part of a conversation.
PLAIN_TEMPLATE = (
    "{% if tools %}### Tools:\n{{ tools | tojson }}\n\n{% endif %}"
    "{% for message in messages %}### {{ message.role | capitalize }}:\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n"
    "{% endif %}"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ '\n' if message.content or not loop.first }}"
    "{{ (call.function or call) | tojson }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def encode(document: Document, tokenizer: Any, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens uint32 [n] and the mask of trained tokens bool [n].

    loss_on: "assistant" trains replies with their end-of-turn token, completions and plain text;
    "everything" trains all tokens except replies whose loss is off. Conversations use the
    tokenizer's chat template.

    Raises:
      ValueError: the template refuses the conversation or does not show all of it, or no token is
        trained.
      ModelError: the template does not end, or exceeds its memory.
    """
    if document.messages:
        tokens, mask = _conversation(document, tokenizer, loss_on)
    else:
        tokens, mask = _text(document, tokenizer, loss_on)
    mask = np.asarray(mask, bool)
    if not mask[1:].any():  # nothing predicts the first token of a document
        raise ValueError("no token of it is trained")
    return np.asarray(tokens, np.uint32), mask


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds its bos token to a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def missing_bos(tokenizer: Any, text: str) -> list[int]:
    """[bos] if the tokenizer adds bos and this text does not begin with it, otherwise []."""
    begins = not adds_bos(tokenizer) or text.lstrip().startswith(tokenizer.bos_token)
    return [] if begins else [tokenizer.bos_token_id]


def with_template(tokenizer: Any) -> Any:
    """The tokenizer, or if it has no chat template, a copy with PLAIN_TEMPLATE, after bos if it
    adds bos.
    """
    if tokenizer.chat_template is not None:
        return tokenizer
    templated = copy.copy(tokenizer)
    templated.chat_template = "{{ bos_token }}" * adds_bos(tokenizer) + PLAIN_TEMPLATE
    return templated


def turn_ends(tokenizer: Any) -> tuple[int, ...]:
    """The ids of the end-of-turn tokens of the tokenizer's chat template; () without a template.

    Raises:
      ModelError: the template does not end, or exceeds its memory.
    """
    return tuple(turns(tokenizer).ends.values()) if tokenizer.chat_template else ()


def _text(document: Document, tokenizer: Any, loss_on: str) -> tuple[list[int], Sequence[bool]]:
    # Tokenized together, as at inference; a token across the boundary belongs to the completion.
    text, n = document.prompt + document.text, len(document.prompt)
    ids, offsets = _tokenized(text, tokenizer)
    whole = loss_on == "everything" or not n
    mask = [whole or stop > n for _, stop in offsets]
    bos = missing_bos(tokenizer, text)
    ids, mask = [*bos, *ids], [whole] * len(bos) + mask
    if tokenizer.eos_token_id is not None and not text.rstrip().endswith(tokenizer.eos_token):
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    return ids, mask


def _conversation(
    document: Document, tokenizer: Any, loss_on: str
) -> tuple[list[int], Sequence[bool] | np.ndarray]:
    trained = {
        i
        for i, message in enumerate(document.messages)
        if message["role"] == "assistant" and i >= document.given and i not in document.untrained
    }
    if not trained:
        raise Refused("the conversation has no assistant message that is trained")
    turn = turns(tokenizer)
    located = locate(
        document.messages, document.tools, tokenizer, turn.ends, knows_thoughts=turn.thoughts
    )
    ids, offsets = _tokenized(located.text, tokenizer)
    spans, generated = [], np.asarray(located.generated, np.int64).reshape(-1, 2)
    for reply in located.replies:
        if reply.message not in trained:
            continue
        first, after = (
            np.searchsorted(generated[:, 1], reply.start, "right"),
            np.searchsorted(generated[:, 0], reply.stop),
        )
        marked = [(start, min(stop, reply.stop)) for start, stop in generated[first:after]]
        spans += marked or [(reply.start, reply.stop)]
        if reply.end is not None:
            spans.append((reply.end, reply.stop))
    if loss_on == "everything":
        off = [
            (reply.start, reply.stop)
            for reply in located.replies
            if reply.message in document.untrained
        ]
        mask = ~_inside(off, offsets)
    else:
        mask = _inside(spans, offsets)
    last = located.replies[-1]
    if last.message == len(document.messages) - 1 and last.end is None:
        end = turn.last[last.calls]
        end = tokenizer.eos_token_id if end is None else end
        if end is not None:
            if last.message in trained:  # with white space before it
                mask |= _inside([(last.stop, len(located.text))], offsets)
            ids, mask = [*ids, end], [*mask, last.message in trained]
    return ids, mask


def _inside(
    spans: Iterable[tuple[int, int]], offsets: Sequence[tuple[int, int]] | np.ndarray
) -> np.ndarray:
    """Whether each token lies entirely inside a span of characters, bool [n]."""
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    inside = np.zeros(len(offsets), bool)
    for start, stop in spans:
        first, after = np.searchsorted(offsets[:, 0], (start, stop))
        begin, end = offsets[first:after].T
        inside[first:after] |= (begin < end) & (end <= stop)
    return inside


def _tokenized(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    try:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, not a subclass of Exception
            raise
        raise Refused("the tokenizer cannot read a text of it") from None
    return out["input_ids"], out["offset_mapping"]
