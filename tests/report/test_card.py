"""The model card says what was trained and measured, and nothing of the machine it was made on."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from lljax.report.card import Export, card_files, replace_path, usage_blocks
from lljax.report.run_files import read_run

SCHEDULE = [[2, 1024, "shifted"], [4, 4096, "full"]]
CONFIG = {
    "model": {"path": "org/base", "dtype": "bfloat16"},
    "context": {"length": 4096, "schedule": SCHEDULE},
    "lora": {"rank": 16, "alpha": 32.0, "targets": ["all-linear"], "also_train": ["embed"]},
    "data": {"train": ["/home/me/secret/texts.jsonl"]},
}
STATISTICS = {
    "train": {
        "documents": 520,
        "tokens": 2_619_989,
        "lengths": {"p50": 2491, "max": 63_995},
        "unread": {"/home/me/secret/texts.jsonl": {}},
    }
}
USAGE = """import peft, transformers
rope = json.load(open('/home/me/out/rope.json'))
model = transformers.AutoModelForCausalLM.from_pretrained('org/base')
# vllm serve org/base --enable-lora --lora-modules adapter=/home/me/out --max-model-len 4096
# Weights are rounded: --dtype=float32 writes them in float32."""


def score(model, task, length, value, samples=100):
    return {"model": model, "task": task, "length": length, "score": value, "samples": samples}


SCORES = [
    score("base", "perplexity", 512, 20.0),
    score("trained", "perplexity", 512, 21.5),
    score("base", "perplexity", 2048, 66.0),
    score("trained", "perplexity", 2048, 18.5),
    score("trained", "needle", 2048, 63.6, samples=11),
    score("trained", "passkey", 2048, None),
]
HEATMAP = {"lengths": [512, 2048], "rows": ["0%", "50%"], "values": [[1, 2], [3, None]]}
EVALUATION = {
    "finding": [{"what": "Perplexity", "before": "66.00", "after": "18.50", "note": "n=5"}],
    "tables": [
        {
            "columns": ["task", "model", "512", "2k"],
            "rows": [["perplexity", "base | a", "20.00", "66.00"]],
            "caption": "Held out in /home/me/secret/texts.jsonl by length.",
        }
    ],
    "charts": [
        HEATMAP | {"kind": "heatmap", "title": f"Needles found: {model}", "samples": [1, 1]}
        for model in ("base", "base, RoPE stretched", "trained")
    ],
    "scores": SCORES,
}


def step(number, **changes):
    length, attention = SCHEDULE[number > 2][1:]
    record = {"step": number, "length": length, "attention": attention, "loss": 3.0 - number / 10}
    return record | {"tokens": 1000.0, "seconds": 60.0, "stage": int(number > 2)} | changes


def run_in(folder, *, config=CONFIG, evaluation=EVALUATION, records=None, run=None):
    folder.mkdir(exist_ok=True)
    records = records or [step(number) for number in range(1, 5)]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = {"base_length": 512, "devices": 8, "device": "TPU v5"} if run is None else run
    for name, content in (
        ("run", run),
        ("data_statistics", STATISTICS),
        ("evaluation", evaluation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return read_run(folder)


def exported(folder, *, files=("adapter_model.safetensors",), record=None, **changes):
    folder.mkdir(exist_ok=True)
    default = {"format": "peft", "usage": USAGE, "written_to": "/home/me/out", "base": "org/base"}
    fields = {"base": "org/base", "base_is_public": True, "license": {"license": "apache-2.0"}}
    return Export(
        folder=folder,
        repo="me/model",
        record={"files": [*files], **default, **(record or {})},
        **fields | changes,
    )


def adapter(folder, **changes):
    folder.mkdir(exist_ok=True)
    config = {"r": 16, "lora_alpha": 32.0, "target_modules": ["q_proj"], "use_dora": False}
    config |= {"use_rslora": False, "rank_pattern": {}, "modules_to_save": ["embed_tokens"]}
    rope = {"rope_type": "yarn", "factor": 8.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "rope.json").write_text(json.dumps({"rope_parameters": rope}))
    return exported(folder, **changes)


def read(files):
    """The card as text and its front matter, which two readers take for the same."""
    text = files["README.md"].decode()
    front = yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0])
    card = ModelCard(text)
    assert card.data.to_dict() == front
    return text, front


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    text, front = read(card_files(adapter(tmp_path / "out"), run_in(tmp_path / "run")))
    assert {name: front[name] for name in front if name not in ("tags", "model-index")} == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }
    assert {"lljax", "long-context", "longlora", "lora", "sft"} <= set(front["tags"])
    results = ModelCardData(**front).eval_results or []
    values = {(r.metric_type, r.dataset_config): r.metric_value for r in results}
    # of the trained model alone, and no score that is missing
    assert values == {
        ("perplexity", "512 tokens"): 21.5,
        ("perplexity", "2048 tokens"): 18.5,
        ("score", "2048 tokens"): 63.6,
    }


