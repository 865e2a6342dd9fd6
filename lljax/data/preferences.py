"""Parses rows of preferences: a prompt with a chosen and a rejected answer, or with an answer that
is judged good or bad. The forms are those of TRL, ms-swift and LLaMA-Factory.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lljax.data.formats import (
    SYSTEM,
    TURNS,
    Document,
    Form,
    asked,
    by_form,
    checked,
    conversation,
    instruction_of,
    is_filled,
    messages_of,
    system_of,
    text_of,
    tools_of,
)
from lljax.data.messages import normalized

CHOSEN, REJECTED, MISMATCHED = 1, 2, 3
ROLES = {CHOSEN: "chosen", REJECTED: "rejected", MISMATCHED: "mismatched"}


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt with one or more answers, each as the document of the prompt and this answer.

    answers: (role, document), the role being CHOSEN (or desirable) or REJECTED (or undesirable); in
      ascending order of the roles.
    """

    where: str  # "file:line"
    answers: tuple[tuple[int, Document], ...]
    unread: tuple[str, ...] = ()  # keys of the row that no reader knows

    @property
    def messages(self) -> tuple[dict, ...]:
        """The messages of the first answer's document; empty if it is plain text."""
        return self.answers[0][1].messages

    def texts(self) -> list[str]:
        return [text for _, document in self.answers for text in document.texts()]

    def content(self) -> str:
        """The content in a canonical form: equal groups have equal content."""
        content = [[role, document.content()] for role, document in self.answers]
        return json.dumps(content, ensure_ascii=False)


Answer = str | dict | list  # a text, a message, or messages
Prompt = str | list  # a text, or messages


def pairs(row: Any, where: str) -> Group:
    """The pair of a decoded row. Raises ValueError with the reason if it is none."""
    row = checked(row)
    for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if is_filled(row.get(key)) and row.get(other) is None:
            raise ValueError(f"{key!r} without {other!r}: a pair needs both")
    for key in LABELS:
        if row.get(key) is not None and row.keys().isdisjoint(PAIR_KEYS):
            raise ValueError(
                f"{key!r}: a judged answer, which objective.name='kto' trains; a pair needs "
                "chosen and rejected"
            )
    return by_form(row, where, PAIRS, f"a pair has {PAIR_ADVICE}")


def judged(row: Any, where: str) -> Group:
    """The judged answers of a decoded row. Raises ValueError with the reason if it has none."""
    advice = (
        "a judged answer has prompt and completion, messages, query and response, or instruction "
        f"and output, each with label; or it is a pair: {PAIR_ADVICE}"
    )
    row = checked(row)
    if row.keys().isdisjoint(PAIR_KEYS) and all(row.get(key) is None for key in LABELS):
        raise ValueError(f"{' or '.join(map(repr, LABELS))} is missing or null; {advice}")
    return by_form(row, where, JUDGED, advice)


# ---------------------------------------------------------------- groups
def _group(
    row: dict, where: str, prompt: Prompt, answers: Iterable[tuple[int, str, Answer]]
) -> Group:
    """answers: the role, the key and the value of each."""
    documents = tuple(
        (role, _document(row, where, prompt, key, answer)) for role, key, answer in answers
    )
    if len({document.content() for _, document in documents}) < len(documents):
        raise ValueError("the chosen and the rejected answer are the same")
    unread = {key for _, document in documents for key in document.unread}
    return Group(where, documents, tuple(sorted(unread)))


def _document(row: dict, where: str, prompt: Prompt, key: str, answer: Answer) -> Document:
    """The document of a prompt and an answer: messages, unless both are texts."""
    if not isinstance(answer, str | dict | list):
        raise ValueError(f"{key!r} is a {type(answer).__name__}, neither a text nor messages")
    if isinstance(answer, list) and not answer or isinstance(answer, str) and not answer.strip():
        raise ValueError(f"{key!r} is empty")
    as_chat = system_of(row) or tools_of(row)  # only conversations have them
    if isinstance(prompt, str) and isinstance(answer, str) and not as_chat:
        return Document(where, prompt=prompt, text=answer)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("'prompt' is empty")
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    before, after = normalized(prompt, 0), answer if isinstance(answer, list) else [answer]
    after = normalized(after, len(before))
    if before and before[-1]["role"] == after[0]["role"] == "assistant":
        raise ValueError(f"the prompt ends with a reply, which {key!r} would follow")
    return conversation(row, where, after, before)


def _common(a: Sequence, b: Sequence) -> int:
    """The length of the common prefix of two texts or lists."""
    same = (x == y for x, y in zip(a, b, strict=False))
    return next((n for n, equal in enumerate(same) if not equal), min(len(a), len(b)))


