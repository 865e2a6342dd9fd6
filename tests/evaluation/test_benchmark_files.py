"""LongBench, LongBench v2 and ZeroSCROLLS, from records that were made by hand in their published
schema.
"""

import csv
import json
import random

import pytest

from lljax.errors import ConfigError, DataError, LljaxError
from lljax.evaluation import longbench, longbench2, zeroscrolls
from lljax.evaluation.fitting import TokenCounter
from lljax.evaluation.task import group_scores

LONG = " ".join(f"word{i}" for i in range(900))


def rows(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def record(key="1", **changes):
    return {
        "input": "Who?",
        "context": "Long ago {here}.",
        "answers": ["the cat", "a dog"],
        "length": 10,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": key,
    } | changes


@pytest.fixture
def bench(tmp_path):
    """A folder of LongBench with its two JSON files."""
    prompt = "Read.\n\n{context}\n\nQuestion: {input}\nAnswer:"
    (tmp_path / "dataset2prompt.json").write_text(
        json.dumps(dict.fromkeys(longbench.METRICS, prompt))
    )
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(longbench.METRICS, 32)))
    return tmp_path


def examples(task, tokenizer, length=400, samples=None):
    return list(task.examples(tokenizer, length, samples, 0))


def test_longbench_is_asked_with_its_own_prompt_and_scored_by_the_best_answer(bench, tokenizer):
    rows(bench / "hotpotqa.jsonl", record("1"), record("2", context=LONG), record("3"))
    task = longbench.tasks(bench, None)["longbench/hotpotqa"]
    made = examples(task, tokenizer)
    assert made[0].prompt == "Read.\n\nLong ago {here}.\n\nQuestion: Who?\nAnswer:" and made[0].chat
    assert made[0].id == "1" and made[0].tokens == 32 and made[0].groups == ()
    assert made[1].prompt.startswith("Read.\n\nword0 word1") and made[1].prompt.endswith(
        "Question: Who?\nAnswer:"
    )
    assert 360 <= TokenCounter(tokenizer)(made[1].prompt) <= 368
    assert task.score(["A dog!", "the cat", "bird"], made) == pytest.approx(200 / 3)
    assert [example.id for example in examples(task, tokenizer, samples=2)] == ["1", "2"]
    assert list(longbench.tasks(bench, None)) == ["longbench/hotpotqa"]


def test_every_task_of_longbench_has_a_metric_that_gives_its_own_answer_full_marks(
    bench, tokenizer
):
    answer = {
        "passage_count": "12",
        "passage_retrieval_en": "Paragraph 12",
        "passage_retrieval_zh": "段落12",
        "trec": "Art",
    }
    assert len(longbench.METRICS) == 21 and len(longbench.EVEN) == 13
    for name in longbench.METRICS:
        text = answer.get(name, "return value")
        rows(
            bench / f"{name}.jsonl",
            record(answers=[text], all_classes=["Art", "Sport", "return value"]),
        )
        made = examples(longbench.tasks(bench, None)[f"longbench/{name}"], tokenizer)
        task = longbench.tasks(bench, None)[f"longbench/{name}"]
        assert (
            task.score([text], made) == pytest.approx(100, abs=1e-4) and task.score([""], made) == 0
        )
        assert made[0].chat == (
            name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
        )
        rambling = text + "\nQuestion: and so on, for ever"
        first_line_alone = name in (
            "trec",
            "triviaqa",
            "samsum",
            "lsht",
            "lcc",
            "repobench-p",
            "passage_count",
            "passage_retrieval_en",
            "passage_retrieval_zh",
        )
        assert (task.score(["\n" + rambling], made) > 99.99) == first_line_alone


def test_longbench_e_is_scored_by_length_too(bench, tokenizer):
    rows(
        bench / "qasper_e.jsonl",
        record("1", length=3999),
        record("2", length=4000),
        record("3", length=9000),
    )
    task = longbench.tasks(bench, None)["longbench/qasper_e"]
    made = examples(task, tokenizer)
    assert group_scores(task, ["the cat", "no", "a dog"], made) == {
        "0-4k": 100,
        "4-8k": 0,
        "8k+": 100,
    }


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"answers": "the cat"}, "hotpotqa.jsonl:1: 'answers' is a str, not a list"),
        ({"answers": []}, "row 1: 'answers' is not a list of texts, or is empty"),
        ({"length": "10"}, "'length' is a str, not a whole number"),
        ({"context": None}, "'context' is a NoneType, not a text"),
    ],
)
def test_a_row_of_longbench_that_is_not_in_its_schema_is_named(change, reason, bench, tokenizer):
    rows(bench / "hotpotqa.jsonl", record(**change))
    with pytest.raises(DataError, match=reason):
        examples(longbench.tasks(bench, None)["longbench/hotpotqa"], tokenizer)


