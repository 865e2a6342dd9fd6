"""RULER: needles, variable chains and word counts, generated for the tokenizer and the length.

Hsieh et al. 2024, arXiv 2404.06654; github.com/NVIDIA/RULER. Prompts, counts, word lists and scores
are RULER's. RULER's essays may not be redistributed: tasks that hide needles in other prose end in
_local, and their scores compare with each other only. qa_1 (SQuAD) and qa_2 (HotpotQA) are made
from the files of the data sets. Below 4,096 tokens, RULER's shortest length, haystacks of needles
are filled with sentences of noise.
"""

import dataclasses
import functools
import itertools
import math
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lljax.errors import ConfigError
from lljax.evaluation import haystack
from lljax.evaluation.fitting import TokenCounter, largest
from lljax.evaluation.metrics import matches_all, matches_part
from lljax.evaluation.ruler_qa import Questions, hotpotqa, squad
from lljax.evaluation.task import Example, Sources, Task, TooShort, mean

THRESHOLD = 85.6  # Llama2-7B's mean over all thirteen at 4,096 tokens
SAMPLES = 500  # for a task and length
SHORTEST = 4_096  # tokens; RULER's own lengths start here
SHOT = 500  # tokens of vt's one-shot example
HOPS = 4  # in vt's chain
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent: possible places of needles in prose
COMMON = 10  # words in the answer of cwe

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {single} is hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {single} afterwards.\n{context}\nWhat is the special "
    "magic {single} for {query} mentioned in the provided text?",
    " The special magic {single} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat are all "
    "the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
CHAIN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{context}\nQuestion: Find all variables that are assigned the value "
    "{value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {n} "
    "variables are assigned the value {value}, they are: ",
)
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n{context}\nQuestion: What are "
    "the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the "
    "three most frequently appeared coded words. {context}\nQuestion: Do not provide any "
    "explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
DOCUMENTS = (
    "Answer the question based on the given documents. Only give me the answer and do "
    "not output any other words.\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do "
    "not output any other words.\n\nQuestion: {query}",
    " Answer:",
)

MOST = 8  # distractors of an example


class Sample(NamedTuple):
    """As the fields of `Example`."""

    prompt: str
    prefix: str
    answers: list[str]
    distractors: Sequence[str] = ()
    separator: str = ", "


def _text(sample: Sample) -> str:
    """The prompt of a base model."""
    return sample.prompt + sample.prefix


@dataclasses.dataclass(frozen=True)
class Maker:
    """make(rng, index, n): a sample whose haystack has n >= `least` units. At most `samples`."""

    make: Callable[[random.Random, int, int], Sample]
    least: int
    samples: int = SAMPLES


@dataclasses.dataclass(frozen=True)
class Needles:
    """k keys with v values each, in a haystack; the question is about q of the keys.

    haystack: noise | prose | needles. keys: words | uuids. values: numbers | uuids.
    """

    haystack: str
    keys: str
    values: str
    k: int = 1
    v: int = 1
    q: int = 1


