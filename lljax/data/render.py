"""Renders chat templates in a separate process, in bounded time and memory.

A template comes with a model and is third-party code: it may loop forever, write gigabytes, raise,
or end its process. The process starts at the first rendering, serves all later ones, and ends with
the parent.
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lljax.data.child import Child, ChildEnded
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
        self._child: Child | None = None
        self._lock = threading.Lock()

    def ask(self, request: bytes, seconds: float) -> list[dict]:
        """The answer to `request`. Raises ModelError if there is none in time."""
        with self._lock:
            limit = START_SECONDS
            try:
                if self._child is None:
                    self._child = _start()
                    self._child.ask(json.dumps({"jobs": []}).encode(), limit)
                limit = seconds
                return json.loads(self._child.ask(request, limit))
            except TimeoutError:
                self.stop()
                raise ModelError(
                    f"the model's chat template has not ended within {limit:.0f} seconds: {ADVICE}"
                ) from None
            except ChildEnded as ended:
                self.stop()
                raise ModelError(
                    f"the process of the model's chat template ended (exit {ended.code}): it ran "
                    f"out of memory, or the template ended it: {ADVICE}"
                ) from None
            except BaseException:  # interrupts too: the next call would read this answer
                self.stop()
                raise

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


def _start() -> Child:
    script = Path(__file__).with_name("render_process.py")
    command = [sys.executable, "-P", script, str(MEMORY), str(LONGEST)]
    try:
        return Child(command, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise ModelError(
            f"the process that runs chat templates cannot be started ({first_line(error)})"
        ) from None


_PROCESS = _Process()
atexit.register(_PROCESS.stop)