def test_the_text_says_what_was_trained_and_measured(tmp_path):
    text, _ = read(card_files(adapter(tmp_path / "out"), run_in(tmp_path / "run")))
    for told in (
        "A LoRA adapter for [org/base](https://huggingface.co/org/base)",
        "| Perplexity | 66.00 | 18.50 | n=5 |",
        "| perplexity | base \\| a | 20.00 | 66.00 |",
        "LoRA of rank 16, alpha 32, on q_proj; embeddings trained whole",
        "512 → 4,096 tokens",
        "YaRN, factor 8",
        "520 documents, 2.62M tokens, from 1 file; median 2,491 tokens, longest 63,995",
        "4,000 tokens in 4 steps of 1 row",
        "8 × TPU v5, 4 min 00 s in steps",
        "| 1 to 2 | 1,024 | shifted sparse (S²-Attn of LongLoRA) |",
        "| 3 to 4 | 4,096 | full |",
        "apache-2.0",
    ):
        assert told in text, told


def test_pictures_are_in_the_card_and_beside_it(tmp_path):
    files = card_files(adapter(tmp_path / "out"), run_in(tmp_path / "run"))
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", files["README.md"].decode())
    assert set(shown) == set(files) - {"README.md"}
    assert set(shown) == {"needles-base.png", "needles-trained.png", "loss.png"}
    assert all(files[name].startswith(b"\x89PNG") for name in shown)
    again = card_files(adapter(tmp_path / "out"), run_in(tmp_path / "run"))
    assert again == files  # so that an unchanged card is known as such


def test_no_path_of_the_machine_is_in_the_card(tmp_path):
    config = CONFIG | {"model": {"path": "/home/me/base"}}
    export = adapter(
        tmp_path / "out",
        base="base",
        base_is_public=False,
        record={"base": "/home/me/base", "usage": USAGE.replace("org/base", "/home/me/base")},
    )
    text, front = read(card_files(export, run_in(tmp_path / "run", config=config)))
    assert "/home" not in text and str(tmp_path) not in text and "secret" not in text
    assert "base_model" not in front and "base_model_relation" not in front
    assert "from_pretrained('base')" in text and "`base` stands for the base model" in text
    assert "Held out in texts.jsonl by length." in text


def test_limits_are_said(tmp_path):
    text, _ = read(card_files(adapter(tmp_path / "out"), run_in(tmp_path / "run")))
    assert "evaluated up to 2,048 tokens, and reads 4,096" in text
    assert "rest on 11 examples" in text
    assert "perplexity at 512 tokens is 21.50, and 20.00 for the base" in text
    assert "ended in" not in text  # full attention, as it should be
    shifted = CONFIG | {"context": {"length": 4096, "schedule": [[4, 4096, "shifted"]]}}
    run = run_in(tmp_path / "run", config=shifted, evaluation={})
    text, front = read(card_files(adapter(tmp_path / "out"), run))
    assert "ended in shifted attention" in text and "It was not evaluated" in text
    assert "model-index" not in front


def test_an_earlier_step_has_neither_later_steps_nor_their_evaluation(tmp_path):
    export = adapter(tmp_path / "out", record={"step": 2})
    text, front = read(card_files(export, run_in(tmp_path / "run")))
    assert "2,000 tokens in 2 steps" in text and "3 to 4" not in text
    assert "model-index" not in front and "18.50" not in text and "It was not evaluated" in text
    newest = adapter(tmp_path / "out", record={"step": 4})
    assert "18.50" in read(card_files(newest, run_in(tmp_path / "run")))[0]


def test_evaluations_during_training_stand_in_for_an_evaluation(tmp_path):
    records = [step(1), {"step": 1, "eval": {"loss@4096": 2.0, "perplexity@4096": 7.389}}]
    run = run_in(tmp_path / "run", evaluation={}, records=records)
    text, _ = read(card_files(adapter(tmp_path / "out"), run))
    assert "7.389" in text and "beyond the held-out documents" in text


