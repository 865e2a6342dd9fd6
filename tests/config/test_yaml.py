"""The flat YAML: what it means, and what is refused in one line."""

import logging
import re
from pathlib import Path

import pytest

import lljax.config
from lljax.config import FIELDS, validate
from lljax.config.yaml import KERNELS, read
from lljax.errors import ConfigError


def yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text("model: base\ndataset: {train: docs.jsonl}\n" + text)
    return read(str(path))


def test_yaml_stages_end_in_full_attention(tmp_path):
    c = yaml(
        tmp_path,
        "train_type: longlora\ncontext_length: 64\nscheduler: {total_steps: 9, type: linear}\n"
        "context_schedule: [{max_length: 32, steps: 4}, {max_length: 64, steps: 9}]\n",
    )
    assert c.context.schedule == ((4, 32, "shifted"), (9, 64, "full"))
    assert c.lora.also_train == ("embed", "norm") and c.optimizer.schedule == "linear"
    validate(c)


def test_the_readme_has_an_example_that_works_and_every_name(tmp_path):
    readme = Path(lljax.config.__file__).with_name("README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    c = read(str(tmp_path / "run.yaml"))
    validate(c)
    assert c.context.schedule == ((10, 1024, "shifted"), (20, 2048, "full"))
    names = [part for field in FIELDS.values() for part in field.yaml.split(".") if part]
    section = readme[readme.index("# A run in YAML") :]
    assert [name for name in names if not re.search(rf"\b{name}\b", section)] == []


def test_yaml_qlora_is_a_lora_over_a_base_in_nf4(tmp_path):
    c = yaml(tmp_path, "train_type: qlora\nscheduler: {total_steps: 9}\n")
    assert c.model.quantize == "nf4-double" and c.lora.also_train == ()
    validate(c)


@pytest.mark.parametrize(
    "text,message",
    [
        ("lora_rnak: 3", "did you mean 'lora_rank'"),
        ("scheduler: {warmup: 3}", "did you mean 'scheduler.warmup_steps'"),
        ("lr: 3", "did you mean 'learning_rate'"),
        ("num_train_epochs: 3", "did you mean 'scheduler.total_steps'"),
        ("lora_rank: many", "lora_rank='many'"),
        ("lora_rank: 2.0", "lora_rank=2.0 is not a whole number"),
        ("lora_rank: [1, 2]", r"lora_rank=\[1, 2\] is not a whole number"),
        ("train_type: {a: 1}", "train_type={'a': 1} is none of"),
        (
            "attention_impl: [full]\nscheduler: {total_steps: 5}",
            r"attention_impl=\['full'\] is none of",
        ),
        ("learning_rate: .inf", "learning_rate=inf is not a number"),
        ("learning_rate: .nan", "learning_rate=nan is not a number"),
        ("seed: " + "9" * 10_000, "not YAML .*4300 digits"),
        ("seed: 0x" + "f" * 10_000, "seed=<an integer of 40,000 bits>"),
        ("scheduler: {total_steps: [1]}", r"until_step=\[1\] is not a whole number"),
        ("scheduler: [1]", r"scheduler=\[1\] is not a mapping"),
        ("context_schedule: [{max_length: 32}]", "a stage is"),
        ("rope: {type: lnear}", "rope.type='lnear' is none of"),
        ("rope: {factor: 0.5}", "rope.factor=0.5 is not a number from 1"),
        ("sequence_parallel: 0", "sequence_parallel=0 is neither"),
        ("sequence_parallel: some", "sequence_parallel='some' is neither"),
        ("seed: 1\nseed: 2", "run.yaml:4: not YAML .*'seed' is given twice"),
        ("lora_rank: &a [*a]", "lora_rank=.* is not a whole number"),
        ("? [a]\n: 1", "not YAML"),
        ("x: \x01", "not YAML"),
        ("model_path: \xff", "unknown field 'model_path'"),
        ("lora_rank:", "lora_rank=None"),
        (
            "scheduler: {total_steps: 5}\ncontext_schedule: [{max_length: 32, steps: 4}]",
            "make them equal",
        ),
        ("scheduler: {total_steps: [", "not YAML"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        yaml(tmp_path, text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_list_of_lists_of_lists_is_refused_without_writing_it_out(tmp_path):
    lists = ["lora_rank:", "  - &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lists += [f"  - &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(12)]
    with pytest.raises(ConfigError, match="lora_rank=") as caught:
        yaml(tmp_path, "\n".join(lists))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name,content",
    [
        ("no.yaml", None),
        ("bytes.yaml", b"\xff\xfe\xfa"),
        ("list.yaml", b"[1]"),
        ("deep.yaml", b"a: " + b"[" * 500),
    ],
)
def test_what_is_no_yaml_of_a_run_is_one_line(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name) as caught:
        read(str(tmp_path / name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kernel", [*KERNELS, "flashattn3", "FlashAttention-2"])
def test_a_kernels_name_leaves_the_attention_of_the_schedule(tmp_path, kernel, caplog):
    caplog.set_level(logging.INFO)
    stages = (
        "train_type: longlora\ncontext_length: 64\ncontext_schedule: [{max_length: 32, steps: 4}, "
        "{max_length: 64, steps: 9}]\n"
    )
    assert (
        yaml(tmp_path, stages + f"attention_impl: {kernel}").context.schedule
        == yaml(tmp_path, stages).context.schedule
    )
    assert f"attention_impl={kernel}" in caplog.text


def test_yaml_stretches_by_yarn_or_as_it_says(tmp_path):
    usual = yaml(tmp_path, "scheduler: {total_steps: 9}").context.rope
    assert (usual.type, usual.factor) == ("yarn", "auto")
    named = yaml(
        tmp_path, "scheduler: {total_steps: 9}\nrope: {type: linear, factor: 4}"
    ).context.rope
    assert (named.type, named.factor) == ("linear", 4)


@pytest.mark.parametrize(
    "value,sequence,fsdp", [("true", -1, 1), ("false", 1, -1), ("4", 4, -1), ("1", 1, -1)]
)
def test_sequence_parallel_spreads_the_tokens_of_a_row(tmp_path, value, sequence, fsdp):
    c = yaml(tmp_path, f"scheduler: {{total_steps: 9}}\nsequence_parallel: {value}")
    assert (c.mesh.sequence, c.mesh.fsdp) == (sequence, fsdp)
    validate(c)
