"""A conversation: what was said so far, and as much of it as the model can read."""

from lljax.errors import ConfigError
from lljax.generation.prompt import chat_tokens


class TooLong(ConfigError):
    """A message does not fit what the model reads, though all before it were left out."""


class Chat:
    """messages: the system's, where there is one, and then the user's and the model's in turn.
    left_out: how many of these were dropped since they no longer fit `room` tokens, oldest first
      and two at a time.
    """

    def __init__(self, tokenizer, room: int, system: str = ""):
        self.tokenizer, self.room, self.left_out = tokenizer, room, 0
        self.messages = [{"role": "system", "content": system}] if system else []
        self._first = len(self.messages)

    def ask(self, text: str) -> list[int]:
        """The tokens that the model continues with its reply to `text`.

        Raises:
          TooLong: it alone does not fit; the conversation is as it was before.
          ModelError: as `chat_text`.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        before = len(asked)
        while len(tokens := chat_tokens(self.tokenizer, asked)) > self.room:
            if len(asked) == self._first + 1:
                raise TooLong(
                    f"the message takes {len(tokens):,} tokens with what the template adds, "
                    f"and the model reads {self.room:,} before its reply"
                )
            del asked[self._first : self._first + 2]
        self.messages, self.left_out = asked, self.left_out + before - len(asked)
        return tokens

    def heard(self, reply: str) -> None:
        self.messages.append({"role": "assistant", "content": reply})
