import importlib.util
from pathlib import Path

import pytest

from lljax.config import default_config, validate
from lljax.errors import ConfigError
from lljax.yaml_config import read

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def good():
    c = default_config()
    c.model.path, c.data.train = "base", ("docs.jsonl",)
    return c


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "from_yaml"], ids=lambda p: p.stem)
def test_every_shipped_config_is_legal(path):
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem, path))
    module.__spec__.loader.exec_module(module)
    validate(module.get_config())


@pytest.mark.parametrize("changes,message", [
    ({"context.schedule": ((10, 64, "shifted"), (5, 128, "full"))}, r"schedule\[1\].*previous ends at step 10"),
    ({"context.schedule": ((10, 64, "shifted"), (20, 32, "full"))}, "do not get shorter"),
    ({"context.schedule": ((10, 64, "s2"),)}, "none of full, shifted, window"),
    ({"context.schedule": ((10, 9000, "full"),)}, "raise context.length"),
    ({"context.group": 7.0, "context.schedule": ((1, 64, "shifted"),)}, "use an even number of tokens such as 8"),
    ({"context.rope.type": "keep", "context.rope.factor": "4"}, "takes no factor"),
    ({"context.rope.factor": "0.5"}, "at least 1"),
    ({"model.init": "random"}, "frozen random base"),
    ({"lora.adapter": "x", "train_type": "full"}, "use train_type='lora'"),
    ({"data.valid_fraction": 0.1, "data.valid": ("v.jsonl",)}, "both hold documents out"),
    ({"data.train": (1,)}, "data.train: 1 is no path"), ({"data.valid": ("",)}, "data.valid: '' is no path"),
    ({"data.max_row_bytes": 0}, "data.max_row_bytes=0: it must be at least 1024"),
    ({"training.eval_every": 5}, "nothing to evaluate"),
    ({"training.eval_tasks": (("needle", 64),)}, "training.eval_tasks=.*nothing to evaluate"),
    ({"training.eval_tasks": ("needle", 64), "data.valid": ("v.jsonl",)}, "'needle' is no pair of a task and a number"),
    ({"training.eval_tasks": (("needle", 64),), "data.valid": ("v.jsonl",), "mesh.sequence": 2}, "use mesh.sequence=1"),
    ({"training.eval_files.squad": "dev.json"}, "training.eval_files.squad='dev.json' and training.eval_tasks=()"),
    ({"optimizer.schedule": "cos"}, "none of linear, cosine, constant"),
    ({"optimizer.name": "sgd"}, "none of adamw, adafactor"),
    ({"optimizer.name": "lion", "optimizer.eps": 1e-6}, "optimizer.eps=1e-06 and.*'lion', which does not read it"),
    ({"optimizer.galore.rank": 8}, "optimizer.galore.rank=8 and.*'adamw', which does not read it"),
    ({"optimizer.name": "galore"}, "set train_type='full'"),
    ({"optimizer.name": "q_galore"}, "optimizer.name='q_galore' and train_type='lora'.*set train_type='full'"),
    ({"optimizer.name": "q_galore", "train_type": "full", "memory.remat": "none"}, "memory.remat='none'.*'q_galore'"),
    ({"optimizer.name": "q_galore", "train_type": "full", "model.quantize": "int8"}, "model.quantize='int8' holds frozen"),
    ({"lora.dropout": 1.0}, "from 0 to below 1"),
    ({"lora.dora": True, "train_type": "full"}, "lora.dora=True.*train_type='full' has none"),
    ({"model.matmul": "fp8", "train_type": "full"}, "model.matmul='fp8'.*train_type='full' has none"),
    ({"lora.init": "loftq"}, "lora.init='loftq'.*model.quantize='none'.*set model.quantize='nf4'"),
    ({"lora.init": "pizza"}, "none of default, pissa"),
    ({"lora.init": "pissa", "lora.adapter": "x"}, "use lora.init='default'"),
    ({"lora.rank_pattern": (("q_proj", 0),)}, "lora.rank_pattern: .*a number of at least 1"),
    ({"lora.alpha_pattern": ("q_proj", 3)}, "lora.alpha_pattern: 'q_proj' is no pair"),
    ({"model.path": ""}, "model.path is empty"),
])
def test_what_cannot_work_is_refused_with_the_way_out(changes, message):
    c = good()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as caught:
        validate(c)
    assert "\n" not in str(caught.value)


def yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text("model: base\ndataset: {train: docs.jsonl}\n" + text)
    return read(str(path))


def test_yaml_stages_end_in_full_attention(tmp_path):
    c = yaml(tmp_path, "train_type: longlora\ncontext_length: 64\nscheduler: {total_steps: 9, type: linear}\n"
                       "context_schedule: [{max_length: 32, steps: 4}, {max_length: 64, steps: 9}]\n")
    assert c.context.schedule == ((4, 32, "shifted"), (9, 64, "full"))
    assert c.lora.also_train == ("embed", "norm") and c.optimizer.schedule == "linear"
    validate(c)


def test_yaml_qlora_is_a_lora_over_a_base_in_nf4(tmp_path):
    c = yaml(tmp_path, "train_type: qlora\nscheduler: {total_steps: 9}\n")
    assert c.model.quantize == "nf4-double" and c.lora.also_train == ()
    validate(c)


@pytest.mark.parametrize("text,message", [
    ("lora_rnak: 3", "did you mean 'lora_rank'"),
    ("scheduler: {warmup: 3}", "did you mean 'warmup_steps'"),
    ("lora_rank: many", "lora_rank='many'"),
    ("scheduler: {total_steps: 5}\ncontext_schedule: [{max_length: 32, steps: 4}]", "make them equal"),
    ("scheduler: {total_steps: [", "not YAML"),
])
def test_bad_yaml_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        yaml(tmp_path, text)
    assert "\n" not in str(caught.value)