def hidden_needles(kind: Needles, text: Path | None, counter: TokenCounter, length: int) -> Maker:
    template, prefix = ONE if kind.q * kind.v == 1 else SEVERAL
    line = NEEDLE.format(
        kind=kind.values,
        key=_names(kind.keys, random.Random(0), 1)[0],
        value=_values(kind.values, random.Random(0), 1)[0],
    )
    # Sentences of noise that have the tokens of one needle.
    per = (
        max(1, len(haystack.NOISE) * counter(line) // counter(haystack.noise(5)[0]))
        if length < SHORTEST
        else 1
    )

    def make(rng: random.Random, index: int, n: int) -> Sample:
        others = n // per if kind.haystack == "needles" else 0
        names = _names(kind.keys, rng, kind.k + others)
        values = _values(kind.values, rng, kind.k * kind.v + others)
        hidden = [
            NEEDLE.format(kind=kind.values, key=names[i // kind.v], value=values[i])
            for i in range(kind.k * kind.v)
        ]
        rng.shuffle(hidden)
        if kind.haystack == "prose":
            context = _hide_in_prose(haystack.first_words(haystack.prose(text), n), hidden, rng)
        elif kind.haystack == "noise":
            context = "\n".join(_inserted(haystack.noise(n), hidden, rng))
        else:
            lines = [
                NEEDLE.format(kind=kind.values, key=key, value=value)
                for key, value in zip(names[kind.k :], values[kind.k * kind.v :], strict=True)
            ]
            context = "\n".join(_inserted(lines, hidden, rng) + haystack.noise(n % per))
        asked = rng.sample(range(kind.k), kind.q)
        query = [names[i] for i in asked]
        words = {
            "kind": kind.values,
            "single": kind.values[:-1],
            "query": ", ".join(query[:-1]) + ", and " + query[-1] if kind.q > 1 else query[0],
        }
        answers = [value for i in asked for value in values[i * kind.v : (i + 1) * kind.v]]
        others = [value for value in values if value not in answers]
        return Sample(
            prompt=template.format(context=context, **words),
            prefix=prefix.format(**words),
            answers=answers,
            distractors=rng.sample(others, min(MOST, len(others))),
        )

    hidden = kind.k * kind.v
    return Maker(
        make, {"noise": len(haystack.NOISE) * hidden, "needles": 2 * per, "prose": 1}[kind.haystack]
    )


def _names(kind: str, rng: random.Random, n: int) -> list[str]:
    return haystack.compounds(rng, n) if kind == "words" else _uuids(rng, n)


def _values(kind: str, rng: random.Random, n: int) -> list[str]:
    return (
        [str(value) for value in rng.sample(range(10**6, 10**7), n)]
        if kind == "numbers"
        else _uuids(rng, n)
    )


def _uuids(rng: random.Random, n: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(n)]


def _inserted(lines: list[str], hidden: list[str], rng: random.Random) -> list[str]:
    """Inserts `hidden`, in their order, before distinct random lines."""
    places = sorted(rng.sample(range(len(lines)), len(hidden)))
    before = dict(zip(places, hidden, strict=True))
    result = []
    for i, line in enumerate(lines):
        result += [before[i], line] if i in before else [line]
    return result


def _hide_in_prose(text: str, hidden: list[str], rng: random.Random) -> str:
    parts = haystack.sentences(text)
    places = [
        0,
        *sorted(len(parts) * depth // 100 for depth in rng.sample(DEPTHS, len(hidden))),
        len(parts),
    ]
    between = [" ".join(parts[start:stop]) for start, stop in itertools.pairwise(places)]
    return " ".join(
        filter(None, itertools.chain.from_iterable(itertools.zip_longest(between, hidden)))
    )


def variable_tracking(counter: TokenCounter, length: int) -> Maker:
    def chain(rng: random.Random, n: int, letters: int) -> Sample:
        names = set()
        while len(names) < HOPS + 1:
            names.add("".join(rng.choices(string.ascii_uppercase, k=letters)))
        names, value = rng.sample(sorted(names), HOPS + 1), str(rng.randrange(10_000, 99_999))
        links = [
            f"VAR {names[0]} = {value}",
            *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)),
        ]
        context = "\n".join(_inserted(haystack.noise(n), links, rng)).replace(". \n", ".\n")
        template, prefix = CHAIN
        return Sample(
            prompt=template.format(context=context, value=value),
            prefix=prefix.format(value=value, n=HOPS + 1),
            answers=names,
        )

    least = len(haystack.NOISE) * (HOPS + 1)
    shot = (
        largest(
            lambda n: counter(_text(chain(random.Random(0), n, 3))),
            SHOT,
            least=least,
            guess=least,
        )
        or least
    )

    def make(rng: random.Random, index: int, n: int) -> Sample:
        shown, asked = chain(rng, shot, 3), chain(rng, n, 5)
        return asked._replace(
            prompt=f"{_text(shown)} {' '.join(shown.answers)}\n\n{asked.prompt}",
            distractors=shown.answers,
            separator=" ",
        )

    return Maker(make, least)


def common_words(length: int) -> Maker:
    # Words of the example, the counts of its common and its other words, and the counts of the
    # question's.
    size, *often = (20, 3, 1, 6, 1) if length < SHORTEST else (40, 10, 3, 30, 3)

    def numbered(words: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    def listed(rng: random.Random, n: int, common: int, uncommon: int) -> tuple[str, list[str]]:
        """The prompt, and its words, the common ones first."""
        known = haystack.all_words()
        drawn = rng.sample(known, min(n, len(known)))
        drawn += haystack.compounds(rng, n - len(drawn))  # there RULER switches to another list
        words = drawn[:COMMON] * common + drawn[COMMON:] * uncommon
        rng.shuffle(words)
        return LIST[0].format(context=numbered(words)), drawn

    def make(rng: random.Random, index: int, n: int) -> Sample:
        example, shown = listed(rng, size, *often[:2])
        prompt, drawn = listed(rng, n, *often[2:])
        return Sample(
            prompt=f"{example}{LIST[1]} {numbered(shown[:COMMON])}\n{prompt}",
            prefix=LIST[1],
            answers=drawn[:COMMON],
            distractors=drawn[COMMON : 2 * COMMON],
        )

    return Maker(make, COMMON + 1)


def frequent_words(length: int) -> Maker:
    """n words; the word of rank k appears about n / (zeta(2) k^2) times. The first is "...", and
    the next three are the answer.
    """
    ranks = (length - TASKS["fwe"].tokens) // 50

    def make(rng: random.Random, index: int, n: int) -> Sample:
        coded = set()
        while len(coded) < ranks:
            coded.add("".join(rng.choices(string.ascii_lowercase, k=6)))
        coded = ["...", *rng.sample(sorted(coded), ranks - 1)]
        words = [
            word
            for k, word in enumerate(coded, 1)
            for _ in range(int(n * k**-2 / (math.pi**2 / 6)))
        ]
        rng.shuffle(words)
        return Sample(
            prompt=CODED[0].format(context=" ".join(words)),
            prefix=CODED[1],
            answers=coded[1:4],
            distractors=coded[4:7],
        )

    return Maker(make, 100)  # enough that the third word appears more often than the fourth


def questions(data: Questions) -> Maker:
    def make(rng: random.Random, index: int, n: int) -> Sample:
        question = data.questions[index]
        chosen = [
            *question.documents,
            *rng.sample(question.related, min(len(question.related), n - len(question.documents))),
        ]
        if n > len(chosen):
            others = [
                i
                for i in range(len(data.documents))
                if i not in {*question.documents, *question.related}
            ]
            chosen += rng.sample(others, min(len(others), n - len(chosen)))
        chosen = list(itertools.islice(itertools.cycle(chosen), max(n, len(chosen))))
        rng.shuffle(chosen)
        context = "\n\n".join(
            f"Document {i}:\n{data.documents[d]}" for i, d in enumerate(chosen, 1)
        )
        return Sample(
            prompt=DOCUMENTS[0].format(context=context, query=question.text),
            prefix=DOCUMENTS[1],
            answers=list(question.answers),
        )

    return Maker(
        make, max(len(question.documents) for question in data.questions), len(data.questions)
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """A task of RULER. prepare(sources, counter, length) -> Maker. tokens: new ones."""

    prepare: Callable[[Sources, TokenCounter, int], Maker]
    tokens: int
    grade: Callable[[str, Sequence[str]], float] = matches_all


def _needles(haystack: str, keys: str, values: str, **counts: int) -> Kind:
    kind = Needles(haystack, keys, values, **counts)
    return Kind(
        lambda sources, counter, length: hidden_needles(kind, sources.haystack, counter, length),
        128,
    )


def _qa(read: Callable[[Path], Questions], field: str) -> Kind:
    def prepare(sources: Sources, counter: TokenCounter, length: int) -> Maker:
        path = getattr(sources, field)
        if path is None:
            raise ConfigError(
                f"RULER's questions on {field} are made from its file: name it with --{field}, or "
                "leave qa_1 and qa_2 out of --tasks"
            )
        return questions(read(path))

    return Kind(prepare, 32, matches_part)


TASKS = {
    "niah_single_1": _needles("noise", "words", "numbers"),
    "niah_single_2_local": _needles("prose", "words", "numbers"),
    "niah_single_3_local": _needles("prose", "words", "uuids"),
    "niah_multikey_1_local": _needles("prose", "words", "numbers", k=4),
    "niah_multikey_2": _needles("needles", "words", "numbers"),
    "niah_multikey_3": _needles("needles", "uuids", "uuids"),
    "niah_multivalue_local": _needles("prose", "words", "numbers", v=4),
    "niah_multiquery_local": _needles("prose", "words", "numbers", k=4, q=4),
    "vt": Kind(lambda sources, counter, length: variable_tracking(counter, length), 30),
    "cwe": Kind(lambda sources, counter, length: common_words(length), 120),
    "fwe": Kind(lambda sources, counter, length: frequent_words(length), 50),
    "qa_1": _qa(squad, "squad"),
    "qa_2": _qa(hotpotqa, "hotpotqa"),
}


QUESTIONS = ("qa_1", "qa_2")  # from files, the same for every seed


def tasks(sources: Sources) -> dict[str, Task]:
    """RULER's tasks by name, as ruler/NAME."""
    return {
        f"ruler/{name}": Task(
            f"ruler/{name}",
            functools.partial(_examples, name, sources),
            mean(lambda prediction, example, grade=kind.grade: grade(prediction, example.answers)),
            generated=name not in QUESTIONS,
        )
        for name, kind in TASKS.items()
    }


def _examples(
    name: str, sources: Sources, tokenizer: Any, length: int, samples: int | None, seed: int
) -> Iterator[Example]:
    kind, counter = TASKS[name], TokenCounter(tokenizer)
    if length <= kind.tokens:
        raise TooShort(
            f"ruler/{name}: {kind.tokens} new tokens leave no room for a prompt in {length}: use "
            "longer --lengths"
        )
    maker = kind.prepare(sources, counter, length)
    n = maker.least
    for index in range(min(maker.samples, SAMPLES if samples is None else samples)):

        def make(n: int, index=index) -> Sample:
            return maker.make(random.Random(f"{seed} {name} {length} {index}"), index, n)

        size = lambda n, make=make: counter(_text(make(n))) + kind.tokens
        n = largest(size, length, least=maker.least, guess=n)
        if n is None:
            raise TooShort(
                f"ruler/{name}: its fixed parts take {size(maker.least)} of {length} tokens: use "
                "longer --lengths, or leave it out of --tasks"
            )
        sample = make(n)
        yield Example(
            id=str(index),
            prompt=sample.prompt,
            answers=tuple(sample.answers),
            tokens=kind.tokens,
            answer_prefix=sample.prefix,
            distractors=tuple(sample.distractors),
            separator=sample.separator,
        )


def effective_length(scores: dict[int, float], threshold: float = THRESHOLD) -> int | None:
    """The longest length up to which all mean scores exceed `threshold`, None if there is none."""
    reached = list(itertools.takewhile(lambda length: scores[length] > threshold, sorted(scores)))
    return reached[-1] if reached else None
