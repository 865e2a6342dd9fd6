"""The work of `lljax data tasks` and `lljax data preferences`: rows of generated long tasks.

Evaluation draws its examples from seeds below FIRST_TRAINING_SEED, these rows from seeds above: no
example of an evaluation is among them.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lljax.cli.console import console
from lljax.cli.documents import progress, say
from lljax.cli.measure import read_lengths
from lljax.data.folders import write_rows
from lljax.data.prompt_tokens import chat_tokens
from lljax.data.template import with_template
from lljax.errors import ConfigError, counted, printable
from lljax.evaluation import registry
from lljax.evaluation.fitting import TokenCounter
from lljax.evaluation.task import FIRST_TRAINING_SEED, Example, Sources, Task
from lljax.interop.open import open_base

SEEDS = 1000  # values of --seed
SPAN = 1 << 20  # seeds of one --seed
BLOCK = 256  # samples that are drawn from one seed: some tasks have no more than 500
UNSEEN = "unknown"  # the answer of a reader who has not seen the needle
Row = dict[str, Any]


def tasks(arguments: argparse.Namespace) -> None:
    """Rows for rewards: prompt, answers, task, length."""
    _write(arguments, prompt_row)


def preferences(arguments: argparse.Namespace) -> None:
    """Rows for preferences: prompt, chosen, rejected, task, length."""
    _write(arguments, preference_row)


def prompt_row(example: Example, chat: bool, rng: random.Random) -> Row:
    return {"prompt": _prompt(example, chat), "answers": list(example.answers)}


def preference_row(example: Example, chat: bool, rng: random.Random) -> Row:
    """chosen: the true answer. rejected: what `wrong_answers` gives, in the same sentence."""
    return {
        "prompt": _prompt(example, chat),
        "chosen": _reply(example, example.answers, chat),
        "rejected": _reply(example, wrong_answers(example, rng), chat),
    }


def wrong_answers(example: Example, rng: random.Random) -> tuple[str, ...]:
    """As many answers from wrong passages of the prompt as there are true ones, as far as it has
    them. Without distractors, the answer of a reader whose text was cut before the last needle: the
    other true answers, or UNSEEN if there are none.
    """
    if example.distractors:
        count = min(len(example.answers), len(example.distractors))
        return tuple(rng.sample(example.distractors, count))
    last = max(example.answers, key=example.prompt.rfind)
    return tuple(answer for answer in example.answers if answer != last) or (UNSEEN,)


def _prompt(example: Example, chat: bool) -> str | list[dict]:
    return [{"role": "user", "content": example.prompt}] if chat else example.text


def _reply(example: Example, answers: tuple[str, ...], chat: bool) -> str | list[dict]:
    """A message, which begins with the example's prefix, or a continuation of the prompt."""
    prefix, text = example.answer_prefix, example.separator.join(answers)
    space = "" if prefix[-1:].isspace() else " "
    if chat:
        return [{"role": "assistant", "content": f"{prefix}{space}{text}".strip()}]
    return space + text


def _write(
    arguments: argparse.Namespace, make: Callable[[Example, bool, random.Random], Row]
) -> None:
    found, lengths = _tasks(arguments), read_lengths(arguments.lengths)
    if not lengths:
        raise ConfigError(f"--lengths={arguments.lengths}: it names no length")
    tokenizer = open_base(arguments.model).tokenizer()
    counter = TokenCounter(tokenizer)
    chat = tokenizer.chat_template is not None if arguments.chat is None else arguments.chat
    room = _template_tokens(tokenizer) if chat else 0
    longer: Counter[str] = Counter()  # rows by task

    def rows() -> Iterator[Row]:
        for task in found:
            for length in lengths:
                examples = drawn(task, tokenizer, length - room, arguments.examples, arguments.seed)
                rng = random.Random(f"{arguments.seed} {task.name} {length}")
                for example in _shown(examples, f"{task.name} at {length:,}"):
                    longer[task.name] += counter(example.text) + example.tokens > length - room
                    yield make(example, chat, rng) | {"task": task.name, "length": length}

    count = write_rows(rows(), arguments.out)
    say(
        f"{printable(str(arguments.out))}: {counted(count, 'row')}, {arguments.examples:,} of each "
        f"of {counted(len(found), 'task')} at {counted(len(lengths), 'length')}; prompts are "
        f"{'messages' if chat else 'texts'}"
    )
    for name, number in longer.items():
        if number:
            say(
                f"{counted(number, 'row')} of {name} longer than asked for: it counts characters, "
                "and this tokenizer makes more tokens of them"
            )


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    """The tasks of --tasks. Raises ConfigError if rows cannot be made of one, or of --seed."""
    if not 0 <= arguments.seed < SEEDS:
        raise ConfigError(f"--seed={arguments.seed}: it must be from 0 to {SEEDS - 1}")
    if arguments.examples > SPAN:
        raise ConfigError(f"--examples={arguments.examples}: {SPAN:,} of a task at most")
    names = [name for name in arguments.tasks.split(",") if name]
    found = registry.find(names, Sources(haystack=arguments.haystack)) if names else []
    if not found:
        raise ConfigError(f"--tasks={arguments.tasks}: it names no task; keychain is one")
    for task in found:
        if not task.generated:
            raise ConfigError(
                f"--tasks: {task.name} reads its examples from a file, the same for training and "
                "evaluation; take generated tasks, such as keychain, needle or ruler/vt"
            )
    return found


def _shown(examples: list[Example], title: str) -> Any:
    return progress(examples, title) if console().is_terminal else examples


def _template_tokens(tokenizer: Any) -> int:
    """The tokens of the chat template around a prompt."""
    return len(chat_tokens(with_template(tokenizer), [{"role": "user", "content": "a"}])) - 1


def drawn(task: Task, tokenizer: Any, length: int, count: int, seed: int) -> list[Example]:
    """`count` examples of a generated task, from the seeds that belong to `seed`."""
    examples: list[Example] = []
    first = FIRST_TRAINING_SEED + seed * SPAN
    while len(examples) < count:
        samples = min(BLOCK, -(-(count - len(examples)) // task.per_sample))
        made = list(task.examples(tokenizer, length, samples, first))
        # A task with several examples a sample, such as needle's depths, gives some of each kind.
        wanted = min(len(made), count - len(examples))
        kept = sorted(random.Random(first).sample(range(len(made)), wanted))
        examples += [made[i] for i in kept]
        first += BLOCK
    return examples
