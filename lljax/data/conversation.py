"""Where the replies of a conversation are in what a chat template makes of it.

Templates trim contents, move systems to the front, drop earlier thoughts. So a conversation is rendered twice: as it is, and
with a mark in place of every text. What stands between the marks is the template's. The two are walked through together,
which shows that every text is there as it was, and where. The number of renderings does not grow with the number of turns.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence

from lljax.data.render import Job, TemplateError, render
from lljax.files import first_line

# What templates look for in a content, which therefore stays: <think>, [THINK], <seed:think>, <tool_response>, /no_think ...
TAG = re.compile(r"([<\[◁]/?[\w:|]{0,20}(?:think|tool)\w{0,20}[>\]▷]|/(?:no_?)?think\b|detailed thinking (?:on|off))",
                 re.IGNORECASE)
OPENS_THOUGHT = re.compile(r"([<\[◁][\w:|]{0,20}think\w{0,20}[>\]▷])\s*", re.IGNORECASE)
ENDS_THOUGHT = re.compile(r"[<\[◁]/[\w:|]{0,20}think\w{0,20}[>\]▷]", re.IGNORECASE)
THOUGHTS = ("reasoning_content", "thinking", "reasoning")        # fields that hold the thought of a reply
ROLES = ("system", "developer", "user", "assistant", "tool")     # others may be text of the row
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Refused(ValueError):
    """Why a conversation cannot be used, in words of ours: no text of it is among them."""


class _Raised(Refused):
    """The template raised."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply in the rendered text, in characters.

    start: behind what the generation prompt writes. stop: behind the token that ends the turn, which begins at `end`; without
    one (`end` is None), behind what else the template closes the reply with. calls: it calls tools.
    """

    message: int
    start: int
    stop: int
    end: int | None
    calls: bool


@dataclasses.dataclass(frozen=True)
class Conversation:
    """text: rendered. generated: the spans that the template itself marks as generated, if it marks any."""

    text: str
    replies: list[Reply]
    generated: list[tuple[int, int]]


def locate(messages: Sequence[dict], tools: Sequence[dict], tokenizer, ends: Collection[str], *,
           knows_thoughts: bool) -> Conversation:
    """Renders a conversation and finds its replies.

    ends: the tokens that end a turn, as text. knows_thoughts: the template shows the thought of a last reply, so that
    those of earlier ones are left out on purpose.

    Raises:
      Refused: the template raises, or does not show a text of the conversation as it is.
      ModelError: as `render`.
    """
    refused = None
    for spelled in spellings(messages):
        try:
            return _Rendered(spelled, list(tools), tokenizer, ends).conversation(knows_thoughts)
        except Refused as error:
            if refused is None or isinstance(refused, _Raised):      # a spelling that the template takes says more
                refused = error
    raise refused


def spellings(messages: Sequence[dict]) -> Iterator[list[dict]]:
    """The messages as they are; and where tools are called, as one template or another wants that: the arguments as objects or
    as text, no content as none, null or ""."""
    given = [_with_thoughts({key: value for key, value in message.items() if value is not None}) for message in messages]
    yield given
    if not any(message.get("tool_calls") for message in given):
        return
    bare = [i for i, message in enumerate(given) if message.get("tool_calls") and not message.get("content")]
    for kind, content in itertools.product((None, dict, str), ((), (None,), ("",))):
        spelled = [_with_functions(message, lambda function: _with_arguments(function, kind)) for message in given]
        for i in bare if content else ():
            spelled[i] = spelled[i] | {"content": content[0]}
        if spelled != given:
            yield spelled


def _with_thoughts(message: dict) -> dict:
    """The thought under both names that templates read, as transformers passes it on."""
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}


def _with_arguments(function: dict, kind: type | None) -> dict:
    """The function of a call with its arguments as an object (dict) or as text (str)."""
    arguments = function.get("arguments")
    try:
        if kind is dict and isinstance(arguments, str):
            return function | {"arguments": json.loads(arguments)}
    except ValueError:                       # not every model wrote JSON
        return function
    return function | {"arguments": json.dumps(arguments, ensure_ascii=False)} if kind is str and isinstance(arguments, dict) \
        else function


def _with_functions(message: dict, change) -> dict:
    """The message with `change` made to the function of every call: {"function": {...}}, or the function itself."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Refused("tool_calls is not a list of calls")
    return message | {"tool_calls": [call | {"function": change(call["function"])} if isinstance(call.get("function"), dict)
                                     else change(call) for call in calls]}


