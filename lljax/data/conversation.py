"""Locates the replies of a conversation in its rendering by a chat template.

Templates move system prompts to the front, drop earlier thoughts, and write headers. So a
conversation is rendered twice: as it is, and with a mark in place of every text. The text between
the marks is the template's. Walking through both renderings shows that every text appears
unchanged, and where. The number of renderings does not grow with the number of turns.
"""

import bisect
import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from lljax.data.marks import Mark, Marker
from lljax.data.messages import THOUGHTS
from lljax.data.render import Job, Rendering, TemplateError, render
from lljax.data.spellings import spellings
from lljax.errors import first_line

OPENS_THOUGHT = re.compile(r"([<\[◁][\w:|]{0,20}think\w{0,20}[>\]▷])\s*\Z", re.IGNORECASE)
ROLES = ("system", "developer", "user", "assistant", "tool")  # others may be a user's text
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Refused(ValueError):
    """The reason why a conversation cannot be used, without any of its text."""


class _Raised(Refused):
    """The template refuses this spelling of the conversation; it may accept another."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply's place in the rendered text, in characters.

    start: after the generation prompt. end: the beginning of the end-of-turn token, None without
    one. stop: after that token, or after any other closing text. calls: the reply calls tools.
    """

    message: int
    start: int
    stop: int
    end: int | None
    calls: bool


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A rendered conversation. generated: the spans that the template marks as generated."""

    text: str
    replies: list[Reply]
    generated: list[tuple[int, int]]


def locate(
    messages: Sequence[dict],
    tools: Sequence[dict],
    tokenizer: Any,
    ends: Collection[str],
    *,
    knows_thoughts: bool,
) -> Conversation:
    """Renders a conversation and locates its replies.

    ends: the end-of-turn tokens, as text. knows_thoughts: the template shows the thought of a last
    reply, so that it omits earlier thoughts on purpose.

    Raises:
      Refused: the template raises, or does not show a text of the conversation as it is.
      ModelError: as `render`.
    """
    refused = None
    for spelled in spellings(messages):
        try:
            rendered = _Rendered(spelled, list(tools), tokenizer, ends)
            rendered.check(knows_thoughts)
            return rendered.conversation()
        except Refused as error:
            if refused is None or isinstance(refused, _Raised):  # other reasons say more
                refused = error
    assert refused is not None, "there is at least one spelling"
    raise refused


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of a text in the rendering."""

    start: int
    stop: int
    mark: Mark


