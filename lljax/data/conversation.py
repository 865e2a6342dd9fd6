"""Where the replies of a conversation are in what a chat template makes of it.

Templates move systems to the front, drop earlier thoughts, write headers of their own. So a
conversation is rendered twice: as it is, and with a mark in place of every text. What stands
between the marks is the template's. The two are walked through together, which shows that every
text is there as it was, and where. The number of renderings does not grow with that of turns.
"""

import bisect
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence

from lljax.data.formats import THOUGHTS
from lljax.data.marks import Mark, Marker, with_functions
from lljax.data.render import Job, Rendering, TemplateError, render
from lljax.errors import first_line

OPENS_THOUGHT = re.compile(r"([<\[◁][\w:|]{0,20}think\w{0,20}[>\]▷])\s*\Z", re.IGNORECASE)
ROLES = ("system", "developer", "user", "assistant", "tool")  # others may be text of the row
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Refused(ValueError):
    """Why a conversation cannot be used, in words of ours: no text of it is among them."""


class _Raised(Refused):
    """The template does not take this spelling of the conversation; it may take another."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply in the rendered text, in characters.

    start: behind what the generation prompt writes. end: where the token begins that ends the turn,
    None where there is none. stop: behind that token, or behind what else closes the reply. calls:
    it calls tools.
    """

    message: int
    start: int
    stop: int
    end: int | None
    calls: bool


@dataclasses.dataclass(frozen=True)
class Conversation:
    """text: rendered. generated: the spans that the template marks as generated, if it does."""

    text: str
    replies: list[Reply]
    generated: list[tuple[int, int]]


def locate(
    messages: Sequence[dict],
    tools: Sequence[dict],
    tokenizer,
    ends: Collection[str],
    *,
    knows_thoughts: bool,
) -> Conversation:
    """Renders a conversation and finds its replies.

    ends: the tokens that end a turn, as text. knows_thoughts: the template shows the thought of a
    last reply, so that it leaves out those of earlier ones on purpose.

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
            if refused is None or isinstance(refused, _Raised):  # else that says more
                refused = error
    raise refused


def spellings(messages: Sequence[dict]) -> Iterator[list[dict]]:
    """The messages as they are; and where tools are called, as one template or another wants that:
    the arguments as objects or as text, no content as none, null or ""."""
    given = [
        _with_thought({key: value for key, value in message.items() if value is not None})
        for message in messages
    ]
    yield given
    calling = [i for i, message in enumerate(given) if message.get("tool_calls")]
    for kind, content in itertools.product((None, dict, str), ((), (None,), ("",))):
        spelled = list(given)
        for i in calling:
            spelled[i] = with_functions(given[i], lambda function: _with_arguments(function, kind))
            if content and not given[i].get("content"):
                spelled[i] = spelled[i] | {"content": content[0]}
        if spelled != given:
            yield spelled


def _with_thought(message: dict) -> dict:
    """The thought under both names that templates read, as transformers passes it on."""
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    if thought is None:
        return message
    return {"thinking": thought} | message | {"reasoning_content": thought}


def _with_arguments(function: dict, kind: type | None) -> dict:
    """The function of a call with its arguments as an object (dict) or as text (str)."""
    arguments = function.get("arguments")
    if kind is str and isinstance(arguments, dict):
        return function | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if kind is dict and isinstance(arguments, str):
        try:
            return function | {"arguments": json.loads(arguments)}
        except (ValueError, RecursionError):  # not all that models wrote is JSON
            return function
    return function


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a text stands in the rendering."""

    start: int
    stop: int
    mark: Mark


