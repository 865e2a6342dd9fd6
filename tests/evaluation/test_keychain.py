import random
import re

import pytest

from lljax.errors import ConfigError
from lljax.evaluation import keychain
from lljax.evaluation.fitting import TokenCounter
from lljax.interop.open import open_base


def follow(text, key):
    """A reader's way: the keys from `key` on, the question at their end, and its answer."""
    links = dict(re.findall(r"The key (\w+) leads to the key (\w+)\.", text))
    ends = dict(re.findall(r"The key (\w+) leads to the question: (.+?\?)", text))
    facts = dict(re.findall(r"The special number of (\w+) is (\d+)\.", text))
    path = [key]
    while path[-1] in links:
        path.append(links[path[-1]])
    name = re.fullmatch(r"What is the special number of (\w+)\?", ends[path[-1]])[1]
    return path, facts[name], (links, ends, facts)


@pytest.mark.parametrize(
    "name,length", [("keychain/2", 1024), ("keychain/4", 1024), ("keychain/4", 8192)]
)
def test_the_answer_is_at_the_end_of_the_chain_and_false_chains_end_elsewhere(
    name, length, tiny_512
):
    counter, task, hops = TokenCounter(tiny_512), keychain.tasks()[name], int(name[-1])
    made = list(task.examples(tiny_512, length, 12, 0))
    first = []
    for example in made:
        assert 0.95 * length <= counter(example.text) + example.tokens <= length
        context, question = example.prompt.split("\n\n", 1)[1].rsplit("\n\n", 1)
        (start,) = re.findall(r"Start at the key (\w{8}) ", question)
        path, answer, (links, ends, facts) = follow(context, start)
        assert len(path) == hops and (answer,) == example.answers
        assert len(facts) == len(ends) == len(set(ends.values())) == 4
        assert len(links) == 4 * (hops - 1) and not set(links) & set(ends)
        starts = {*links, *ends} - set(links.values())
        false = [follow(context, key) for key in sorted(starts - {start})]
        assert all(len(path) == hops for path, _, _ in false)
        assert sorted(number for _, number, _ in false) == sorted(example.distractors)
        assert len({answer, *example.distractors}) == len(facts)
        assert all(number not in question for number in facts.values())
        first.append(list(facts.values()).index(answer))
    assert len(set(first)) > 1  # the true fact is not always the first
    assert list(task.examples(tiny_512, length, 12, 0)) == made
    assert list(task.examples(tiny_512, length, 12, 1)) != made


def test_a_sentence_that_is_hidden_is_never_cut():
    for seed in range(50):
        rng = random.Random(seed)
        hidden = keychain.key_chain(rng, 3, 5)
        text = keychain._scattered(
            "One two. Three four!", hidden.lines, sorted(rng.random() for _ in hidden.lines)
        )
        assert all(line in text for line in hidden.lines) and len(hidden.lines) == 3 * 5 + 5
        assert [word for word in ("One two.", "Three four!") if word in text] == [
            "One two.",
            "Three four!",
        ]


def test_the_score_is_containment(tiny_512):
    task = keychain.tasks()["keychain/2"]
    (example,) = task.examples(tiny_512, 1024, 1, 0)
    assert task.score([f" {example.answers[0]}."], [example]) == 100
    assert task.score([f" {example.distractors[0]}."], [example]) == 0


def test_own_text_parameters_and_lengths_without_room(tmp_path, tiny_512, tiny):
    path = tmp_path / "text.txt"
    path.write_text("Call me Ishmael. Some years ago I went to sea. ")
    (example,) = keychain.task(1, 20, path, "mine").examples(tiny_512, 2048, 1, 0)
    assert example.prompt.count("Call me Ishmael.") > 5 and len(example.distractors) == 19
    with pytest.raises(ConfigError, match="^keychain/4: 20 hidden sentences.*--lengths"):
        next(keychain.tasks()["keychain/4"].examples(tiny_512, 512, 1, 0))
    other = open_base(str(tiny)).tokenizer()  # almost a token a character
    for made in keychain.tasks()["keychain/2"].examples(other, 4096, 2, 0):
        assert 0.95 * 4096 <= TokenCounter(other)(made.text) + made.tokens <= 4096
