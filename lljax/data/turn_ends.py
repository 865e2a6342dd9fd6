"""The end-of-turn tokens of a chat template, found once by rendering short conversations."""

import dataclasses
import os
import weakref
from collections.abc import Sequence
from typing import Any

from lljax.data.render import Job, TemplateError, render
from lljax.data.spellings import spellings

ASKED, SAID, THOUGHT, FIRST, SECOND, NEXT = (f"probe{n}x" for n in range(6))
USER = {"role": "user", "content": ASKED}
REPLY = {"role": "assistant", "content": SAID}
# The roles after a reply, by whether it calls tools.
FOLLOWERS = {False: ("user", "system", "developer"), True: ("tool",)}
_SEEN = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Turns:
    """ends: the end-of-turn tokens, {text: id}. last: the token to add after a last reply that the
    template does not end, by whether the reply calls tools. thoughts: the template shows the
    thought of a last reply.
    """

    ends: dict[str, int]
    last: dict[bool, int | None]
    thoughts: bool


def turns(tokenizer: Any) -> Turns:
    """The end-of-turn tokens of the tokenizer's chat template.

    A token after every reply, last or not, ends a turn (<|im_end|>). Without one, the token after
    the last reply does (gpt-oss's <|return|>), and the marker of the next turn if it directly
    follows a reply (GLM-4.5's <|user|>). Tokens that also appear inside replies, between a thought
    and its answer or between two calls, do not.

    Raises:
      ModelError: as `render`.
    """
    key = (str(tokenizer.chat_template), len(tokenizer))
    if _SEEN.get(tokenizer, (None,))[0] != key:
        _SEEN[tokenizer] = key, _turns(tokenizer)
    return _SEEN[tokenizer][1]


def _turns(tokenizer: Any) -> Turns:
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    # Gemma has tokens that are line breaks.
    special = {i for i in special if tokenizer.decode([i]).strip()}
    thought = _rendered(tokenizer, [USER, REPLY | {"reasoning_content": THOUGHT}], (THOUGHT, SAID))
    calls = _rendered(tokenizer, [USER, _calling(FIRST, SECOND)], (FIRST, SECOND))
    special -= {
        *_between(tokenizer, thought, THOUGHT, SAID),
        *_between(tokenizer, calls, FIRST, SECOND),
    }
    ids: dict[bool, list[int]] = {False: [], True: []}
    for reply, word in ((REPLY, SAID), (_calling(FIRST), FIRST), (_calling(FIRST, SECOND), SECOND)):
        calls = "tool_calls" in reply
        last = _between(tokenizer, _rendered(tokenizer, [USER, reply], (word,)), word)
        for role in FOLLOWERS[calls]:
            follower = {"role": role, "content": NEXT}
            if calls:
                follower |= {"name": FIRST, "tool_call_id": "call00001"}
            then = _rendered(tokenizer, [USER, reply, follower], (word, NEXT))
            if then is not None:
                middle = _between(tokenizer, then, word, NEXT)
                ids[calls] += _ends(tokenizer, last, middle, special)
    return Turns(
        ends={tokenizer.convert_ids_to_tokens(i): i for i in ids[False] + ids[True]},
        last={calls: next(iter(some), None) for calls, some in ids.items()},
        thoughts=thought is not None,
    )


def _ends(tokenizer: Any, last: list[int], middle: list[int], special: set[int]) -> list[int]:
    """The tokens that end a reply, from the tokens after it if it is the `last` turn, and if
    another turn follows (`middle`).
    """
    n = len(os.path.commonprefix((tuple(last), tuple(middle))))
    if both := [i for i in last[:n] if i in special]:
        return [tokenizer.eos_token_id] if tokenizer.eos_token_id in both else both[-1:]
    after_last: list[int] = [i for i in last if i in special][-1:]
    marker = next((i for i in middle[n:] if tokenizer.decode([i]).strip()), None)
    return after_last + ([marker] if marker is not None and marker in special else [])


def _calling(*names: str) -> dict:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call0000{n}", "type": "function", "function": {"name": name, "arguments": {}}}
            for n, name in enumerate(names, 1)
        ],
    }


def _rendered(tokenizer: Any, messages: Sequence[dict], words: Sequence[str]) -> str | None:
    """The rendering of the first spelling that the template takes with all `words` in order."""
    for spelled in spellings(messages):
        (rendering,) = render(tokenizer, [Job(spelled)])
        if not isinstance(rendering, TemplateError):
            places = [rendering.text.find(word) for word in words]
            if -1 not in places and places == sorted(places):
                return rendering.text
    return None


def _between(tokenizer: Any, text: str | None, word: str, then: str | None = None) -> list[int]:
    """The tokens after `word`, and before the word `then`."""
    if text is None:
        return []
    start, stop = text.index(word) + len(word), text.index(then) if then else len(text)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(out["input_ids"], out["offset_mapping"], strict=True)
    return [i for i, (a, b) in pairs if start <= a < b <= stop]
