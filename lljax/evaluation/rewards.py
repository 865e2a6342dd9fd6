"""Built-in reward functions of policy objectives, with the signature of TRL's: f(prompts,
completions, completion_ids, **columns) -> a float, or None for "no reward", for every completion.

A completion is a text or a list of messages. columns: those of the training rows, a list with an
entry for every completion. Options are the keyword-only parameters.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lljax.errors import short
from lljax.evaluation.metrics import matches_all, qa_f1
from lljax.evaluation.rouge import rouge_l

THOUGHT = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
EDGE = string.punctuation.replace("-", "").replace("%", "")  # "-5" and "5%" are not "5"
ANSWERS = ("answers", "answer", "solution")  # columns with the correct answers

Completion = str | Sequence[Mapping[str, Any]]
Rewards = list[float | None]


def text_of(completion: Completion) -> str:
    """The text of a completion: a string, or the content of its assistant messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(
        _content(message.get("content"))
        for message in completion
        if message.get("role", "assistant") == "assistant"
    )


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())


def answer_of(completion: Completion) -> str:
    """The text after the last </think>; "" if the reasoning begins and does not end."""
    reasoning, end, answer = text_of(completion).rpartition("</think>")
    if end:
        return answer.strip()
    return "" if answer.lstrip().startswith("<think>") else answer.strip()


def _best(
    grade: Callable[[str, Sequence[str]], float], completions: Sequence[Completion], columns: dict
) -> Rewards:
    """The grade of every answer against its row's correct ones; None for a row without any."""
    rewards: Rewards = []
    for i, completion in enumerate(completions):
        correct = _correct(columns, i)
        rewards.append(grade(answer_of(completion), correct) if correct else None)
    return rewards


def _correct(columns: dict[str, Sequence[Any]], row: int) -> list[str]:
    """The correct answers of a row, from the first of ANSWERS that it has. Numbers are texts."""
    values = (columns[name][row] for name in ANSWERS if name in columns)
    value = next((value for value in values if value is not None), ())
    texts = [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return [text for text in texts if text.strip()]


def comparable(text: str) -> str:
    """Lower case, single spaces, without punctuation around it and without a leading article."""
    text = " ".join(text.lower().split()).strip(EDGE + " ")
    return re.sub(r"^(a|an|the) ", "", text)


def exact(prompts, completions, completion_ids, **columns) -> Rewards:
    """1 if the answer equals a correct one after `comparable`, otherwise 0."""

    def grade(answer: str, correct: Sequence[str]) -> float:
        return float(comparable(answer) in map(comparable, correct))

    return _best(grade, completions, columns)


def contains(prompts, completions, completion_ids, **columns) -> Rewards:
    """The share of the correct answers that the answer contains, ignoring case: RULER's score."""
    return _best(matches_all, completions, columns)


def f1(prompts, completions, completion_ids, **columns) -> Rewards:
    """LongBench's F1 of words with the closest correct answer."""
    return _best(
        lambda answer, correct: max(qa_f1(answer, one) for one in correct), completions, columns
    )


def rouge(prompts, completions, completion_ids, **columns) -> Rewards:
    """LongBench's ROUGE-L with the closest correct answer."""
    return _best(
        lambda answer, correct: max(rouge_l(answer, one) for one in correct), completions, columns
    )


def regex(prompts, completions, completion_ids, *, full: bool = False, **columns) -> Rewards:
    """1 if the regular expression in the column `pattern` is found in the completion, reasoning
    included, otherwise 0; None for a row without a pattern.

    full: it must match the whole completion, apart from space around it.
    """
    rewards: Rewards = []
    for completion, pattern in zip(completions, columns["pattern"], strict=True):
        if pattern is None:
            rewards.append(None)
            continue
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"column pattern: {short(pattern)} is no regular expression ({error})"
            ) from None
        text = text_of(completion)
        match = compiled.fullmatch(text.strip()) if full else compiled.search(text)
        rewards.append(float(match is not None))
    return rewards


def format(prompts, completions, completion_ids, **columns) -> Rewards:
    """1 for <think>...</think> and then an answer, otherwise 0: TRL's think_format_reward."""
    return [float(THOUGHT.match(text_of(completion)) is not None) for completion in completions]


def overlong(
    prompts, completions, completion_ids, *, max_tokens: int, cache: int, **columns
) -> Rewards:
    """0 up to max_tokens - cache tokens, then linearly down to -1 at max_tokens.

    DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13; TRL's get_soft_overlong_punishment.
    """
    if not 0 <= cache <= max_tokens:
        raise ValueError(
            f"options cache={cache} and max_tokens={max_tokens}: 0 <= cache <= max_tokens"
        )
    free = max_tokens - cache
    rewards: Rewards = []
    for ids in completion_ids:
        if len(ids) <= free:
            rewards.append(0.0)
        else:
            rewards.append((free - len(ids)) / cache if len(ids) <= max_tokens else -1.0)
    return rewards


def repetition(
    prompts,
    completions,
    completion_ids,
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    **columns,
) -> Rewards:
    """max_penalty times the share of n-grams of tokens that repeat an earlier one.

    Yeo et al. 2025, arXiv 2502.03373, appendix C.2; TRL's get_repetition_penalty_reward.
    """
    if ngram_size < 1:
        raise ValueError(f"option ngram_size={ngram_size} is not above 0")
    if max_penalty > 0:
        raise ValueError(f"option max_penalty={max_penalty} is above 0, so it is no penalty")
    rewards: Rewards = []
    for ids in completion_ids:
        grams = list(zip(*(ids[i:] for i in range(ngram_size)), strict=False))
        repeated = len(grams) - len(set(grams))
        rewards.append(max_penalty * repeated / len(grams) if repeated else 0.0)
    return rewards


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """A reward function; if `columns` is not empty, it needs one of them."""

    function: Callable[..., Rewards]
    columns: tuple[str, ...] = ()


REWARDS = {
    "exact": BuiltIn(exact, ANSWERS),
    "contains": BuiltIn(contains, ANSWERS),
    "f1": BuiltIn(f1, ANSWERS),
    "rouge": BuiltIn(rouge, ANSWERS),
    "regex": BuiltIn(regex, ("pattern",)),
    "format": BuiltIn(format),
    "overlong": BuiltIn(overlong),
    "repetition": BuiltIn(repetition),
}