class _Rendered:
    """A rendered conversation: `text`, and the `places` of its texts in their order there."""

    def __init__(self, messages: list[dict], tools: list[dict], tokenizer, ends: Collection[str]):
        self.messages, self.tools, self.tokenizer = messages, tools, tokenizer
        self.ends = re.compile(
            "|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)"
        )
        own = GENERATION.search(str(tokenizer.chat_template)) is not None
        (whole,) = self._render((messages, tools, {"return_assistant_tokens_mask": own}))
        self.text, self.generated = whole.text, [(start, stop) for start, stop in whole.spans]
        self.places, self.marks = self._find()
        self._starts, self._prompts, self._closings = {}, {}, {}
        self._index()

    def _render(self, *jobs) -> list[Rendering]:
        rendered = render(
            self.tokenizer,
            [
                Job(messages, options | {"tools": tools or None})
                for messages, tools, options in jobs
            ],
        )
        for one in rendered:
            if isinstance(one, TemplateError):  # whose message may hold text of the row
                said = first_line(one)
                reason = said if said in str(self.tokenizer.chat_template) else one.kind
                raise _Raised(f"the chat template refuses it ({reason[:120]})")
        return rendered

    def _find(self) -> tuple[list[_Place], list[Mark]]:
        """The places of all texts that are shown, and the marks of all texts."""
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
        for mark, then in zip(marks, between[1:]):
            shown = next(
                (text for text in mark.as_shown() if self.text.startswith(text + then, at)), None
            )
            if shown is None:
                raise Refused(self._not_shown(missing or mark))
            if not mark.shown:  # gpt-oss shows the name of a tool at its answer too
                places.append(_Place(at, at + len(shown), mark))
            mark.shown, at = True, at + len(shown) + len(then)
        if at < len(self.text):
            raise Refused(self._not_shown(missing or marks[-1]))
        return places, marker.marks

    def _index(self) -> None:
        """Makes what `_before` and `_next` look up."""
        self._at = [place.start for place in self.places]
        self._own = [[] for _ in self.messages]
        last = None  # the place of tools that comes last
        for place in self.places:
            if place.mark.message < 0:
                last = place
            else:
                self._own[place.mark.message].append(place)
        self._last = [last]  # of tools and all messages before i
        for own in self._own:
            self._last.append(
                max(
                    (place for place in (self._last[-1], *own[-1:]) if place),
                    key=lambda place: place.start,
                    default=None,
                )
            )

    # ---------------------------------------------------------------- what is not shown
    def check(self, knows_thoughts: bool) -> None:
        """Puts the lost thought of the last reply back; refuses what else is not shown."""
        last = len(self.messages) - 1
        lost = [mark for mark in self.marks if not mark.shown]
        for mark in lost:
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
        if any(mark.message == last for mark in lost):
            self._restore(last)

    def _not_shown(self, mark: Mark) -> str:
        if mark.message < 0:
            return "the chat template does not show the tools of the row"
        role = self.messages[mark.message]["role"]
        what = {"content": "", "thought": "the thought of "}.get(mark.kind, "a tool call of ")
        return (
            f"the chat template does not show {what}message {mark.message}"
            + f" ({role})" * (role in ROLES)
            + " as it is" * (mark.kind == "content")
        )

    def _has_field(self, i: int) -> bool:
        return any(name in self.messages[i] for name in THOUGHTS)

    def _restore(self, i: int) -> None:
        """Puts the thought of the last reply where the model will write it: behind a generation
        prompt that opens one, as DeepSeek-R1's does."""
        own, message = self._own[i], self.messages[i]
        j, base = self._before(i)
        prompt = self._tails(i, j)[1] if i else ""
        opening = OPENS_THOUGHT.search(prompt)
        if not opening or not own or any(place.mark.kind != "content" for place in own):
            raise Refused(self._not_shown(Mark(i, "thought", "")))
        tag = opening[1]
        if self._has_field(i):
            thought = f"{message['reasoning_content'].strip()}\n{tag[0]}/{tag[1:]}\n\n"
            said = thought + message.get("content", "")
        else:
            said = message["content"].lstrip().removeprefix(tag)
        said = (said.lstrip("\n") if prompt.endswith("\n") else said).rstrip()
        start, rest = base + len(prompt), self.text[own[-1].stop :]
        self.text = self.text[:base] + prompt + said + rest
        self.places = [place for place in self.places if place.stop <= base]
        self.places.append(_Place(start, start + len(said), own[-1].mark))
        self.generated = []
        self._index()

    # ---------------------------------------------------------------- replies
    def conversation(self) -> Conversation:
        replies = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        starts = [self._start(i) for i in replies]
        behind = [*starts[1:], len(self.text)]
        return Conversation(
            self.text, list(map(self._reply, replies, starts, behind)), self.generated
        )

    def _start(self, i: int) -> int:
        own = self._own[i]
        first = bisect.bisect_left(self._at, own[0].start) if own else 0
        j, base = self._before(i)
        if self.places[first : first + len(own)] != own or (j is not None and j > i):
            raise Refused(self._mixed(i))
        return base + self._prompt(i, j, self.text[base : self._next(base)], bool(own))

    def _reply(self, i: int, start: int, behind: int) -> Reply:
        """behind: where the next reply starts."""
        calls = bool(self.messages[i].get("tool_calls"))
        j, base, after = *self._before(i), start
        if self._own[i]:
            last = self._own[i][-1]
            j, base, space = i, last.stop, last.mark.space
            after = base + len(space) * self.text.startswith(space, base)
        behind = min(behind, self._next(after))
        if not start <= after <= behind:
            raise Refused(self._mixed(i))
        if end := self.ends.search(self.text, after, behind):
            return Reply(i, start, end.end(), end.start(), calls)
        closing = self._closing(i, j, self.text[after:behind], after - base)
        return Reply(i, start, after + closing, None, calls)

    def _mixed(self, i: int) -> str:
        return f"the chat template mixes message {i} with another"

    def _before(self, i: int) -> tuple[int | None, int]:
        """The message, -1 for tools, whose text stands last before that of reply i, or before where
        that would be; and where it ends."""
        place = self._last[i]
        if self._own[i]:
            n = bisect.bisect_left(self._at, self._own[i][0].start)
            place = self.places[n - 1] if n else None
        return (place.mark.message, place.stop) if place else (None, 0)

    def _next(self, at: int) -> int:
        n = bisect.bisect_left(self._at, at)
        return self._at[n] if n < len(self._at) else len(self.text)

    def _tails(self, until: int, j: int | None) -> tuple[str, str]:
        """What stands behind the text of message j where messages[:until] are all: without and with
        a generation prompt."""
        marker = Marker(self.text)
        messages = [
            marker.message(i, message) if i == j else message
            for i, message in enumerate(self.messages[:until])
        ]
        tools = [marker.tool(tool) for tool in self.tools] if j == -1 else self.tools
        closed, opened = self._render(
            (messages, tools, {}), (messages, tools, {"add_generation_prompt": True})
        )
        return marker.behind(closed.text), marker.behind(opened.text)

    def _prompt(self, i: int, j: int | None, gap: str, has_text: bool) -> int:
        """Where reply i starts in the gap between the text of message j and its own: as much of the
        generation prompt as the gap shows belongs to the prompt (R1's opens a thought that the
        history leaves out)."""
        roles = tuple(
            (message["role"], bool(message.get("tool_calls")))
            for message in self.messages[max(j or 0, 0) : i]
        )
        key = (roles, gap, has_text)
        if key in self._starts:
            return self._starts[key]
        for prompt, rest in self._prompts.get(roles, ()) if has_text else ():
            if gap.endswith(prompt):  # what is before that belongs to message j
                return len(gap) - rest
        closed, opened = self._tails(max(i, 1), j if i else 0)
        least, shown = _shared(closed, opened), _shared(opened, gap)
        if i == 0 or shown < least:  # nothing is before it, or ends otherwise as the last
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
        """How much of the gap behind reply i closes it: what would stand there if it were the last,
        as far as the gap has it. skip: how much of what stands behind the text of message j is
        before the gap."""
        key = (gap, skip)
        if key not in self._closings:
            closed = self._tails(i + 1, j)[0][skip:].rstrip()
            if not gap.startswith(closed):  # never a part of the next turn's marker
                common, special = self._shared_tokens(closed, gap)
                closed = closed[:common] if special else re.sub(r"\S+\Z", "", closed[:common])
            self._closings[key] = len(closed.rstrip())
        return self._closings[key]

    def _shared_tokens(self, a: str, b: str) -> tuple[int, bool]:
        """The length of the prefix of whole tokens that two texts share, and whether the last of
        these is a token of its own, and no part of a word."""
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
    """The length of the prefix that two texts, or lists, share."""
    return len(os.path.commonprefix((a, b)))
