"""`lljax data tasks` and `lljax data preferences`."""

import json
import random
import re
import shutil

import pytest

from lljax.cli.data import main
from lljax.cli.make_rows import drawn, wrong_answers
from lljax.data.template import with_template
from lljax.errors import ConfigError
from lljax.evaluation import registry
from lljax.evaluation.batched_generation import EvalSettings
from lljax.evaluation.fitting import TokenCounter
from lljax.evaluation.task import FIRST_TRAINING_SEED, Example, Sources
from lljax.interop.open import open_base

MODEL = "lljax/assets/tiny-512"
GENERATED = ("keychain", "needle", "passkey", "passkey/landmark", "ruler")
TASKS = {task.name: task for task in registry.find(GENERATED, Sources())}


@pytest.fixture(scope="module")
def tokenizer():
    return open_base(MODEL).tokenizer()


@pytest.fixture
def make(tmp_path, capsys):
    def make(command, tasks, *flags):
        """Exit code, what was printed, and the rows that were written."""
        out, code = tmp_path / "rows.jsonl", 0
        try:
            main([command, f"--tasks={tasks}", f"--model={MODEL}", f"--out={out}", *flags])
        except SystemExit as stopped:
            code = stopped.code
        lines = out.read_text().splitlines() if out.exists() else []
        printed = capsys.readouterr()
        return code, printed.out + printed.err, [json.loads(line) for line in lines]

    return make


def test_rows_hold_prompts_whose_answers_the_task_accepts(make, tokenizer):
    flags = ("--lengths=1k,2048", "--examples=3")
    code, printed, rows = make("tasks", "keychain/2,ruler/vt,needle", *flags)
    assert code == 0 and "18 rows, 3 of each of 3 tasks at 2 lengths; prompts are texts" in printed
    assert [(row["task"], row["length"]) for row in rows] == [
        (task, length)
        for task in ("keychain/2", "ruler/vt", "needle")
        for length in (1024, 2048)
        for _ in range(3)
    ]
    for row in rows:
        assert row.keys() == {"prompt", "answers", "task", "length"}
        assert all(answer in row["prompt"] for answer in row["answers"])
        length = TokenCounter(tokenizer)(row["prompt"])
        assert row["length"] * 0.85 < length < row["length"]
    assert len({row["prompt"] for row in rows}) == 18
    assert make("tasks", "keychain/2,ruler/vt,needle", *flags)[2] == rows
    other = make("tasks", "keychain/2,ruler/vt,needle", *flags, "--seed=1")[2]
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}


@pytest.mark.parametrize("name", TASKS)
def test_no_example_of_an_evaluation_is_among_the_rows(name, tokenizer):
    task, length = TASKS[name], 1024
    trained = [
        example.prompt
        for seed in (0, 1, 999)
        for example in drawn(task, tokenizer, length, 12, seed)
    ]
    held_out = [
        example.prompt
        for seed in (0, 1, 2, 1000)
        for example in EvalSettings(tokenizer, samples=4, seed=seed).examples(task, length)
    ]
    assert len(set(trained)) == 36 and not set(trained) & set(held_out)


def test_evaluation_takes_no_seed_of_the_rows(tokenizer):
    with pytest.raises(ConfigError, match="^seed=1073741824: .* make training rows"):
        EvalSettings(tokenizer, seed=FIRST_TRAINING_SEED)


def test_more_rows_than_a_task_has_of_one_seed_are_all_different(tokenizer):
    made = drawn(TASKS["ruler/niah_single_1"], tokenizer, 512, 600, 0)
    assert len({example.prompt for example in made}) == 600
    depths = {example.groups for example in drawn(TASKS["needle"], tokenizer, 512, 40, 0)}
    assert len(depths) == 11  # not only the first


