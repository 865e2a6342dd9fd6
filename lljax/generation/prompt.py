"""What a chat model is given to read: a conversation, rendered by the tokenizer's chat template."""

from collections.abc import Sequence

from lljax.errors import ModelError
from lljax.files import first_line


def render(tokenizer, messages: Sequence[dict], **how) -> str:
    """The conversation as text, with the beginning of the reply. how: for `apply_chat_template`, such as
    add_generation_prompt=False.

    Raises:
      ModelError: the template refuses it. Templates raise what they like.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **{"add_generation_prompt": True} | how)
    except Exception as error:
        raise ModelError(f"the chat template refuses the conversation ({first_line(error)[:200]})") from None


def chat_tokens(tokenizer, messages: Sequence[dict], begun: str = "") -> list[int]:
    """The tokens of `render`'s text and the `begun` reply after it; a template has bos where it wants it.

    Raises:
      ModelError: as `render`.
    """
    return tokenizer(render(tokenizer, messages) + begun, add_special_tokens=False, verbose=False)["input_ids"]
