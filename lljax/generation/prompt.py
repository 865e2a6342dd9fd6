"""What a chat model is given to read: a conversation, rendered by the tokenizer's chat template."""

from collections.abc import Sequence

from lljax.errors import ModelError
from lljax.files import first_line


def chat_text(tokenizer, messages: Sequence[dict], **options) -> str:
    """A conversation as text, with the beginning of the reply that is to come.

    options: for the template, such as add_generation_prompt=False.

    Raises:
      ModelError: the template refuses it. Templates raise what they like.
    """
    try:
        options = {"add_generation_prompt": True} | options
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:
        raise ModelError("the chat template refuses the conversation "
                         f"({first_line(error)[:200]})") from None


def chat_tokens(tokenizer, messages: Sequence[dict], begun: str = "") -> list[int]:
    """The tokens of `chat_text` and the `begun` reply after it; a template has bos where it wants it.

    Raises:
      ModelError: as `chat_text`.
    """
    text = chat_text(tokenizer, messages) + begun
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
