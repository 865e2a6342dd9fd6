"""What ends a turn under a tokenizer's chat template: seen once, in renderings of short talks."""

import dataclasses
import weakref
from collections.abc import Sequence

from lljax.data.conversation import spellings
from lljax.data.render import Job, TemplateError, render

ASKED, SAID, THOUGHT, FIRST, SECOND, NEXT = (f"probe{n}x" for n in range(6))
USER = {"role": "user", "content": ASKED}
REPLY = {"role": "assistant", "content": SAID}
# Who speaks after a reply, and after one that calls tools.
FOLLOWERS = {False: ("user", "system", "developer"), True: ("tool",)}
_SEEN = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Turns:
    """ends: the tokens that end a reply, by their text. last: the one for a last reply behind which
    the template writes none, by whether it calls tools. thoughts: the template shows what a last
    reply has in its field for thoughts."""

    ends: dict[str, int]
    last: dict[bool, int | None]
    thoughts: bool


def turns(tokenizer) -> Turns:
    """What ends a turn: the token that stands behind a reply whether it is the last or not
    (<|im_end|>); else the one behind the last alone (<|return|> of gpt-oss), and the marker of the
    next turn where nothing stands between (<|user|> of GLM-4.5). A token that also stands inside
    replies, between a thought and its answer or between two calls, ends none.

    Raises:
      ModelError: as `render`.
    """
    key = (str(tokenizer.chat_template), len(tokenizer))
    if _SEEN.get(tokenizer, (None,))[0] != key:
        _SEEN[tokenizer] = key, _turns(tokenizer)
    return _SEEN[tokenizer][1]


def _turns(tokenizer) -> Turns:
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    # Gemma has tokens of line breaks.
    special = {i for i in special if tokenizer.decode([i]).strip()}
    thought = _rendered(tokenizer, [USER, REPLY | {"reasoning_content": THOUGHT}], (THOUGHT, SAID))
    calls = _rendered(tokenizer, [USER, _calling(FIRST, SECOND)], (FIRST, SECOND))
    special -= {
        *_between(tokenizer, thought, THOUGHT, SAID),
        *_between(tokenizer, calls, FIRST, SECOND),
    }
    found: dict[bool, list[int]] = {False: [], True: []}
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
                found[calls] += _ends(tokenizer, last, middle, special)
    return Turns(
        {tokenizer.convert_ids_to_tokens(i): i for i in found[False] + found[True]},
        {calls: next(iter(ids), None) for calls, ids in found.items()},
        thought is not None,
    )


def _ends(tokenizer, last: list[int], middle: list[int], special: set[int]) -> list[int]:
    """What ends a reply that has the tokens `last` behind it when it is the last, and `middle` when
    another turn follows."""
    n = next(
        (n for n, (a, b) in enumerate(zip(last, middle)) if a != b), min(len(last), len(middle))
    )
    if both := [i for i in last[:n] if i in special]:
        return [tokenizer.eos_token_id] if tokenizer.eos_token_id in both else both[-1:]
    at_last = [i for i in last if i in special][-1:]
    marker = next((i for i in middle[n:] if tokenizer.decode([i]).strip()), None)
    return at_last + [marker] * (marker in special)


def _calling(*names: str) -> dict:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call0000{n}", "type": "function", "function": {"name": name, "arguments": {}}}
            for n, name in enumerate(names, 1)
        ],
    }


def _rendered(tokenizer, messages: Sequence[dict], words: Sequence[str]) -> str | None:
    """The talk rendered, if the template takes it in some spelling and shows the words in order."""
    for spelled in spellings(messages):
        (one,) = render(tokenizer, [Job(spelled)])
        if not isinstance(one, TemplateError):
            at = [one.text.find(word) for word in words]
            if -1 not in at and at == sorted(at):
                return one.text
    return None


def _between(tokenizer, text: str | None, word: str, then: str | None = None) -> list[int]:
    """The tokens behind a word, and before another."""
    if text is None:
        return []
    start, stop = text.index(word) + len(word), text.index(then) if then else len(text)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        i for i, (a, b) in zip(out["input_ids"], out["offset_mapping"]) if start <= a < b <= stop
    ]
