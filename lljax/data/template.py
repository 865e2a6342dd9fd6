"""Documents into tokens, and which of those tokens are trained."""

import os

import numpy as np

from lljax.data.formats import Document

# For a base without a chat template of its own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message.role | capitalize }}:\n{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}")
MARK = "\ue000content\ue000"             # private characters, which no text holds by chance


class Refused(ValueError):
    """Why a conversation cannot be used, in words of ours: no text of it is among them."""


def encode(document: Document, tokenizer, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens uint32 [n] and the mask of trained ones bool [n].

    loss_on: "assistant" trains replies with the token that ends them, completions and plain text; "everything" trains
    every token. Conversations go through the tokenizer's own chat template.

    Raises:
      ValueError: the template refuses the conversation, or no token is trained.
    """
    if document.messages:
        tokens, mask = _conversation(list(document.messages), document.given, tokenizer)
    else:
        # Together, as a prompt and its continuation are read; a token across the boundary belongs to the completion.
        ids, offsets = _tokenised(document.prompt + document.text, tokenizer)
        start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [*start, *ids, *end]
        completion = [stop > len(document.prompt) or not document.prompt for _, stop in offsets]
        mask = [not document.prompt] * len(start) + completion + [True] * len(end)
    mask = np.ones(len(tokens), bool) if loss_on == "everything" else np.asarray(mask, bool)
    if not mask[1:].any():                   # the first token of a document has nothing to be predicted from
        raise ValueError("no token of it is trained")
    return np.asarray(tokens, np.uint32), mask


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts its bos token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def with_template(tokenizer):
    """The tokenizer, given PLAIN_TEMPLATE where it has no chat template."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def _tokenised(text: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def _conversation(messages: list[dict], given: int, tokenizer):
    if not any(message["role"] == "assistant" for message in messages[given:]):
        raise Refused("the conversation has no assistant message")
    template = tokenizer.chat_template
    try:
        marks = isinstance(template, str) and "{% generation %}" in template.replace("{%-", "{%").replace("-%}", "%}")
        if marks and not given:
            out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True,
                                                return_assistant_tokens_mask=True,
                                                tokenizer_kwargs={"verbose": False})
            return out["input_ids"], out["assistant_masks"]
        text, spans = _rendered(messages, given, tokenizer)
    except Refused:
        raise
    except Exception as error:               # templates raise what they like, through Jinja, and may put the content into it
        said = next(iter(str(error).strip().splitlines()), "")
        reason = said if said and said in str(template) else type(error).__name__
        raise Refused(f"the chat template refuses it ({reason[:120]})") from None
    ids, offsets = _tokenised(text, tokenizer)
    mask, k = [], 0
    for start, stop in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        mask.append(k < len(spans) and stop > start >= spans[k][0])
    return ids, mask


def _rendered(messages: list[dict], given: int, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the spans of the replies after the first `given` messages, with what ends them.

    A reply starts where the conversation before it ends with as much of its generation prompt as the text shows (R1's
    opens a thought that the history drops), and ends with the text that the template puts behind it.

    Raises:
      Refused: a reply has no place of its own in the text.
    """
    def render(part, prompt=False):
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    whole = render(messages)

    def marked(i):
        part = [*messages[:i], messages[i] | {"content": MARK}]
        head, found, rest = render(part + messages[i + 1:]).partition(MARK)
        if not found or MARK in rest:
            raise Refused(f"the chat template does not show message {i} as it is")
        return part, head, rest

    def ending(i):
        """A place in `whole`, and what messages[:i + 1] show from there on: without and with a generation prompt.

        Some templates render a message otherwise once others follow (Qwen3 drops the thoughts of a reply): then the
        place is where its content ends, which a mark in its stead shows.
        """
        closed, opened = render(messages[:i + 1]), render(messages[:i + 1], True)
        if whole.startswith(closed.rstrip()):
            return 0, closed, opened
        part, _, rest = marked(i)
        if not whole.endswith(rest):
            raise Refused(f"the chat template does not show message {i} as it is")
        return len(whole) - len(rest), render(part).rpartition(MARK)[2], render(part, True).rpartition(MARK)[2]

    spans, cursor = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < given:
            continue
        at, closed, opened = ending(i)
        stop = at + _shared(closed.rstrip(), whole[at:])
        if i:
            at, closed, opened = ending(i - 1)
            least, shown = at + _shared(closed, opened), at + _shared(opened, whole[at:])
            start = max(least, shown)
            if shown < at + len(opened) and isinstance(message.get("content"), str):
                head = marked(i)[1]                              # a reply of "<div>" begins as "<think>" does
                start = min(start, max(least, len(head))) if whole.startswith(head) else start
        else:
            head, prompt = marked(0)[1], opened[_shared(closed, opened):]
            start = head.find(prompt) + len(prompt) if prompt and prompt in head else _shared(head, whole)
        if not cursor <= start <= stop:
            raise Refused(f"the chat template mixes message {i} with another")
        spans.append((start, stop))
        cursor = stop
    return whole, spans


def _shared(a: str, b: str) -> int:
    """The length of the prefix that two texts share."""
    return len(os.path.commonprefix((a, b)))
