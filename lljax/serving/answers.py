"""The bodies of answers: whole completions, chunks of a stream, usage.

A choice turns the pieces of the engine into deltas; a whole answer is the sum of its deltas.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from lljax.generation.completion import Growing, Piece
from lljax.generation.detokenize import Detokenizer
from lljax.serving.jobs import Job
from lljax.serving.logprobs import TokenTexts, chat_logprobs, text_logprobs
from lljax.serving.tools import ToolReader


class ChatChoice:
    """A choice of /v1/chat/completions."""

    def __init__(self, index: int, job: Job, texts: TokenTexts):
        self.index, self.tokens = index, 0
        self._job, self._texts = job, texts
        self._top = job.values["top_logprobs"]
        self._scored = job.values["logprobs"]
        self._tools = ToolReader(job.form) if job.form else None
        self._content: list[str] = []
        self._calls: list[dict] = []
        self._logprobs: list[dict] = []
        self._reason: str | None = None

    def begin(self, growing: Growing) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def add(self, piece: Piece) -> list[dict]:
        """The chunks that a piece adds to a stream."""
        text, scored = piece.text, []
        if self._tools:
            text = self._tools.add(text)
            if piece.reason:
                text += self._tools.finish()
                self._calls = self._tools.calls
        if piece.token is not None:
            self.tokens += 1
            if piece.logprobs:
                scored = [chat_logprobs(self._texts, piece.token, piece.logprobs, self._top)]
        self._content.append(text)
        self._logprobs += scored
        chunks = [self._chunk({"content": text}, scored)] if text or scored else []
        if piece.reason:
            self._reason = "tool_calls" if self._calls else _reason(piece, self._job)
            if self._calls:
                calls = [{"index": n} | call for n, call in enumerate(self._calls)]
                chunks.append(self._chunk({"tool_calls": calls}))
            chunks.append(self._chunk({}, reason=self._reason))
        return chunks

    def whole(self) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._content_logprobs(self._logprobs),
            "finish_reason": self._reason,
        }

    def _chunk(self, delta: dict, scored: Any = (), reason: str | None = None) -> dict[str, Any]:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": self._content_logprobs(scored) if scored else None,
            "finish_reason": reason,
        }

    def _content_logprobs(self, scored: list[dict]) -> dict | None:
        return {"content": scored, "refusal": None} if self._scored else None


class TextChoice:
    """A choice of /v1/completions."""

    def __init__(self, index: int, job: Job, texts: TokenTexts):
        self.index, self.tokens = index, 0
        self._job, self._texts, self._values = job, texts, job.values
        self._prompt, self._tokenizer = job.prompt(index), job.served.tokenizer
        self._silent = job.values["max_tokens"] == 0
        self._length = 0  # characters so far
        self._deltas: list[dict] = []

    def begin(self, growing: Growing) -> list[dict]:
        """The prompt, if it is to be repeated."""
        if not self._values["echo"]:
            return []
        prompt = self._prompt
        text, offsets = self._spelled(prompt.ids[prompt.added :])
        if prompt.text is not None:
            text = prompt.text
        self._length = len(text)
        logprobs = None
        if self._values["logprobs"] is not None:
            logprobs = text_logprobs(
                self._texts,
                prompt.ids,
                [None, *growing.prompt_logprobs],
                [0] * prompt.added + offsets,
                self._values["logprobs"],
            )
        return self._keep(text, logprobs, None)

    def add(self, piece: Piece) -> list[dict]:
        """The chunks that a piece adds to a stream."""
        if self._silent:
            return self._keep("", None, "length")
        reason, logprobs = _reason(piece, self._job), None
        if piece.token is not None:
            self.tokens += 1
            if piece.logprobs:
                logprobs = text_logprobs(
                    self._texts,
                    [piece.token],
                    [piece.logprobs],
                    [self._length],
                    self._values["logprobs"],
                )
        self._length += len(piece.text)
        return self._keep(piece.text, logprobs, reason)

    def whole(self) -> dict[str, Any]:
        """The sum of the deltas."""
        logprobs: dict[str, list] | None = None
        for delta in self._deltas:
            for name, values in (delta["logprobs"] or {}).items():
                logprobs = logprobs or {}
                logprobs[name] = logprobs.get(name, []) + values
        return {
            "index": self.index,
            "text": "".join(delta["text"] for delta in self._deltas),
            "logprobs": logprobs,
            "finish_reason": self._deltas[-1]["finish_reason"],
        }

    def _keep(self, text: str, logprobs: dict | None, reason: str | None) -> list[dict]:
        if not (text or logprobs or reason):
            return []
        delta = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        self._deltas.append(delta)
        return [delta]

    def _spelled(self, ids: list[int]) -> tuple[str, list[int]]:
        """The text of tokens, and where in it each begins."""
        detokenizer, text, offsets = Detokenizer(self._tokenizer), "", []
        for token in ids:
            offsets.append(len(text))
            text += detokenizer.add(token)
        return text + detokenizer.finish(), offsets


def _reason(piece: Piece, job: Job) -> str | None:
    """Why a piece is the last. A token that ends the text is written like others where it is the
    only one and scored, see lljax.serving.jobs.
    """
    ended = piece.token in job.served.ends and not job.values["ignore_eos"]
    return "stop" if piece.reason and ended else piece.reason


class Answer:
    """What the chunks and the whole of one answer share."""

    def __init__(self, job: Job, chat: bool):
        self._job, self._chat = job, chat
        kind, whole, chunk = (
            ("chatcmpl", "chat.completion", "chat.completion.chunk")
            if chat
            else ("cmpl", "text_completion", "text_completion")
        )
        self._objects = whole, chunk
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": job.served.name,
        }

    def choices(self) -> list[Any]:
        """A ChatChoice or TextChoice for each request."""
        kind, texts = ChatChoice if self._chat else TextChoice, self._job.served.texts
        return [kind(index, self._job, texts) for index in range(len(self._job.requests))]

    def whole(self, choices: Sequence[Any], growing: Sequence[Growing]) -> dict[str, Any]:
        return self._head | {
            "object": self._objects[0],
            "choices": [choice.whole() for choice in choices],
            "usage": self.usage(choices, growing),
        }

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict[str, Any]:
        body = self._head | {"object": self._objects[1], "choices": choices}
        wanted = self._job.values["stream_options"].get("include_usage", False)
        return body | {"usage": usage} if wanted else body

    def usage(self, choices: Iterable[Any], growing: Sequence[Growing]) -> dict[str, Any]:
        """growing: of the choices. A prompt counts once, however many choices it has."""
        read = sum(len(prompt.ids) for prompt in self._job.prompts)
        written = sum(choice.tokens for choice in choices)
        firsts = growing[:: len(growing) // len(self._job.prompts)]
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(one.reused for one in firsts)},
        }
