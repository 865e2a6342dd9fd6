"""EvalScope against a real server: its own benchmarks, and those that lljax registers."""

import json
import subprocess
import sys

import pytest
from serving.cases import ScriptedEngine, a_model, running, tiny_engine

from lljax.data.template import with_template
from lljax.errors import ConfigError, DataError
from lljax.evaluation import longbench, registry
from lljax.evaluation.batched_generation import EvalModel, EvalSettings, score_tasks
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.task import Example, Sources, Task, mean
from lljax.interop.open import end_tokens, open_base

pytestmark = pytest.mark.slow
pytest.importorskip("evalscope", reason="no evalscope: pip install -e '.[evalscope]'")
pytest.importorskip("wonderwords")

LENGTH = 1000
NEEDLE = "The best thing to do in Porto is to read."
WORDS = "Porto is north of Aberdeen and Lisbon is not. "


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files in the published schemas."""
    out = tmp_path_factory.mktemp("benchmarks")
    question = {"input": "Where?", "length": 10, "dataset": "hotpotqa", "language": "en"}
    prompt = "Read.\n{context}\nQuestion: {input}\nAnswer:"
    for name, value in (("dataset2prompt", prompt), ("dataset2maxlen", 24)):
        (out / "longbench").mkdir(exist_ok=True)
        text = json.dumps(dict.fromkeys(longbench.METRICS, value))
        (out / "longbench" / f"{name}.json").write_text(text)
    write(
        out / "longbench" / "hotpotqa.jsonl",
        *(
            question | {"_id": str(i), "context": WORDS * n, "answers": [a], "all_classes": None}
            for i, (n, a) in enumerate([(2, "def"), (90, "class self")])
        ),
    )
    document = "Article: " + WORDS * 40
    write(
        out / "zeroscrolls" / "qasper" / "validation.jsonl",
        *(
            {
                "id": "q",
                "input": document + "\n\nQuestion: Where?\nAnswer:",
                "output": output,
                "query_start_index": len(document),
                "truncation_seperator": "...\n",
            }
            for output in ("Porto", "the town of Porto")
        ),
    )
    letters = {f"choice_{letter}": f"the {letter}" for letter in "ABCD"}
    details = {"domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short"}
    row = {"_id": "1", "question": "Which?", "answer": "B", "context": WORDS}
    write(out / "longbench_v2" / "train.jsonl", row | letters | details)
    write(out / "general_qa" / "towns.jsonl", {"question": "Where is it?", "answer": "in Porto"})
    (out / "needle").mkdir()
    (out / "needle" / "PaulGraham_Essays.txt").write_text(WORDS * 100)
    return out


def run(out, url, datasets, arguments, **more):
    """(report by benchmark, rows of the predictions) of EvalScope."""
    from evalscope import TaskConfig, run_task

    import lljax.evaluation.evalscope  # noqa: F401

    config = TaskConfig(
        model="base",
        api_url=f"{url}/v1",
        api_key="EMPTY",
        eval_type="openai_api",
        datasets=datasets,
        dataset_args=arguments,
        work_dir=str(out),
        no_timestamp=True,
        **more,
    )
    reports = run_task(config)
    files = (out / "predictions").rglob("*.jsonl")
    return reports, [json.loads(line) for file in files for line in file.open()]


@pytest.mark.parametrize("chat", [False, True])
def test_predictions_and_scores_are_those_of_lljax_evaluate(chat, tiny, folder, tmp_path):
    engine, decoder = tiny_engine(tiny)
    base = open_base(tiny)
    names = ["longbench/hotpotqa", "zeroscrolls/qasper", "ruler/niah_single_1"]
    folders = {name: folder / name for name in ("longbench", "zeroscrolls")}
    extra = {"tokenizer_path": tiny, "lengths": [LENGTH], "chat": chat}
    arguments = {
        name.split("/")[0]: {"subset_list": [name.split("/")[1]], "extra_params": extra}
        for name in names
    }
    for name, path in folders.items():
        arguments[name]["local_path"] = str(path)
    with running(a_model("base", engine, base.tokenizer(), longest=LENGTH)) as (url, _, _):
        reports, rows = run(tmp_path, url, list(arguments), arguments, limit=2)
    settings = EvalSettings(
        tokenizer=with_template(base.tokenizer()),
        samples=2,
        chat=chat,
        stop=end_tokens(base, base.tokenizer()),
    )
    tasks = registry.find(names, Sources(**folders))
    with Predictions(tmp_path / "predictions.jsonl") as predictions:
        scores = list(
            score_tasks(EvalModel(decoder, "m", "m"), tasks, [LENGTH], settings, predictions)
        )
        expected = {
            (task.name.split("/")[1], key): text
            for task in tasks
            for key, text in predictions.of("m", task.name, LENGTH).items()
        }
    assert expected == {
        (row["metadata"]["subset"].rsplit("_", 1)[0], row["metadata"]["id"]): row["model_output"][
            "choices"
        ][0]["message"]["content"]
        for row in rows
    }
    assert len(expected) == 5
    for score in scores:
        (metric,) = reports[score.task.split("/")[0]].metrics
        assert 100 * metric.score == pytest.approx(score.score, abs=0.01)  # it rounds


def test_a_score_that_is_no_mean_over_rows_is_taken_over_the_subset(
    tiny, folder, tmp_path, monkeypatch
):
    engine, _ = tiny_engine(tiny)
    found = lambda names, sources, field: [
        Task(
            "ruler/vt",
            lambda *args: (Example(str(i), "def", ("x",), 4) for i in range(3)),
            lambda texts, examples: 100.0 / len(texts),
        )
    ]
    monkeypatch.setattr(registry, "find", found)
    arguments = {"ruler": {"extra_params": {"tokenizer_path": tiny, "lengths": [64]}}}
    with running(a_model("base", engine, engine.tokenizer)) as (url, _, _):
        reports, _ = run(tmp_path, url, ["ruler"], arguments)
    (metric,) = reports["ruler"].metrics
    assert metric.score == pytest.approx(1 / 3, abs=1e-4) and metric.num == 3


def test_filters_and_generation_settings_count(tiny, tmp_path, monkeypatch, tokenizer):
    engine = ScriptedEngine(tokenizer, "<think>no</think>yes")
    task = Task(
        "ruler/vt",
        lambda *args: iter([Example("0", "def", ("yes",), 4)]),
        mean(lambda text, example: float(text == example.answers[0])),
    )
    monkeypatch.setattr(registry, "find", lambda names, sources, field: [task])
    extra = {"tokenizer_path": tiny, "lengths": [64]}
    arguments = {
        "ruler": {"extra_params": extra, "filters": {"remove_until": "</think>"}},
    }
    settings = {"max_tokens": 99, "temperature": 0.5, "top_k": 7, "seed": 5}
    with running(a_model("base", engine, tokenizer)) as (url, _, _):
        reports, _ = run(tmp_path, url, ["ruler"], arguments, generation_config=settings)
    (request,) = engine.requests
    assert reports["ruler"].metrics[0].score == 1
    assert request.tokens == 99
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 7, 5)


def test_benchmarks_of_evalscope_read_local_files(tiny, folder, tmp_path, tokenizer):
    tokenizer = with_template(tokenizer)
    needle = {
        "tokenizer_path": tiny,
        "retrieval_question": "What is the best thing to do in Porto?",
        "needles": [NEEDLE],
        "context_lengths_min": 300,
        "context_lengths_max": 300,
        "context_lengths_num_intervals": 1,
        "document_depth_percent_intervals": 2,
    }
    cases = {
        "longbench_v2": ("It is so.\nANSWER: B", {}),
        "general_qa": (
            "in Porto",
            {
                "subset_list": ["towns"],
                "metric_list": ["Rouge"],
                "prompt_template": "{question}",
            },
        ),
        "needle_haystack": (NEEDLE, {"subset_list": ["english"], "extra_params": needle}),
    }
    pytest.importorskip("seaborn")
    for name, (text, more) in cases.items():
        data = folder / ("needle" if name == "needle_haystack" else name)
        arguments = {name: {"local_path": str(data)} | more}
        engine = ScriptedEngine(tokenizer, text)
        with running(a_model("base", engine, tokenizer, longest=2048)) as (url, _, _):
            reports, _ = run(tmp_path / name, url, [name], arguments, judge={"strategy": "rule"})
        assert reports[name].metrics[0].score == 1, name


@pytest.mark.parametrize(
    "name,arguments,reason",
    [
        ("ruler", {}, "name the base that is served as tokenizer_path"),
        ("ruler", {"local_path": "x"}, "there is no 'local_path'; known are extra_params"),
        ("ruler", {"prompt_template": "x"}, "there is no 'prompt_template'"),
        ("ruler", {"extra_params": {"length": 1}}, "there is no 'length'; known are chat"),
        ("ruler", {"subset_list": ["vtt"]}, "subset_list of ruler: there is no task 'ruler/vtt'"),
        ("ruler", {"extra_params": {"lengths": ["4k"]}}, "is not a list of numbers of tokens"),
        ("ruler", {"extra_params": {"chat": 1}}, "chat=1 is not true or false"),
        ("ruler", {"extra_params": {"tokenizer_path": "gone.gguf"}}, "there is no such file"),
        ("longbench", {}, "name the folder of its files as local_path"),
        ("longbench", {"local_path": "gone"}, "local_path=gone: there is no such folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(name, arguments, reason, tiny, tmp_path):
    extra = {} if reason.startswith("name the base") else {"tokenizer_path": tiny}
    arguments = arguments | {"extra_params": extra | arguments.get("extra_params", {})}
    with pytest.raises((ConfigError, DataError), match=reason):
        run(tmp_path, "http://127.0.0.1:9", [name], {name: arguments})


def test_the_refusal_of_the_server_is_one_line_of_the_command(tiny, tmp_path, tokenizer):
    extra = {"tokenizer_path": tiny, "lengths": [LENGTH]}
    arguments = {"ruler": {"subset_list": ["niah_single_1"], "extra_params": extra}}
    model = a_model("base", ScriptedEngine(tokenizer), tokenizer, longest=200)
    with running(model) as (url, _, _):
        command = [
            *(sys.executable, "-m", "lljax.evaluation.evalscope", "eval", "--model=base"),
            *(f"--api-url={url}/v1", "--datasets=ruler", "--limit=1", f"--work-dir={tmp_path}"),
            f"--dataset-args={json.dumps(arguments)}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "maximum context length is 200 tokens" in last
    assert last.startswith("ConfigError: http://127.0.0.1:")
