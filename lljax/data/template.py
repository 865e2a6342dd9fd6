"""Documents into tokens, and which of those tokens are trained."""

import numpy as np

from lljax.data.formats import Document

# For a base without a chat template of its own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message.role | capitalize }}:\n{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}")


def encode(document: Document, tokenizer, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens uint32 [n] and the mask of trained ones bool [n].

    loss_on: "assistant" trains replies with the token that ends them, completions and plain text; "everything" trains
    every token. Conversations go through the tokenizer's own chat template.

    Raises:
      ValueError: the template refuses the conversation, or no token is trained.
    """
    if document.messages:
        tokens, mask = _conversation(list(document.messages), tokenizer)
    else:
        prompt = tokenizer(document.prompt, add_special_tokens=False)["input_ids"] if document.prompt else []
        text = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [*start, *prompt, *text, *end]
        mask = [not document.prompt] * len(start) + [False] * len(prompt) + [True] * (len(text) + len(end))
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


def _conversation(messages: list[dict], tokenizer):
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("the conversation has no assistant message")
    template = tokenizer.chat_template
    try:
        if isinstance(template, str) and "{% generation %}" in template.replace("{%-", "{%").replace("-%}", "%}"):
            out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True,
                                                return_assistant_tokens_mask=True)
            return out["input_ids"], out["assistant_masks"]
        text, spans = _rendered(messages, tokenizer)
    except ValueError:
        raise
    except Exception as error:               # templates raise what they like, through Jinja
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the chat template refuses it ({reason})") from None
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask, k = [], 0
    for start, stop in out["offset_mapping"]:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        mask.append(k < len(spans) and stop > start >= spans[k][0])
    return out["input_ids"], mask


def _rendered(messages: list[dict], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the spans of the assistant's replies with what ends them.

    A reply starts where the conversation before it ends with its generation prompt, and ends with the text that the
    template puts behind it. Some templates render a reply differently once others follow (Qwen3 drops its thoughts),
    so its place is looked for in the whole text and not taken from a prefix.
    """
    def render(part, prompt):
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    whole, spans, cursor = render(messages, False), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(messages[:i], True) if i else "", render(messages[:i + 1], False).rstrip()
        start = len(before) if whole.startswith(before) else cursor
        if whole.startswith(through):
            stop = len(through)
        else:
            content = (message.get("content") or "").strip()
            at, own = whole.find(content, start), through.rfind(content)
            if not content or at < 0 or own < 0:
                raise ValueError(f"the chat template does not show message {i} as it is")
            start = start if whole.startswith(before) else at
            stop = at + len(content)
            tail = through[own + len(content):]
            stop += len(tail) if whole.startswith(tail, stop) else 0
        spans.append((start, stop))
        cursor = stop
    return whole, spans