def test_a_missing_file_of_longbench_is_one_line(bench, tokenizer, tmp_path):
    task = lambda folder, config=None: longbench.tasks(folder, config)["longbench/trec"]
    with pytest.raises(ConfigError, match="name their folder with --longbench"):
        examples(task(None), tokenizer)
    with pytest.raises(DataError, match="there is no such folder"):
        examples(task(tmp_path / "gone"), tokenizer)
    row = record()
    del row["all_classes"]
    rows(bench / "trec.jsonl", row)
    with pytest.raises(DataError, match="trec.jsonl:1: no field 'all_classes'"):
        examples(task(bench), tokenizer)
    rows(bench / "trec.jsonl", record())
    with pytest.raises(DataError, match="row 1: 'all_classes' is not a list of texts"):
        examples(task(bench), tokenizer)
    with pytest.raises(DataError, match="--longbench_config"):
        examples(task(bench, tmp_path / "elsewhere"), tokenizer)
    with pytest.raises(ConfigError, match="32 new tokens are too many"):
        examples(task(bench), tokenizer, length=60)
    (bench / "trec.jsonl").write_text('{"input": \n')
    with pytest.raises(DataError, match="trec.jsonl:1: not JSON"):
        examples(task(bench), tokenizer)
    (bench / "trec.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        examples(task(bench), tokenizer)
    rows(bench / "trec.jsonl", record(all_classes=["a"]))
    (bench / "dataset2prompt.json").write_text('{"trec": "{question}"}')
    with pytest.raises(DataError, match="the prompt of trec does not fit"):
        examples(task(bench), tokenizer)


def test_an_answer_of_a_retrieval_task_names_a_paragraph(bench, tokenizer):
    rows(bench / "passage_retrieval_en.jsonl", record())
    with pytest.raises(DataError, match="row 1: 'answers' name no paragraph"):
        examples(longbench.tasks(bench, None)["longbench/passage_retrieval_en"], tokenizer)


@pytest.mark.parametrize("name", ["hotpotqa.jsonl", "data.json", "qasper/validation.jsonl"])
def test_no_damage_to_a_file_is_more_than_one_line_of_error(name, bench, tokenizer):
    rows(bench / "hotpotqa.jsonl", record("1"), record("2"))
    rows(bench / "qasper" / "validation.jsonl", scroll("1", "Short."), scroll("2", "Long."))
    (bench / "data.json").write_text(json.dumps([choices("1"), choices("2")]))
    task = {
        "hotpotqa.jsonl": longbench.tasks(bench, None)["longbench/hotpotqa"],
        "data.json": longbench2.task(bench / "data.json"),
        "qasper/validation.jsonl": zeroscrolls.tasks(bench)["zeroscrolls/qasper"],
    }[name]
    path, rng, refused = bench / name, random.Random(0), 0
    sound = path.read_bytes()
    for _ in range(100):
        at = rng.randrange(len(sound))
        path.write_bytes(
            sound[:at]
            + rng.choice((bytes([rng.randrange(256)]), b"null", b"[", b"\\ud800", b"\n", b"1e999"))
            + sound[at + rng.randrange(9) :]
        )
        try:
            made = examples(task, tokenizer, length=700)
            task.score(["the cat"] * len(made), made)
        except LljaxError as error:
            refused += 1
            assert "\n" not in str(error) and str(bench) in str(error)
    assert refused > 20


def choices(key, **changes):
    return {
        "_id": key,
        "domain": "d",
        "sub_domain": "s",
        "difficulty": "easy",
        "length": "short",
        "answer": "B",
        "question": " Which?",
        "choice_A": "a",
        "choice_B": "b",
        "choice_C": "c",
        "choice_D": "d",
        "context": "A $Q$ text.",
    } | changes


def test_longbench_v2_is_asked_and_its_letter_found(tmp_path, tokenizer):
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps(
            [
                choices("1"),
                choices("2", difficulty="hard", length="long", context=LONG, answer="D"),
                choices("3", length="medium"),
            ]
        )
    )
    task = longbench2.task(path)
    made = examples(task, tokenizer, length=700)
    assert (
        "<text>\nA $Q$ text.\n</text>" in made[0].prompt
        and "question: Which?\nChoices:\n(A) a\n(B) b" in made[0].prompt
    )
    assert TokenCounter(tokenizer)(made[1].prompt) <= 700 - 128 and made[1].prompt.endswith(
        '(insert answer here)".'
    )
    predictions = ["**The correct answer is (B)**", "The correct answer is D.", "It is (B)"]
    assert task.score(predictions, made) == pytest.approx(200 / 3)
    assert group_scores(task, predictions, made) == {
        "easy": 50,
        "short": 100,
        "hard": 100,
        "long": 100,
        "medium": 0,
    }
    rows(tmp_path / "train.jsonl", choices("1"))
    assert len(examples(longbench2.task(tmp_path / "train.jsonl"), tokenizer, length=700)) == 1


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"answer": "E"}, "row 1: 'answer' is none of A, B, C, D"),
        ({"length": "tiny"}, "'length' is none of short, medium, long"),
        ({"choice_C": 3}, "data.json:1: 'choice_C' is a int, not a text"),
    ],
)
def test_a_bad_row_of_longbench_v2_is_named(change, reason, tmp_path, tokenizer):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([choices("1", **change)]))
    with pytest.raises(DataError, match=reason):
        examples(longbench2.task(path), tokenizer, length=700)
    with pytest.raises(ConfigError, match="--longbench2"):
        examples(longbench2.task(None), tokenizer)