def _implicit(chosen: Answer, rejected: Answer) -> tuple[Prompt, Answer, Answer]:
    """The prompt that two whole conversations or texts begin with, and the two answers.

    Texts are cut as TRL's `extract_prompt` does: a space before the first difference belongs to
    the answers.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = normalized(chosen, 0), normalized(rejected, 0)
    elif not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(
            "without 'prompt', chosen and rejected are both texts or both lists of messages, which "
            "begin with the prompt"
        )
    if chosen == rejected:
        raise ValueError("the chosen and the rejected answer are the same")
    n = _common(chosen, rejected)
    if n == min(len(chosen), len(rejected)):
        raise ValueError(
            "one of chosen and rejected begins with the whole other: give the prompt in 'prompt'"
        )
    if isinstance(chosen, str) and n and chosen[n - 1] == " ":
        n -= 1
    if n == 0:
        raise ValueError(
            "chosen and rejected do not begin with the same prompt: give it in 'prompt'"
        )
    return chosen[:n], chosen[n:], rejected[n:]


# ---------------------------------------------------------------- pairs
Pair = tuple[Prompt, Answer, Answer]
QUERIES = ("query", "question")


def _rejected_messages(row: dict) -> Pair:
    chosen, rejected = (messages_of(row, key) for key in ("messages", "rejected_messages"))
    return _implicit(chosen, rejected)


def _rejected_response(row: dict) -> Pair:
    turns = normalized(messages_of(row, "messages"), 0)
    if turns[-1]["role"] != "assistant":
        raise ValueError("the last message is no reply, which 'rejected_response' would replace")
    return turns[:-1], turns[-1], row["rejected_response"]


def _prompted(row: dict) -> Pair:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if not isinstance(prompt, str | list):
        raise ValueError(f"'prompt' is a {type(prompt).__name__}, neither a text nor messages")
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        return prompt, chosen, rejected
    chosen, rejected = normalized(chosen, 0), normalized(rejected, 0)
    if isinstance(prompt, list):
        turns = normalized(prompt, 0)
        n = len(turns)
        repeated = chosen[:n] == rejected[:n] == turns
        return (turns, chosen[n:], rejected[n:]) if repeated else (turns, chosen, rejected)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return prompt, chosen, rejected
    # As in UltraFeedback: the prompt is also among the messages.
    pair = _implicit(chosen, rejected)
    if all(turn.get("content") != prompt for turn in chosen[: len(pair[0])]):
        raise ValueError("'prompt' is none of the messages that chosen and rejected begin with")
    return pair


def _after(prompt: Callable[[dict], Prompt]) -> Callable[[dict], Pair]:
    return lambda row: (prompt(row), row["chosen"], row["rejected"])


def _turns(key: str) -> Callable[[dict], list]:
    return lambda row: messages_of(row, key)


def _query(key: str) -> Callable[[dict], list]:
    return lambda row: asked(row, text_of(row, key))


def _instruction(row: dict) -> list:
    return asked(row, instruction_of(row))


def _pair(split: Callable[[dict], Pair]) -> Callable[[dict, str], Group]:
    def build(row: dict, where: str) -> Group:
        prompt, chosen, rejected = split(row)
        answers = ((CHOSEN, "chosen", chosen), (REJECTED, "rejected", rejected))
        return _group(row, where, prompt, answers)

    return build


OF_ROW = (*SYSTEM, "tools")
BOTH = ("chosen", "rejected")
PAIR_KEYS = (*BOTH, "rejected_response", "rejected_messages")
PAIR_ADVICE = (
    "chosen and rejected, with prompt, messages, conversations, query, question or instruction; "
    "or messages with rejected_response or rejected_messages"
)
PAIRS = (  # the first form whose keys a row has
    Form(("messages", "rejected_messages"), OF_ROW, _pair(_rejected_messages)),
    Form(("messages", "rejected_response"), OF_ROW, _pair(_rejected_response)),
    Form(
        ("query", "response", "rejected_response"),
        ("history", *OF_ROW),
        _pair(lambda row: (_query("query")(row), row["response"], row["rejected_response"])),
    ),
    Form(("prompt", *BOTH), OF_ROW, _pair(_prompted)),
    *(Form((key, *BOTH), OF_ROW, _pair(_after(_turns(key)))) for key in TURNS),
    *(Form((key, *BOTH), ("history", *OF_ROW), _pair(_after(_query(key)))) for key in QUERIES),
    Form(("instruction", *BOTH), ("input", "history", *OF_ROW), _pair(_after(_instruction))),
    Form(BOTH, OF_ROW, _pair(lambda row: _implicit(row["chosen"], row["rejected"]))),
)


# ---------------------------------------------------------------- judged answers
LABELS = ("label", "kto_tag")
Single = tuple[Prompt, str, Answer]  # the prompt, the key of the answer, the answer


def _completion(row: dict) -> Single:
    prompt = row["prompt"]
    if not isinstance(prompt, str | list):
        raise ValueError(f"'prompt' is a {type(prompt).__name__}, neither a text nor messages")
    return prompt, "completion", row["completion"]


def _last_round(key: str) -> Callable[[dict], Single]:
    """Messages of which the answer is what follows the last message of the user."""

    def split(row: dict) -> Single:
        turns = normalized(messages_of(row, key), 0)
        asking = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
        n = asking[-1] + 1 if asking else 0
        if n == len(turns):
            raise ValueError("no reply follows the last message of the user")
        return turns[:n], key, turns[n:]

    return split


def _label(label: str, split: Callable[[dict], Single]) -> Callable[[dict, str], Group]:
    def build(row: dict, where: str) -> Group:
        if not isinstance(row[label], int) or row[label] not in (0, 1):
            raise ValueError(f"{label!r} is neither true nor false")
        prompt, key, answer = split(row)
        return _group(row, where, prompt, [(CHOSEN if row[label] else REJECTED, key, answer)])

    return build


def _labelled(label: str) -> Iterator[Form]:
    yield Form(("prompt", "completion", label), OF_ROW, _label(label, _completion))
    for key in TURNS:
        yield Form((key, label), OF_ROW, _label(label, _last_round(key)))
    yield Form(
        ("query", "response", label),
        ("history", *OF_ROW),
        _label(label, lambda row: (_query("query")(row), "response", row["response"])),
    )
    yield Form(
        ("instruction", "output", label),
        ("input", "history", *OF_ROW),
        _label(label, lambda row: (_instruction(row), "output", row["output"])),
    )


JUDGED = (*PAIRS, *(form for label in LABELS for form in _labelled(label)))
