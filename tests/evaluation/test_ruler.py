import json
import random
import re
from pathlib import Path

import pytest

from lljax.errors import ConfigError, DataError
from lljax.evaluation import haystack, ruler
from lljax.evaluation.fitting import TokenCounter
from lljax.evaluation.task import Sources
from lljax.interop.open import open_base

GENERATED = [name for name in ruler.TASKS if not name.startswith("qa_")]
NEEDLES = {
    "niah_single_1": 1,
    "niah_single_2_local": 1,
    "niah_single_3_local": 1,
    "niah_multikey_1_local": 4,
    "niah_multivalue_local": 4,
    "niah_multiquery_local": 4,
}


def examples(name, tokenizer, length, samples=2, seed=42, sources=None):
    task = ruler.tasks(sources or Sources())[f"ruler/{name}"]
    return task, list(task.examples(tokenizer, length, samples, seed))


@pytest.mark.parametrize("name", GENERATED)
def test_prompt_and_answer_fill_the_length_and_a_perfect_answerer_scores_all(name, tiny_512):
    counter = TokenCounter(tiny_512)
    for length in (512, 1024, 2048, 4096):
        if length == 512 and name in ("vt", "cwe"):
            continue
        task, made = examples(name, tiny_512, length)
        assert len(made) == 2 and made[0].text != made[1].text
        for example in made:
            assert 0.95 * length <= counter(example.text) + example.tokens <= length
        assert task.score([" ".join(example.answers) for example in made], made) == 100
        assert task.score(["", ""], made) == 0
        assert examples(name, tiny_512, length)[1] == made
        assert examples(name, tiny_512, length, seed=1)[1] != made


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATED)
def test_lengths_of_rulers_own_with_a_real_tokenizer(name, smollm2):
    tokenizer = open_base(str(smollm2)).tokenizer()
    counter = TokenCounter(tokenizer)
    for length in (4096, 8192, 16_384, 32_768, 65_536, 131_072):
        for example in examples(name, tokenizer, length, samples=3)[1]:
            assert 0.95 * length <= counter(example.text) + example.tokens <= length


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize("length", [512, 4096])
def test_every_needle_is_there_once_and_the_question_is_about_them(name, length, tiny_512):
    for example in examples(name, tiny_512, length, samples=4)[1]:
        found = re.findall(r"One of the special magic (\w+) for (.+?) is: (\S+)\.", example.prompt)
        assert len(found) == NEEDLES[name] and len(set(found)) == len(found)
        asked = [value for _, key, value in found if key in example.prompt.split("\nWhat ")[-1]]
        assert sorted(asked) == sorted(example.answers)
        assert all(example.prompt.count(value) == 1 for value in example.answers)
        assert len({key for _, key, _ in found}) == (1 if "multivalue" in name else NEEDLES[name])
        assert example.answer_prefix.endswith("are" if len(example.answers) > 1 else "is")


@pytest.mark.parametrize("name,least", [("niah_multikey_2", 50), ("niah_multikey_3", 20)])
def test_a_haystack_of_needles_has_each_key_once(name, least, tiny_512):
    for example in examples(name, tiny_512, 4096)[1]:
        found = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", example.prompt)
        assert len(found) > least and len(dict(found)) == len(found)
        key = re.search(
            r"special magic \w+ for (.+?) mentioned in the provided text\?$", example.prompt
        )[1]
        assert (dict(found)[key],) == example.answers and example.prompt.count(
            example.answers[0]
        ) == 1
        assert "The grass is green" not in example.prompt


def test_a_chain_of_variables_leads_from_the_value_to_every_answer(tiny_512):
    for example in examples("vt", tiny_512, 2048)[1]:
        shot, asked = example.prompt.split("\n\nMemorize")
        value = re.search(r"assigned the value (\d+) in", asked)[1]
        links = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked))
        assert len(links) == 5 and set(links) == set(example.answers)
        for name in example.answers:
            while name in links:
                name = links[name]
            assert name == value
        places = [asked.index(f"VAR {name} =") for name in example.answers]
        assert places == sorted(places)
        assert (
            f"{value}, they are: " in example.answer_prefix
            and len(re.findall("VAR", shot.split("\n\n")[-1])) == 9
        )


@pytest.mark.parametrize("length,common,uncommon", [(1024, 6, 1), (4096, 30, 3)])
def test_the_common_words_are_the_most_frequent_by_far(length, common, uncommon, tiny_512):
    for example in examples("cwe", tiny_512, length)[1]:
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", example.prompt.split("\nBelow")[-1])
        counts = {word: words.count(word) for word in set(words)}
        assert {word for word, n in counts.items() if n == common} == set(example.answers)
        assert len(example.answers) == 10 and set(counts.values()) == {common, uncommon}


@pytest.mark.parametrize("length", [512, 4096])
def test_the_three_coded_words_asked_for_are_the_most_frequent_after_the_dots(length, tiny_512):
    for example in examples("fwe", tiny_512, length, samples=5)[1]:
        words = example.prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert counts[0][1] == "..." and [word for _, word in counts[1:4]] == list(example.answers)
        assert len({n for n, _ in counts[:5]}) == 5  # none shares its place