def scroll(key, document, query="\n\nQuestion:\nWho?\n\nAnswer:\n", output="the cat", **changes):
    return {
        "id": key,
        "pid": f"{key}_0",
        "input": document + query,
        "output": output,
        "document_start_index": 0,
        "document_end_index": len(document),
        "query_start_index": len(document),
        "query_end_index": len(document) + 10,
        "truncation_seperator": "... [The rest is cut]",
    } | changes


def test_zeroscrolls_cuts_the_document_and_keeps_the_query(tmp_path, tokenizer):
    rows(
        tmp_path / "qasper" / "validation.jsonl",
        scroll("1", "Short."),
        scroll("1", "Short.", output="a dog"),
        scroll("2", LONG),
    )
    task = zeroscrolls.tasks(tmp_path)["zeroscrolls/qasper"]
    made = examples(task, tokenizer, length=500)
    assert [example.answers for example in made] == [("the cat", "a dog"), ("the cat",)]
    assert made[0].prompt == "Short.\n\nQuestion:\nWho?\n\nAnswer:\n" and made[0].tokens == 128
    assert made[1].prompt.startswith("word0 word1") and made[1].prompt.endswith(
        "cut]\n\nQuestion:\nWho?\n\nAnswer:\n"
    )
    assert 365 <= TokenCounter(tokenizer)(made[1].prompt) <= 372
    assert task.score(["dog", "cat"], made) == 100
    with pytest.raises(ConfigError, match="the query alone takes"):
        examples(task, tokenizer, length=140)
    rows(tmp_path / "qasper" / "validation.jsonl", scroll("1", "Short.", output=None))
    with pytest.raises(DataError, match="row 1: 'output' is not a text"):
        examples(task, tokenizer, length=500)
    with pytest.raises(DataError, match="there is no such file"):
        examples(zeroscrolls.tasks(tmp_path)["zeroscrolls/musique"], tokenizer)


def test_the_test_split_has_no_score_and_makes_a_submission(tmp_path, tokenizer):
    rows(tmp_path / "quality" / "test.jsonl", scroll("1", "Short.", output=None))
    task = zeroscrolls.tasks(tmp_path)["zeroscrolls_test/quality"]
    made = examples(task, tokenizer)
    assert str(task.score(["A"], made)) == "nan"
    predictions = {name: {"1": 'one, "two"\nthree', "2": ""} for name in zeroscrolls.TASKS}
    zeroscrolls.write_submission(tmp_path / "out.csv", predictions)
    with open(tmp_path / "out.csv", newline="") as file:
        found = list(csv.reader(file))
    assert (
        found[:2] == [["Task", "ID", "Prediction"], ["gov_report", "1", 'one, "two"\nthree']]
        and len(found) == 21
    )
    del predictions["quality"]
    with pytest.raises(ConfigError, match="no predictions for quality"):
        zeroscrolls.write_submission(tmp_path / "out.csv", predictions)
