"""A conversation, shortened to the tokens that the model can read."""

from typing import Any

from lljax.data.prompt_tokens import chat_tokens
from lljax.errors import ConfigError


class TooLong(ConfigError):
    """A message does not fit even without all messages before it."""


class Chat:
    """messages: the system's, if there is one, then the user's and the model's in turn.

    left_out: the number of messages dropped to fit `room` tokens, oldest first, two at a time.
    """

    def __init__(self, tokenizer: Any, room: int, system: str = ""):
        self.tokenizer, self.room, self.left_out = tokenizer, room, 0
        self.messages = [{"role": "system", "content": system}] if system else []
        self._first = len(self.messages)

    def ask(self, text: str) -> list[int]:
        """Adds the user's message `text`; returns the prompt's tokens.

        Raises:
          TooLong: the message alone does not fit; the conversation stays unchanged.
          ModelError: as `chat_text`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        before = len(messages)
        while len(tokens := chat_tokens(self.tokenizer, messages)) > self.room:
            if len(messages) == self._first + 1:
                raise TooLong(
                    f"the message takes {len(tokens):,} tokens with the template's own, "
                    f"and the model reads {self.room:,} before its reply"
                )
            del messages[self._first : self._first + 2]
        self.messages, self.left_out = messages, self.left_out + before - len(messages)
        return tokens

    def add_reply(self, reply: str) -> None:
        self.messages.append({"role": "assistant", "content": reply})
