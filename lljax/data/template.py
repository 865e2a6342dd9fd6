"""Documents into tokens, and which of those tokens are trained."""

from collections.abc import Iterable

import numpy as np

from lljax.data.conversation import Refused, locate
from lljax.data.formats import Document
from lljax.data.turns import turns

# For a base without a chat template of its own. It shows all that a conversation holds.
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


def encode(document: Document, tokenizer, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens uint32 [n] and the mask of trained ones bool [n].

    loss_on: "assistant" trains replies with the token that ends them, completions and plain text;
    "everything" trains every token but those of replies whose loss is off. Conversations go
    through the tokenizer's own chat template.

    Raises:
      ValueError: the template refuses the conversation or does not show all of it, or no token
        is trained.
      ModelError: the template does not end, or takes too much memory.
    """
    if document.messages:
        tokens, mask = _conversation(document, tokenizer, loss_on)
    else:
        tokens, mask = _text(document, tokenizer, loss_on)
    mask = np.asarray(mask, bool)
    if not mask[1:].any():  # nothing predicts the first token of a document
        raise ValueError("no token of it is trained")
    return np.asarray(tokens, np.uint32), mask


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts its bos token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def missing_bos(tokenizer, text: str) -> list[int]:
    """The bos token if the tokenizer puts one before a text and this text does not begin with
    it.
    """
    begins = not adds_bos(tokenizer) or text.lstrip().startswith(tokenizer.bos_token)
    return [] if begins else [tokenizer.bos_token_id]


def with_template(tokenizer):
    """The tokenizer, given PLAIN_TEMPLATE where it has no chat template, with bos before it where
    the tokenizer puts one before a text."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos(tokenizer) + PLAIN_TEMPLATE
    return tokenizer


def turn_ends(tokenizer) -> tuple[int, ...]:
    """The ids of the tokens that end a reply under the tokenizer's chat template; none without one.

    Raises:
      ModelError: the template does not end, or takes too much memory.
    """
    return tuple(turns(tokenizer).ends.values()) if tokenizer.chat_template else ()


def _text(document: Document, tokenizer, loss_on: str):
    # Together, as a prompt and its continuation are read; a token across the boundary belongs to
    # the completion.
    text, n = document.prompt + document.text, len(document.prompt)
    ids, offsets = _tokenized(text, tokenizer)
    whole = loss_on == "everything" or not n
    mask = [whole or stop > n for _, stop in offsets]
    bos = missing_bos(tokenizer, text)
    ids, mask = [*bos, *ids], [whole] * len(bos) + mask
    if tokenizer.eos_token_id is not None and not text.rstrip().endswith(tokenizer.eos_token):
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    return ids, mask


def _conversation(document: Document, tokenizer, loss_on: str):
    trained = {
        i
        for i, message in enumerate(document.messages)
        if message["role"] == "assistant" and i >= document.given and i not in document.untrained
    }
    if not trained:
        raise Refused("the conversation has no assistant message that is trained")
    turn = turns(tokenizer)
    found = locate(
        document.messages, document.tools, tokenizer, turn.ends, knows_thoughts=turn.thoughts
    )
    ids, offsets = _tokenized(found.text, tokenizer)
    spans, generated = [], np.asarray(found.generated, np.int64).reshape(-1, 2)
    for reply in found.replies:
        if reply.message not in trained:
            continue
        first, behind = (
            np.searchsorted(generated[:, 1], reply.start, "right"),
            np.searchsorted(generated[:, 0], reply.stop),
        )
        own = [(start, min(stop, reply.stop)) for start, stop in generated[first:behind]]
        spans += own or [(reply.start, reply.stop)]
        if reply.end is not None:
            spans.append((reply.end, reply.stop))
    if loss_on == "everything":
        off = [
            (reply.start, reply.stop)
            for reply in found.replies
            if reply.message in document.untrained
        ]
        mask = ~_inside(off, offsets)
    else:
        mask = _inside(spans, offsets)
    last = found.replies[-1]
    if last.message == len(document.messages) - 1 and last.end is None:
        end = turn.last[last.calls]
        end = tokenizer.eos_token_id if end is None else end
        if end is not None:
            if last.message in trained:  # with white space before it
                mask |= _inside([(last.stop, len(found.text))], offsets)
            ids, mask = [*ids, end], [*mask, last.message in trained]
    return ids, mask


def _inside(spans: Iterable[tuple[int, int]], offsets) -> np.ndarray:
    """Which tokens lie inside a span of characters, whole: bool [n]."""
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    inside = np.zeros(len(offsets), bool)
    for start, stop in spans:
        first, behind = np.searchsorted(offsets[:, 0], (start, stop))
        begin, end = offsets[first:behind].T
        inside[first:behind] |= (begin < end) & (end <= stop)
    return inside


def _tokenized(text: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    try:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; no Exception
            raise
        raise Refused("the tokenizer cannot read a text of it") from None
    return out["input_ids"], out["offset_mapping"]
