"""Renders chat templates in a separate process, in bounded time and memory.

A template comes with a model and is third-party code: it may loop forever, write gigabytes, raise,
or end its process. The process starts at the first rendering, serves all later ones, and ends with
the parent.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lljax.errors import ModelError, first_line

START_SECONDS = 120  # for the process to start
SECONDS, SECONDS_A_MESSAGE = 10, 0.02  # for all renderings of a call; Qwen3's needs 0.0002
MEMORY = 2 << 30  # bytes for the renderings
LONGEST = 1 << 22  # characters of the rendering of a short conversation
ADVICE = "fix chat_template, or remove it to use lljax's own"


class TemplateError(ValueError):
    """An exception of a template; `kind` is its class. The message may hold a user's text."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class TemplateRefusal(ModelError):
    """The chat template raised for a conversation; `kind` is the class of its exception. The
    message may hold a user's text.
    """

    def __init__(self, error: TemplateError):
        super().__init__(
            f"the chat template refuses the conversation ({error.kind}: {first_line(error)[:200]})"
        )
        self.kind = error.kind


class Job(NamedTuple):
    """One rendering. options: of transformers' render_jinja_template, such as tools."""

    messages: Sequence[dict]
    options: dict = {}


class Rendering(NamedTuple):
    """spans: of {% generation %} blocks, if return_assistant_tokens_mask is set."""

    text: str
    spans: list[list[int]]


def render(tokenizer: Any, jobs: Sequence[Job]) -> list[Rendering | TemplateError]:
    """Renders `jobs` with the chat template of a tokenizer; a TemplateError for each that raised.

    Raises:
      ModelError: the template does not end, or exceeds its memory.
    """
    tools = next((job.options["tools"] for job in jobs if job.options.get("tools")), None)
    try:
        template = tokenizer.get_chat_template(None, tools)
    except ValueError as error:  # several templates by name, none of them for this
        raise ModelError(f"chat_template: {first_line(error)}") from None
    request = {
        "template": template,
        "special_tokens": tokenizer.special_tokens_map,
        "jobs": [{"messages": list(job.messages), "options": job.options} for job in jobs],
    }
    seconds = SECONDS + SECONDS_A_MESSAGE * sum(len(job.messages) for job in jobs)
    results: list[Rendering | TemplateError] = []
    for reply in _PROCESS.ask(json.dumps(request, default=str).encode(), seconds):
        if reply.get("kind") == "MemoryError":
            raise ModelError(
                "the model's chat template writes far more than its input, or takes "
                f"more than {MEMORY >> 30} GiB: {ADVICE}"
            )
        results.append(
            TemplateError(reply["error"], reply["kind"]) if "kind" in reply else Rendering(**reply)
        )
    return results


def chat_text(tokenizer: Any, messages: Sequence[dict], **options: Any) -> str:
    """A conversation as text, with the generation prompt of the next reply.

    options: see `Job`, such as add_generation_prompt=False.

    Raises:
      TemplateRefusal: the template refuses the conversation.
      ModelError: as `render`.
    """
    (rendered,) = render(tokenizer, [Job(messages, {"add_generation_prompt": True} | options)])
    if isinstance(rendered, TemplateError):
        raise TemplateRefusal(rendered)
    return rendered.text


class _Process:
    """The process, started on demand."""

    def __init__(self):
        self._popen: Any = None
        self._lock = threading.Lock()

    def ask(self, request: bytes, seconds: float) -> list[dict]:
        """The answer to `request`. Raises ModelError if there is none in time."""
        with self._lock:
            try:
                if self._popen is None:
                    self._start()
                return json.loads(self._exchange(request, seconds))
            except BaseException:  # interrupts too: the next call would read this answer
                self.stop()
                raise

    def stop(self) -> None:
        if self._popen is not None:
            with contextlib.suppress(OSError):
                self._popen.kill()
            with contextlib.suppress(OSError):
                self._popen.stdin.close()
            self._popen.stdout.close()
            self._popen.wait()
            self._popen = None

    def _start(self) -> None:
        # A new session: signals to the process group are for the run, which may go on rendering.
        script = Path(__file__).with_name("render_process.py")
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", script, str(MEMORY), str(LONGEST)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise ModelError(
                f"the process that runs chat templates cannot be started ({first_line(error)})"
            ) from None
        self._exchange(json.dumps({"jobs": []}).encode(), START_SECONDS)

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        until = time.monotonic() + seconds
        send = memoryview(len(request).to_bytes(8) + request)
        os.set_blocking(self._popen.stdin.fileno(), False)
        while send:
            self._wait(self._popen.stdin, select.POLLOUT, until, seconds)
            try:
                send = send[os.write(self._popen.stdin.fileno(), send) :]
            except BrokenPipeError:
                self._gone()
        return self._read(int.from_bytes(self._read(8, until, seconds)), until, seconds)

    def _read(self, size: int, until: float, seconds: float) -> bytes:
        parts = []
        while size:
            self._wait(self._popen.stdout, select.POLLIN, until, seconds)
            part = os.read(self._popen.stdout.fileno(), min(size, 1 << 20))
            if not part:
                self._gone()
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, pipe: Any, event: int, until: float, seconds: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(1000 * max(0.0, until - time.monotonic())):
            raise ModelError(
                f"the model's chat template has not ended within {seconds:.0f} seconds: {ADVICE}"
            )

    def _gone(self) -> NoReturn:
        code = self._popen.wait()
        raise ModelError(
            f"the process of the model's chat template ended (exit {code}): it ran out of "
            f"memory, or the template ended it: {ADVICE}"
        )


_PROCESS = _Process()
atexit.register(_PROCESS.stop)