@pytest.mark.parametrize(
    "name,trained,library,relation,tag",
    [
        ("model.safetensors", True, "transformers", "finetune", None),
        ("model.safetensors", False, "transformers", "quantized", "gptq"),
        ("model-Q8_0.gguf", True, "gguf", "finetune", "gguf"),
        ("model-Q8_0.gguf", False, "gguf", "quantized", "gguf"),
    ],
)
def test_other_formats(tmp_path, name, trained, library, relation, tag):
    folder = tmp_path / "out"
    folder.mkdir()
    if name == "model.safetensors":
        config = {"max_position_embeddings": 4096}
        config |= {"quantization_config": {"quant_method": tag}} if tag else {}
        (folder / "config.json").write_text(json.dumps(config))
    record = {"format": tag or "merged", "trained": trained}
    run = run_in(tmp_path / "run") if trained else None
    text, front = read(card_files(exported(folder, files=[name], record=record), run))
    assert (front["library_name"], front["base_model_relation"]) == (library, relation)
    assert tag is None or tag in front["tags"]
    assert ("## Training" in text) == trained
    # scores of the weights before they were converted are not the file's
    assert ("model-index" in front) == (trained and tag is None)
    if trained and tag:
        assert "before they were written in this format" in text
    if not trained:
        assert "| method | no training |" in text and "It was not evaluated" in text


@pytest.mark.parametrize("told,method", [(True, "trained with lljax"), (False, "no training")])
def test_without_a_run_the_record_says_whether_it_was_trained(tmp_path, told, method):
    export = exported(tmp_path, files=["model.safetensors"], record={"trained": told})
    text, front = read(card_files(export, None))
    assert f"| method | {method} |" in text
    assert front["base_model_relation"] == ("finetune" if told else "quantized")


def test_commands_are_apart_from_python_and_name_the_downloaded_folder(tmp_path):
    (_, python), (language, shell) = usage_blocks(exported(tmp_path))
    assert "open('model/rope.json')" in python and "vllm" not in python
    assert python.endswith("# Weights are rounded.")
    assert language == "bash" and shell == (
        "vllm serve org/base --enable-lora --lora-modules adapter=model --max-model-len 4096"
    )


@pytest.mark.parametrize(
    "line,changed",
    [
        ("load('a')", "load('new')"),
        ("load('a/b')  # a b", "load('new/b')  # a b"),
        ("load('ab', x='b/a')", "load('ab', x='b/a')"),
        ("# vllm serve a --x a/t", "# vllm serve new --x new/t"),
        ("# serves a model", "# serves a model"),
    ],
)
def test_a_path_is_replaced_where_it_is_a_path(line, changed):
    assert replace_path(line, "a", "new") == changed


@pytest.mark.parametrize("evil", ["a|b", "<script>", "`x`", "line\n# title", "---\nlicense: mit"])
def test_text_of_a_user_is_neither_markup_nor_front_matter(tmp_path, evil):
    config = CONFIG | {"objective": {"name": evil}}
    table = {"columns": [evil], "rows": [[evil]], "caption": evil}
    run = run_in(
        tmp_path / "run",
        config=config,
        evaluation={"tables": [table], "finding": [], "scores": [score("trained", evil, 8, 1.0)]},
        run={"device": evil},
    )
    text, front = read(card_files(adapter(tmp_path / "out"), run))
    assert front["license"] == "apache-2.0" and front["library_name"] == "peft"
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body and "\n# title" not in body
    tables = [line for line in body.splitlines() if line.startswith("| hardware")]
    assert len(tables) == 1 and len(re.findall(r"(?<!\\)\|", tables[0])) == 3


@pytest.mark.parametrize(
    "name,content",
    [
        ("evaluation", "{"),
        ("run", "{"),
        ("config", "{"),
        (
            "config",
            '{"optimizer": {"learning_rate": "fast"}, "context": {"schedule": [["x", 1, 2]]}}',
        ),
        ("data_statistics", '{"train": {"documents": "many", "lengths": [1]}}'),
        ("evaluation", '{"finding": [{}], "tables": [3], "charts": [4], "scores": [5, {}]}'),
    ],
)
def test_damaged_files_cost_their_part(tmp_path, name, content):
    run_in(tmp_path / "run")
    (tmp_path / "run" / f"{name}.json").write_text(content)
    text, _ = read(card_files(adapter(tmp_path / "out"), read_run(tmp_path / "run")))
    assert "## Limits" in text