@pytest.mark.parametrize("name", TASKS)
def test_chosen_is_right_and_rejected_comes_from_the_document(name, make, tokenizer):
    _, _, rows = make("preferences", name, "--lengths=1024", "--examples=4", "--chat")
    examples = drawn(TASKS[name], tokenizer, 1024 - room(), 4, 0)
    for row, example in zip(rows, examples, strict=True):
        (prompt,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert prompt == {"role": "user", "content": example.prompt}
        assert chosen["role"] == rejected["role"] == "assistant"
        prefix = example.answer_prefix.strip()
        assert chosen["content"].startswith(prefix) and rejected["content"].startswith(prefix)
        right, wrong = (
            re.split(r"[ ,]+", reply["content"].removeprefix(prefix).strip())
            for reply in (chosen, rejected)
        )
        assert right == list(example.answers) and right != wrong
        assert TASKS[name].score([" ".join(right)], [example]) == 100
        assert TASKS[name].score([" ".join(wrong)], [example]) < 100
        assert wrong == ["unknown"] or all(word in example.prompt for word in wrong)
        assert len(wrong) <= len(right) and (wrong == ["unknown"]) == (
            len(right) == 1 and not example.distractors
        )


def room():
    """The tokens of the chat template, as an evaluation subtracts them."""
    settings = EvalSettings(with_template(open_base(MODEL).tokenizer()), chat=True)
    return len(settings.tokens(Example(id="", prompt="a", answers=(), tokens=0))) - 1


def test_replies_to_a_text_continue_it(make):
    _, _, rows = make("preferences", "needle,ruler/vt", "--lengths=1024", "--examples=1")
    needle, variables = rows
    assert needle["prompt"].endswith(" is") and re.fullmatch(r" \d{7}", needle["chosen"])
    assert needle["rejected"] == " unknown"
    assert variables["prompt"].endswith("they are: ")
    assert re.fullmatch(r"[A-Z]{5}( [A-Z]{5}){4}", variables["chosen"])
    assert re.fullmatch(r"[A-Z]{3}( [A-Z]{3}){4}", variables["rejected"])


def test_without_distractors_the_last_needle_is_missed():
    example = Example("0", "one two three", answers=("three", "one", "two"), tokens=1)
    assert wrong_answers(example, random.Random(0)) == ("one", "two")


def test_prompts_are_messages_if_the_tokenizer_has_a_template(tmp_path, make, monkeypatch):
    shutil.copytree(MODEL, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    flags = ("--lengths=1024", "--examples=1", f"--model={tmp_path / 'chat'}")
    assert isinstance(make("tasks", "keychain/2", *flags)[2][0]["prompt"], list)
    assert isinstance(make("tasks", "keychain/2", *flags, "--no_chat")[2][0]["prompt"], str)


def test_rows_that_exceed_their_length_are_counted(make):
    flags = ("--lengths=4096", "--examples=2")
    code, printed, rows = make("tasks", "passkey/longlora", *flags)
    assert code == 0 and len(rows) == 2
    assert "2 rows of passkey/longlora longer than asked for" in " ".join(printed.split())


@pytest.mark.parametrize(
    "tasks,flags,said",
    [
        ("ruler/qa_1", (), "--tasks: ruler/qa_1 reads its examples from a file"),
        ("longbench2", (), "--tasks: longbench2 reads its examples from a file"),
        ("keychian", (), "there is no task 'keychian'; known here: passkey, needle, keychain"),
        (",", (), "--tasks=,: it names no task"),
        ("keychain", ("--seed=1000",), "--seed=1000: it must be from 0 to 999"),
        ("keychain", ("--seed=-1",), "--seed=-1: it must be"),
        ("keychain", ("--lengths=,",), "--lengths=,: it names no length"),
        ("keychain", ("--lengths=64",), "keychain/2: 12 hidden sentences"),
        ("needle", ("--haystack=/no/such",), "/no/such: the haystack cannot be read"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(tasks, flags, said, make):
    code, printed, rows = make("tasks", tasks, "--lengths=1024", "--examples=1", *flags)
    assert code in (2, 3) and said in printed and not rows
    assert printed.count("\n") == 1