def test_a_length_that_the_fixed_parts_do_not_fit_is_refused_in_one_line(tiny_512):
    for name, length in (
        ("vt", 512),
        ("cwe", 512),
        ("niah_single_1", 128),
        ("niah_multiquery_local", 256),
        ("fwe", 100),
    ):
        with pytest.raises(ConfigError, match=rf"^ruler/{name}: .*--lengths") as caught:
            examples(name, tiny_512, length)
        assert "\n" not in str(caught.value)


def test_needles_lie_at_many_depths_of_the_users_own_text(tmp_path, tiny_512):
    text = tmp_path / "novel.txt"
    text.write_text(" ".join(f"Sentence {i} of the novel ends here." for i in range(200)))
    made = examples(
        "niah_single_2_local", tiny_512, 2048, samples=30, sources=Sources(haystack=text)
    )[1]
    depths = [example.prompt.index("One of the special") / len(example.prompt) for example in made]
    assert min(depths) < 0.2 and max(depths) > 0.75 and len(set(depths)) > 10
    assert "Sentence 3 of the novel" in made[0].prompt and "The grass" not in made[0].prompt
    text.write_text(" *** \n")
    haystack.prose.cache_clear()
    with pytest.raises(DataError, match="holds no words"):
        examples("niah_single_2_local", tiny_512, 2048, sources=Sources(haystack=text))
    with pytest.raises(DataError, match="cannot be read"):
        examples(
            "niah_single_2_local", tiny_512, 2048, sources=Sources(haystack=tmp_path / "gone.txt")
        )
    for device in ("/dev/zero", tmp_path):
        with pytest.raises(DataError, match="the haystack is not a regular file"):
            examples("niah_single_2_local", tiny_512, 2048, sources=Sources(haystack=Path(device)))


def test_more_words_than_there_are_become_compounds():
    example = ruler.common_words(1 << 20).make(random.Random(0), 0, 9000)[0]
    words = set(re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", example.split("\nBelow")[-1]))
    assert len(words) == 9000


def test_questions_on_squad_and_hotpotqa_come_with_their_documents(tmp_path, tiny_512):
    rng = random.Random(0)
    text = lambda: " ".join(
        rng.choice(("import", "class", "return", "value", "self")) for _ in range(40)
    )
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"{text()} {a}-{p}",
                    "qas": [
                        {
                            "question": f"What is {a}-{p}?",
                            "answers": [{"text": f"{a}-{p}"}, {"text": f"it is {a}-{p}"}],
                        },
                        {"question": "Nothing?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(3)
            ]
        }
        for a in range(8)
    ]
    squad, hotpotqa = tmp_path / "squad.json", tmp_path / "hotpotqa.json"
    squad.write_text(json.dumps({"data": articles}))
    hotpotqa.write_text(
        json.dumps(
            [
                {
                    "question": f"Who is {i}?",
                    "answer": f"number {i}",
                    "context": [
                        [f"Title {i}", [text(), f" number {i}."]],
                        [f"Other {i}", [text()]],
                    ],
                }
                for i in range(9)
            ]
        )
    )
    sources = Sources(squad=squad, hotpotqa=hotpotqa)
    counter = TokenCounter(tiny_512)
    for name, number in (("qa_1", 24), ("qa_2", 9)):
        task, made = examples(name, tiny_512, 2048, samples=None, sources=sources)
        assert len(made) == number
        for example in made:
            # whole documents only
            assert 0.85 * 2048 <= counter(example.text) + example.tokens <= 2048
            assert example.answers[0] in example.prompt and example.prompt.count("Document ") > 8
        assert task.score([example.answers[-1] for example in made], made) == 100
        assert task.score([""] * number, made) == 0
    first = examples("qa_1", tiny_512, 2048, samples=1, sources=sources)[1][0]
    # the article's other paragraphs come first
    assert all(f" 0-{p}\n" in first.prompt for p in range(3))
    with pytest.raises(ConfigError, match="name it with --squad"):
        examples("qa_1", tiny_512, 2048)


@pytest.mark.parametrize(
    "content,reason",
    [
        (None, "there is no such file"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"data": []}', "no question"),
        ('{"data": [{"title": 1}]}', r"data\[0\]: no field 'paragraphs'"),
        (
            '{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}',
            r"paragraphs\[0\]: 'context' is a int, not a text",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "c", '
            '"qas": [{"question": "q", "answers": []}]}]}]}',
            "'answers' is not a list",
        ),
    ],
)
def test_a_bad_squad_file_is_named_with_its_fault(content, reason, tmp_path, tiny_512):
    path = tmp_path / "squad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=reason):
        examples("qa_1", tiny_512, 2048, sources=Sources(squad=path))


def test_a_bad_hotpotqa_file_is_named_with_its_fault(tmp_path, tiny_512):
    path = tmp_path / "hotpotqa.json"
    for content, reason in (
        ("{}", "not a list of questions"),
        (
            '[{"question": "q", "answer": "a", "context": [3]}]',
            "question 1: 'context' is not a list of",
        ),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=reason):
            examples("qa_2", tiny_512, 2048, sources=Sources(hotpotqa=path))


def test_the_effective_length_is_the_last_before_the_first_failure():
    assert ruler.effective_length({4096: 95, 8192: 90, 16_384: 80, 32_768: 99}) == 8192
    assert ruler.effective_length({8192: 20, 4096: 85.6}) is None
    assert ruler.effective_length({8192: 86, 4096: 99}) == 8192