class _Rendered:
    """A rendered conversation: `text`, and the `places` of its texts in their order in it."""

    def __init__(
        self, messages: list[dict], tools: list[dict], tokenizer: Any, ends: Collection[str]
    ):
        self.messages, self.tools, self.tokenizer = messages, tools, tokenizer
        self.ends = re.compile(
            "|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)"
        )
        has_spans = GENERATION.search(str(tokenizer.chat_template)) is not None
        (whole,) = self._render((messages, tools, {"return_assistant_tokens_mask": has_spans}))
        self.text, self.generated = whole.text, [(start, stop) for start, stop in whole.spans]
        self.places, self.marks = self._locate_texts()
        self._starts: dict[tuple, int] = {}
        self._prompts: dict[tuple, list[tuple[str, int]]] = {}
        self._closings: dict[tuple[str, int], int] = {}
        self._index()

    def _render(self, *jobs: tuple[list[dict], list[dict], dict]) -> list[Rendering]:
        rendered = render(
            self.tokenizer,
            [
                Job(messages, options | {"tools": tools or None})
                for messages, tools, options in jobs
            ],
        )
        renderings = []
        for rendering in rendered:
            if isinstance(rendering, TemplateError):  # its message may hold a user's text
                message = first_line(rendering)
                known = message in str(self.tokenizer.chat_template)
                reason = message if known else rendering.kind
                raise _Raised(f"the chat template refuses it ({reason[:120]})")
            renderings.append(rendering)
        return renderings

    def _locate_texts(self) -> tuple[list[_Place], list[Mark]]:
        """The places of all shown texts, and the marks of all texts."""
        marker, places = Marker(self.text), []
        hidden = [marker.message(i, message) for i, message in enumerate(self.messages)]
        tools = [marker.tool(tool) for tool in self.tools]
        between, marks = marker.split(self._render((hidden, tools, {}))[0].text)
        seen = set(marks)
        missing = next(
            (mark for mark in marker.marks if mark not in seen and mark.kind != "thought"), None
        )
        if not self.text.startswith(between[0]) or not marks:
            raise Refused(self._not_shown(missing or (marks or [Mark(0, "content", "")])[0]))
        at = len(between[0])
        for mark, then in zip(marks, between[1:], strict=True):
            shown = next(
                (text for text in mark.as_shown() if self.text.startswith(text + then, at)), None
            )
            if shown is None:
                raise Refused(self._not_shown(missing or mark))
            if not mark.shown:  # gpt-oss repeats the name of a tool at its answer
                places.append(_Place(at, at + len(shown), mark))
            mark.shown, at = True, at + len(shown) + len(then)
        if at < len(self.text):
            raise Refused(self._not_shown(missing or marks[-1]))
        return places, marker.marks

    def _index(self) -> None:
        """Builds the tables of `_before` and `_next`."""
        self._at = [place.start for place in self.places]
        self._of: list[list[_Place]] = [[] for _ in self.messages]
        last = None  # the last place of the tools
        for place in self.places:
            if place.mark.message < 0:
                last = place
            else:
                self._of[place.mark.message].append(place)
        self._last = [last]  # the last place of the tools and the messages before i
        for places in self._of:
            self._last.append(
                max(
                    (place for place in (self._last[-1], *places[-1:]) if place),
                    key=lambda place: place.start,
                    default=None,
                )
            )

    # ---------------------------------------------------------------- missing texts
    def check(self, knows_thoughts: bool) -> None:
        """Restores a missing thought of the last reply; refuses if any other text is missing."""
        last = len(self.messages) - 1
        missing = [mark for mark in self.marks if not mark.shown]
        for mark in missing:
            dropped = mark.kind == "thought" and (
                mark.message == last or knows_thoughts or not self._has_field(mark.message)
            )
            if not dropped:
                raise Refused(self._not_shown(mark))
        if any(
            place.mark.kind == "arguments" and self.text[place.start - 1] == '"'
            for place in self.places
        ):
            raise _Raised("the chat template shows arguments that are text as JSON in JSON")
        if any(mark.message == last for mark in missing):
            self._restore(last)

    def _not_shown(self, mark: Mark) -> str:
        if mark.message < 0:
            return "the chat template does not show the tools of the row"
        role = self.messages[mark.message]["role"]
        part = {"content": "", "thought": "the thought of "}.get(mark.kind, "a tool call of ")
        return (
            f"the chat template does not show {part}message {mark.message}"
            + f" ({role})" * (role in ROLES)
            + " as it is" * (mark.kind == "content")
        )

    def _has_field(self, i: int) -> bool:
        return any(name in self.messages[i] for name in THOUGHTS)

    def _restore(self, i: int) -> None:
        """Restores the thought of the last reply where the model will write it: after a generation
        prompt that opens a thought, such as DeepSeek-R1's.
        """
        places, message = self._of[i], self.messages[i]
        j, base = self._before(i)
        prompt = self._tails(i, j)[1] if i else ""
        opening = OPENS_THOUGHT.search(prompt)
        if not opening or not places or any(place.mark.kind != "content" for place in places):
            raise Refused(self._not_shown(Mark(i, "thought", "")))
        tag = opening[1]
        if self._has_field(i):
            thought = f"{message['reasoning_content'].strip()}\n{tag[0]}/{tag[1:]}\n\n"
            reply = thought + message.get("content", "")
        else:
            reply = message["content"].lstrip().removeprefix(tag)
        reply = (reply.lstrip("\n") if prompt.endswith("\n") else reply).rstrip()
        start, rest = base + len(prompt), self.text[places[-1].stop :]
        self.text = self.text[:base] + prompt + reply + rest
        self.places = [place for place in self.places if place.stop <= base]
        self.places.append(_Place(start, start + len(reply), places[-1].mark))
        self.generated = []
        self._index()

    # ---------------------------------------------------------------- replies
    def conversation(self) -> Conversation:
        replies = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        starts = [self._start(i) for i in replies]
        limits = [*starts[1:], len(self.text)]
        return Conversation(
            self.text, list(map(self._reply, replies, starts, limits)), self.generated
        )

    def _start(self, i: int) -> int:
        places = self._of[i]
        first = bisect.bisect_left(self._at, places[0].start) if places else 0
        j, base = self._before(i)
        if self.places[first : first + len(places)] != places or (j is not None and j > i):
            raise Refused(self._mixed(i))
        return base + self._prompt(i, j, self.text[base : self._next(base)], bool(places))

    def _reply(self, i: int, start: int, limit: int) -> Reply:
        """limit: the start of the next reply."""
        calls = bool(self.messages[i].get("tool_calls"))
        j, base, after = *self._before(i), start
        if self._of[i]:
            last = self._of[i][-1]
            j, base, space = i, last.stop, last.mark.space
            after = base + len(space) * self.text.startswith(space, base)
        limit = min(limit, self._next(after))
        if not start <= after <= limit:
            raise Refused(self._mixed(i))
        if end := self.ends.search(self.text, after, limit):
            return Reply(i, start, stop=end.end(), end=end.start(), calls=calls)
        closing = self._closing(i, j, self.text[after:limit], after - base)
        return Reply(i, start, stop=after + closing, end=None, calls=calls)

    def _mixed(self, i: int) -> str:
        return f"the chat template mixes message {i} with another"

    def _before(self, i: int) -> tuple[int | None, int]:
        """The message (-1 for tools) of the last text before reply i, and the end of that text."""
        place = self._last[i]
        if self._of[i]:
            n = bisect.bisect_left(self._at, self._of[i][0].start)
            place = self.places[n - 1] if n else None
        return (place.mark.message, place.stop) if place else (None, 0)

    def _next(self, at: int) -> int:
        n = bisect.bisect_left(self._at, at)
        return self._at[n] if n < len(self._at) else len(self.text)

    def _tails(self, until: int, j: int | None) -> tuple[str, str]:
        """The text after message j in a rendering of messages[:until] alone, without and with a
        generation prompt.
        """
        marker = Marker(self.text)
        messages = [
            marker.message(i, message) if i == j else message
            for i, message in enumerate(self.messages[:until])
        ]
        tools = [marker.tool(tool) for tool in self.tools] if j == -1 else self.tools
        closed, opened = self._render(
            (messages, tools, {}), (messages, tools, {"add_generation_prompt": True})
        )
        return marker.after_marks(closed.text), marker.after_marks(opened.text)

    def _prompt(self, i: int, j: int | None, gap: str, has_text: bool) -> int:
        """The start of reply i in the gap between the text of message j and the text of the reply.

        The prompt is the part of the generation prompt that the gap shows (R1's opens a thought
        that is omitted from the history).
        """
        roles = tuple(
            (message["role"], bool(message.get("tool_calls")))
            for message in self.messages[max(j or 0, 0) : i]
        )
        key = (roles, gap, has_text)
        if key in self._starts:
            return self._starts[key]
        for prompt, rest in self._prompts.get(roles, ()) if has_text else ():
            if gap.endswith(prompt):  # the text before the prompt belongs to message j
                return len(gap) - rest
        closed, opened = self._tails(max(i, 1), j if i else 0)
        least, shown = _shared(closed, opened), _shared(opened, gap)
        if i == 0 or shown < least:  # nothing precedes it, or a last message ends differently
            prompt = opened[least:]
            at = -1 if not prompt else gap.rfind(prompt) if has_text else gap.find(prompt)
            if at < 0 and i:
                raise Refused(self._mixed(i))
            least = shown = at + len(prompt) if at >= 0 else len(gap) * has_text
        elif shown < len(opened):  # "<think>" and "<tool_call>" share no token
            shown = max(least, self._shared_tokens(opened, gap)[0])
        end = None if has_text else self.ends.search(gap, least)
        self._starts[key] = start = min(shown, end.start()) if end else shown
        if has_text and gap[least:].strip():
            self._prompts.setdefault(roles, []).append((gap[least:], len(gap) - start))
        return start

    def _closing(self, i: int, j: int | None, gap: str, skip: int) -> int:
        """The length of the closing text of reply i in the gap after it: the text that would follow
        if the reply were the last, as far as the gap has it.

        skip: characters between the text of message j and the gap.
        """
        key = (gap, skip)
        if key not in self._closings:
            closed = self._tails(i + 1, j)[0][skip:].rstrip()
            if not gap.startswith(closed):  # never part of the next turn's marker
                common, special = self._shared_tokens(closed, gap)
                closed = closed[:common] if special else re.sub(r"\S+\Z", "", closed[:common])
            self._closings[key] = len(closed.rstrip())
        return self._closings[key]

    def _shared_tokens(self, a: str, b: str) -> tuple[int, bool]:
        """The length of the common prefix in whole tokens, and whether its last token is an added
        token, which is never part of a word.
        """
        first, other = (
            self.tokenizer(
                text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
            )
            for text in (a, b)
        )
        n = _shared(first["input_ids"], other["input_ids"])
        if not n:
            return 0, True
        special = first["input_ids"][n - 1] in self.tokenizer.added_tokens_decoder
        return first["offset_mapping"][n - 1][1], special


def _shared(a: Sequence, b: Sequence) -> int:
    """The length of the common prefix of two texts or lists."""
    return len(os.path.commonprefix((tuple(a), tuple(b))))