@dataclasses.dataclass(eq=False)
class _Mark:
    """One hidden text. message: -1 for tools. kind: content, thought, call, arguments (of a call, as text)
    or tool. space: white space behind it."""

    message: int
    kind: str
    text: str
    space: str = ""
    shown: bool = False


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a hidden text stands in the rendering."""

    start: int
    stop: int
    mark: _Mark


class _Marker:
    """Puts marks, which hold no character that templates trim or escape, in place of texts. White space around a text and
    the tags in it stay."""

    def __init__(self, text: str):
        self.stem = next(stem for stem in (f"Mq{k}x" for k in itertools.count()) if stem not in text)
        self.marks: list[_Mark] = []

    def hide(self, message: int, kind: str, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, space = text.partition(core)
        self.marks.append(_Mark(message, kind, core, space))
        return f"{before}{self.stem}{len(self.marks) - 1}z{space}"

    def split(self, rendering: str) -> tuple[list[str], list[_Mark]]:
        """What stands between the marks, and the marks."""
        parts = re.split(self.stem + r"(\d+)z", rendering)
        return parts[::2], [self.marks[int(number)] for number in parts[1::2]]

    def behind(self, rendering: str) -> str:
        """What stands behind all marks; one that has been seen before is its text again."""
        between, marks = self.split(rendering)
        first = {mark: n for n, mark in reversed(list(enumerate(marks)))}
        last = max(first.values(), default=-1)
        return between[last + 1] + "".join(mark.text + then for mark, then in zip(marks[last + 1:], between[last + 2:]))

    def message(self, i: int, message: dict) -> dict:
        hidden = dict(message)
        thoughts = [name for name in THOUGHTS if isinstance(message.get(name), str)]
        if thoughts:
            hidden |= dict.fromkeys(thoughts, self.hide(i, "thought", message[thoughts[0]]))
        if isinstance(message.get("content"), str):
            parts = TAG.split(message["content"])
            thought = 0                      # how many parts belong to the thought
            if message["role"] == "assistant":
                thought = max((n for n, part in enumerate(parts) if n % 2 and ENDS_THOUGHT.fullmatch(part)), default=0)
            hidden["content"] = "".join(part if n % 2 else self.hide(i, "thought" if n < thought else "content", part)
                                        for n, part in enumerate(parts))
        return _with_functions(hidden, lambda function: self._call(i, function))

    def _call(self, i: int, function: dict) -> dict:
        name, arguments = function.get("name"), function.get("arguments")
        hidden = {"name": self.hide(i, "call", name)} if isinstance(name, str) else {}
        if isinstance(arguments, str):
            hidden |= {"arguments": self.hide(i, "arguments", arguments)}
        elif arguments is not None:
            hidden |= {"arguments": self._leaves(i, arguments)}
        return function | hidden

    def _leaves(self, i: int, value):
        if isinstance(value, dict):
            return {key: self._leaves(i, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(i, item) for item in value]
        return self.hide(i, "call", value) if isinstance(value, str) else value

    def tool(self, tool: dict) -> dict:
        inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        if not isinstance(inner.get("name"), str):
            return tool
        named = inner | {"name": self.hide(-1, "tool", inner["name"])}
        return tool | {"function": named} if inner is not tool else named


def _as_shown(text: str) -> Iterator[str]:
    """A text as templates write it: as it is, or as JSON, once or twice."""
    yield text
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    yield once
    yield json.dumps(text)[1:-1]
    yield json.dumps(once, ensure_ascii=False)[1:-1]


class _Rendered:
    """A rendered conversation: `text`, and `places` of its texts in the order in which they stand there."""

    def __init__(self, messages: list[dict], tools: list[dict], tokenizer, ends: Collection[str]):
        self.messages, self.tools, self.tokenizer = messages, tools, tokenizer
        self.ends = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)")
        marks_own = GENERATION.search(str(tokenizer.chat_template)) is not None
        (whole,) = self._render(({"return_assistant_tokens_mask": marks_own}, messages, tools))
        self.text, self.generated = whole.text, [(start, stop) for start, stop in whole.spans]
        self.places, self.marks = self._find()
        if any(place.mark.kind == "arguments" and self.text[place.start - 1] == '"' for place in self.places):
            raise _Raised("the chat template shows arguments of tool calls, which are text, as JSON in JSON")
        self._starts, self._closings = {}, {}

    def _render(self, *jobs) -> list:
        rendered = render(self.tokenizer, [Job(messages, options | {"tools": tools or None})
                                           for options, messages, tools in jobs])
        for one in rendered:
            if isinstance(one, TemplateError):       # templates put the content into it, through Jinja
                said = first_line(one)
                reason = said if said in str(self.tokenizer.chat_template) else one.kind
                raise _Raised(f"the chat template refuses it ({reason[:120]})")
        return rendered

    def _find(self) -> tuple[list[_Place], list[_Mark]]:
        """The places of all texts, and their marks, of which some may not be shown."""
        marker, places = _Marker(self.text), []
        hidden = [marker.message(i, message) for i, message in enumerate(self.messages)]
        (rendering,) = self._render(({}, hidden, [marker.tool(tool) for tool in self.tools]))
        between, marks = marker.split(rendering.text)
        seen = set(marks)
        changed = next((mark for mark in marker.marks if mark not in seen and mark.kind != "thought"), None)
        at = len(between[0])
        if not self.text.startswith(between[0]):
            raise Refused(self._not_shown(changed or marks[0] if marks else _Mark(0, "content", "")))
        for mark, then in zip(marks, between[1:]):
            shown = next((text for text in _as_shown(mark.text) if self.text.startswith(text + then, at)), None)
            if shown is None:
                raise Refused(self._not_shown(changed or mark))
            if not mark.shown:               # gpt-oss shows the name of a tool again where it answers
                places.append(_Place(at, at + len(shown), mark))
            mark.shown, at = True, at + len(shown) + len(then)
        if at < len(self.text):
            raise Refused(self._not_shown(changed or marks[-1]))
        return places, marker.marks

    def _not_shown(self, mark: _Mark) -> str:
        if mark.message < 0:
            return "the chat template does not show the tools of the row"
        role = self.messages[mark.message]["role"]
        what = {"content": "", "thought": "the thought of "}.get(mark.kind, "a tool call of ")
        return (f"the chat template does not show {what}message {mark.message}" + f" ({role})" * (role in ROLES)
                + " as it is" * (mark.kind == "content"))

    def conversation(self, knows_thoughts: bool) -> Conversation:
        for mark in self.marks:
            dropped = mark.kind == "thought" and (knows_thoughts or not self._has_field(mark.message)
                                                  or mark.message == self._last_thought)
            if not mark.shown and not dropped:
                raise Refused(self._not_shown(mark))
        self._index()
        if self._last_thought is not None:
            self._restore(self._last_thought)
        indices = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        starts = [self._start(i) for i in indices]
        replies = [self._reply(i, start, then) for i, start, then in zip(indices, starts, [*starts[1:], len(self.text)])]
        return Conversation(self.text, replies, self.generated)

    # ---------------------------------------------------------------- thoughts
    def _has_field(self, i: int) -> bool:
        return any(name in self.messages[i] for name in THOUGHTS)

    @functools.cached_property
    def _last_thought(self) -> int | None:
        """The index of the last message where its thought is not shown."""
        i = len(self.messages) - 1
        lost = any(mark.message == i and mark.kind == "thought" and not mark.shown for mark in self.marks)
        return i if lost else None

    def _restore(self, i: int) -> None:
        """Puts the lost thought of the last reply where the model will write it: behind a generation prompt that opens one,
        as DeepSeek-R1's does."""
        own = self._own[i]
        j, base = self._before(own[0].start if own else None, i)
        opened = self._tails(i, j)[1] if i else ""
        opening = list(OPENS_THOUGHT.finditer(opened))
        if not own or any(place.mark.kind != "content" for place in own) or not opening or opening[-1].end() != len(opened):
            raise Refused(self._not_shown(_Mark(i, "thought", "")))
        tag, message = opening[-1][1], self.messages[i]
        if self._has_field(i):
            said = f"{message['reasoning_content'].strip()}\n{tag[0]}/{tag[1:]}\n\n{message.get('content', '')}"
        else:
            said = message["content"].lstrip().removeprefix(tag)
        said = (said.lstrip("\n") if opened.endswith("\n") else said).rstrip()
        rest = self.text[own[-1].stop:]
        self.text = self.text[:base] + opened + said
        start = base + len(opened)
        self.places = [place for place in self.places if place.stop <= base]
        self.places.append(_Place(start, len(self.text), own[-1].mark))
        self.text, self.generated = self.text + rest, []
        self._index()

    # ---------------------------------------------------------------- replies
    def _index(self) -> None:
        """Makes what `_before` and `_next` look up."""
        self.places.sort(key=lambda place: place.start)
        self._at = [place.start for place in self.places]
        self._own = [[] for _ in self.messages]
        for place in self.places:
            if place.mark.message >= 0:
                self._own[place.mark.message].append(place)
        self._last = [next((place for place in reversed(self.places) if place.mark.message < 0), None)]
        for own in self._own:                # of all messages before i, and the tools, the place that comes last
            self._last.append(max((place for place in (self._last[-1], *own[-1:]) if place),
                                  key=lambda place: place.start, default=None))

    def _start(self, i: int) -> int:
        own = self._own[i]
        first = bisect.bisect_left(self._at, own[0].start) if own else 0
        j, base = self._before(own[0].start if own else None, i)
        if self.places[first:first + len(own)] != own or (j is not None and j > i):
            raise Refused(f"the chat template mixes message {i} with another")
        return base + self._prompt(i, j, self.text[base:self._next(base)], bool(own))

    def _reply(self, i: int, start: int, behind: int) -> Reply:
        """behind: where the next reply starts."""
        calls = bool(self.messages[i].get("tool_calls"))
        last, after = (self._own[i] or [None])[-1], start
        if last:
            after = last.stop + len(last.mark.space) * self.text.startswith(last.mark.space, last.stop)
        behind = min(behind, self._next(after))
        if not start <= after <= behind:
            raise Refused(f"the chat template mixes message {i} with another")
        if end := self.ends.search(self.text, after, behind):
            return Reply(i, start, end.end(), end.start(), calls)
        j, base = (i, last.stop) if last else self._before(None, i)
        return Reply(i, start, after + self._closing(i, j, self.text[after:behind], after - base), None, calls)

    def _before(self, at: int | None, i: int) -> tuple[int | None, int]:
        """The message whose text stands last before `at`, or before message i, which shows no text; and where that ends."""
        if at is None:
            place = self._last[i]
        else:
            n = bisect.bisect_left(self._at, at)
            place = self.places[n - 1] if n else None
        return (place.mark.message, place.stop) if place else (None, 0)

    def _next(self, at: int) -> int:
        n = bisect.bisect_left(self._at, at)
        return self._at[n] if n < len(self._at) else len(self.text)

    def _tails(self, until: int, shown: int | None) -> tuple[str, str]:
        """What stands behind the text of message `shown` where messages[:until] are all: without and with a generation
        prompt."""
        marker = _Marker(self.text)
        messages = [marker.message(i, message) if i == shown else message for i, message in enumerate(self.messages[:until])]
        tools = [marker.tool(tool) for tool in self.tools] if shown == -1 else self.tools
        rendered = self._render(({}, messages, tools), ({"add_generation_prompt": True}, messages, tools))
        closed, opened = (marker.behind(one.text) for one in rendered)
        return closed, opened

    def _prompt(self, i: int, j: int | None, gap: str, has_text: bool) -> int:
        """Where in the gap before its text, which follows that of message j, reply i starts: as much of the generation prompt
        as the gap shows belongs to the prompt (R1's opens a thought that the history leaves out)."""
        key = (tuple((message["role"], bool(message.get("tool_calls"))) for message in self.messages[max(j or 0, 0):i]),
               gap, has_text)
        if key not in self._starts:
            closed, opened = self._tails(max(i, 1), j if i else 0)
            least, shown = _shared(closed, opened), _shared(opened, gap)
            if i == 0 or shown < least:      # nothing is before it, or that ends otherwise when it is the last
                prompt = opened[least:]
                at = gap.find(prompt) if prompt else -1
                if at < 0 and i:
                    raise Refused(f"the chat template mixes message {i} with another")
                least = shown = at + len(prompt) if at >= 0 else len(gap) * has_text
            elif shown < len(opened):        # "<think>" and "<tool_call>" share characters, but no token
                shown = max(least, self._shared_tokens(opened, gap)[0])
            end = None if has_text else self.ends.search(gap, least)
            self._starts[key] = min(shown, end.start()) if end else shown
        return self._starts[key]

    def _closing(self, i: int, j: int | None, gap: str, skip: int) -> int:
        """How much of the gap behind reply i closes it: what would stand there if it were the last, as far as the gap has it.
        skip: how much of what stands behind the text of message j is before the gap."""
        key = (gap, skip)
        if key not in self._closings:
            closed = self._tails(i + 1, j)[0][skip:].rstrip()
            if not gap.startswith(closed):
                common, special = self._shared_tokens(closed, gap)           # never a part of the next turn's marker
                closed = closed[:common] if special else re.sub(r"\S+\Z", "", closed[:common])
            self._closings[key] = len(closed.rstrip())
        return self._closings[key]

    def _shared_tokens(self, a: str, b: str) -> tuple[int, bool]:
        """The length of the prefix of whole tokens that two texts share, and whether the last of these is no word."""
        first, other = (self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                        for text in (a, b))
        n = _shared(first["input_ids"], other["input_ids"])
        return ((first["offset_mapping"][n - 1][1], first["input_ids"][n - 1] in self.tokenizer.added_tokens_decoder)
                if n else (0, True))


def _shared(a: Sequence, b: Sequence) -> int:
    """The length of the prefix that two texts, or lists, share."""
    return len(os.path.commonprefix((a, b)))
