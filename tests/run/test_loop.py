"""The whole job on a tiny model: train, stop, resume, export; and the refusals on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import tiny_run_config
from flax import nnx
from run.cases import StopAfter, records, trained_leaves, wait_for_step

import lljax
from lljax.build import build_model, load_base, mesh_of
from lljax.errors import ConfigError, DataError, NumericAbort, Stopped
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.open import open_base
from lljax.run import loop, workdirs
from lljax.run.restore import read_config, restore_run

ROOT = Path(__file__).parents[2]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def finished(tiny, documents, tmp_path_factory):
    """A run of `run_config` to its end: (model, workdir). For reading only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return loop.train(tiny_run_config(tiny, documents), workdir), workdir


@pytest.mark.parametrize(
    "optimizer,stops",
    [
        ("adamw", (5,)),
        pytest.param("adamw", (2, 4, 7), marks=pytest.mark.slow),
        pytest.param("q_galore", (7,), marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_bitwise_an_uninterrupted_run(
    run_config, request, tmp_path, optimizer, stops
):
    if optimizer == "q_galore":
        run_config.train_type, run_config.optimizer.name = "full", optimizer
        run_config.optimizer.galore.update_every = 3
        whole, workdir = loop.train(run_config, tmp_path / "whole"), tmp_path / "whole"
    else:
        whole, workdir = request.getfixturevalue("finished")
    assert [r["length"] for r in records(workdir) if "loss" in r] == [32] * 4 + [64] * 4

    for step in stops:
        with pytest.raises(Stopped, match=f"after step {step}, state saved"):
            loop.train(run_config, tmp_path / "parts", observers=[StopAfter(step)])
    parts = loop.train(run_config, tmp_path / "parts")
    assert_same(trained_leaves(whole), trained_leaves(parts))
    assert records(workdir) == records(tmp_path / "parts")


def test_a_base_that_pissa_changed_is_the_same_when_the_run_goes_on(run_config, tmp_path):
    run_config.lora.init, run_config.lora.dora = "pissa", True
    base = open_base(run_config.model.path)
    first, again = (build_model(run_config, base, mesh_of(run_config.mesh)) for _ in range(2))
    whole = load_base(base, first.spec, "float32")
    assert_same(
        jax.tree.leaves(nnx.as_pure(nnx.state(first))),
        jax.tree.leaves(nnx.as_pure(nnx.state(again))),
    )
    linear, kernel = first.layers[0].self_attn.q_proj, whole.layers[0].self_attn.q_proj.kernel[...]
    assert np.abs(linear.kernel[...] - kernel).max() > 0.01
    together = linear.kernel[...] + linear.lora.scale * linear.lora.a[...] @ linear.lora.b[...]
    np.testing.assert_allclose(together, kernel, atol=1e-5)
    np.testing.assert_allclose(
        linear.lora.magnitude[...], np.linalg.norm(kernel, axis=1), rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("init,dora", [("pissa", False), ("pissa_niter_2", True), ("olora", False)])
def test_runs_of_other_first_factors_resume_bitwise_and_export(run_config, tmp_path, init, dora):
    import transformers

    run_config.lora.init, run_config.lora.dora, run_config.training.neftune_alpha = init, dora, 5.0
    run_config.lora.dropout = 0.1
    whole = loop.train(run_config, tmp_path / "whole")
    with pytest.raises(Stopped):
        loop.train(run_config, tmp_path / "parts", observers=[StopAfter(5)])
    assert_same(trained_leaves(whole), trained_leaves(loop.train(run_config, tmp_path / "parts")))

    _, model, base = restore_run(tmp_path / "parts")
    export_merged(model, base, tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(0, 300, size=(2, 60))
    graphdef, state = nnx.split(whole)
    ours = jax.jit(
        lambda state: (model := nnx.merge(graphdef, state)).logits(
            model(tokens, positions=np.broadcast_to(np.arange(60), (2, 60)))
        )
    )(state)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(
            torch.from_numpy(tokens)
        ).logits
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


def test_accumulation_and_rows_are_the_same_step(run_config, tmp_path):
    """8 rows at once, and 2 devices' worth of 8 in turn, over another mesh: the same mean over the
    same tokens.
    """
    run_config.context.schedule = ((3, 64, "full"),)
    run_config.training.rows, run_config.training.accumulate = 16, 1
    once = loop.train(run_config, tmp_path / "once")
    run_config.training.rows, run_config.training.accumulate = 8, 2
    run_config.mesh.data, run_config.mesh.fsdp = 2, 4
    twice = loop.train(run_config, tmp_path / "twice")
    for x, y in zip(trained_leaves(once), trained_leaves(twice), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-4)


def test_another_run_is_not_resumed_nor_one_on_another_base_opened(
    run_config, train_on_one_device, tmp_path
):
    base, workdir = (
        Path(shutil.copytree(run_config.model.path, tmp_path / "base")),
        tmp_path / "run",
    )
    run_config.model.path, run_config.context.schedule = str(base), ((1, 32, "full"),)
    train_on_one_device(run_config, workdir)
    for field, value in {"lora.rank": 8, "seed": 1, "data.valid_fraction": 0.3}.items():
        changed = run_config.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        with pytest.raises(ConfigError, match="another " + field.removesuffix(".valid_fraction")):
            train_on_one_device(changed, workdir)
    # export goes by this file: it still belongs to the weights
    assert read_config(workdir).lora.rank == run_config.lora.rank

    weights = base / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-3] ^= 1  # of the same shapes, as a later version of the same model has them
    weights.write_bytes(flipped)
    for opens in (lambda: restore_run(workdir), lambda: train_on_one_device(run_config, workdir)):
        with pytest.raises(ConfigError, match="other weights than those this run was started with"):
            opens()
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="another tokenizer"):
        restore_run(workdir)
    (workdir / "config.json").write_text('{"lora": 3}')
    with pytest.raises(ConfigError, match="config.json: not the configuration of a run"):
        restore_run(workdir)


def test_a_finished_run_goes_on_under_a_longer_schedule_and_says_what_changes(
    run_config, train_on_one_device, tmp_path, caplog
):
    run_config.context.schedule, run_config.data.valid_fraction = ((2, 32, "full"),), 0.0
    train_on_one_device(run_config, tmp_path)
    run_config.context.schedule = ((3, 32, "full"),)
    with caplog.at_level("INFO"):
        train_on_one_device(run_config, tmp_path)
    assert "resumed at step 2" in caplog.text and "ends at step 3, and not at 2" in caplog.text
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3] and read_config(
        tmp_path
    ).context.schedule[-1][0] == 3
    run_config.context.schedule = ((2, 32, "full"),)
    with pytest.raises(ConfigError, match="another context.schedule"):
        train_on_one_device(run_config, tmp_path)


@pytest.mark.parametrize(
    "changes,error",
    [
        ({"lora.targets": (), "lora.also_train": ()}, "nothing would train"),
        ({"data.valid_fraction": 1e-9}, "holds none of the 40 documents out"),
    ],
)
def test_a_run_without_effect_is_refused_before_anything_is_computed(
    run_config, tmp_path, changes, error
):
    run_config.update_from_flattened_dict(changes)
    with pytest.raises((ConfigError, DataError), match=error):
        loop.train(run_config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", [*workdirs.FILES, *workdirs.FOLDERS])
def test_a_file_where_a_folder_belongs_and_the_reverse_are_one_line(run_config, tmp_path, name):
    (tmp_path / name).mkdir() if name in workdirs.FILES else (tmp_path / name).touch()
    with pytest.raises(
        ConfigError, match=f"{tmp_path}: {name} is there and is no|is a directory"
    ) as refused:
        loop.train(run_config, tmp_path)
    assert "\n" not in str(refused.value)


class NothingHeldOut(loop.Run):
    def open(self):
        super().open()
        self.config.training.eval_rows = 0


def test_if_no_held_out_token_is_predicted_there_is_no_perplexity(run_config, tmp_path, capfd):
    run_config.context.schedule = ((1, 32, "full"),)
    NothingHeldOut(run_config, tmp_path, devices=jax.devices()[:1]).train()
    assert (
        not [r for r in records(tmp_path) if "eval" in r]
        and "there is no perplexity" in capfd.readouterr().err
    )


def test_a_nan_is_never_applied_and_stops_the_run_in_the_end(
    run_config, train_on_one_device, tmp_path
):
    run_config.optimizer.learning_rate = 1e30
    run_config.optimizer.clip_norm = 1e30
    run_config.alarm.max_bad_steps = 3
    with pytest.raises(NumericAbort, match="state is saved"):
        train_on_one_device(run_config, tmp_path)
    _, model, _ = restore_run(tmp_path)
    assert all(np.isfinite(x).all() for x in trained_leaves(model))


def test_exports_give_our_logits_in_pytorch(finished, tmp_path):
    import peft
    import transformers

    trained, workdir = finished
    _, model, base = restore_run(workdir)
    assert_same(trained_leaves(trained), trained_leaves(model))
    tokens = np.random.default_rng(0).integers(0, 300, size=(2, 100))
    ours = np.asarray(
        model.logits(model(tokens, positions=np.broadcast_to(np.arange(100), (2, 100))))
    )

    def compare(theirs):
        with torch.no_grad():
            np.testing.assert_allclose(
                theirs.eval()(torch.from_numpy(tokens)).logits.numpy(), ours, atol=1e-3
            )

    export_merged(model, base, tmp_path / "merged")
    export_peft(model, base, tmp_path / "peft")
    export_split(model, base, tmp_path / "split")
    load = transformers.AutoModelForCausalLM.from_pretrained
    compare(load(tmp_path / "merged"))
    compare(
        peft.PeftModel.from_pretrained(
            load(tmp_path / "split" / "base"), tmp_path / "split" / "adapter"
        )
    )
    rope = json.loads((tmp_path / "peft" / "rope.json").read_text())
    config = transformers.AutoConfig.from_pretrained(base.path, **rope)
    compare(peft.PeftModel.from_pretrained(load(base.path, config=config), tmp_path / "peft"))


@pytest.mark.slow
def test_full_training_and_the_python_face(
    tiny, documents, run_config, train_on_one_device, tmp_path
):
    run_config.train_type = "full"
    run_config.context.schedule = ((2, 32, "full"),)
    train_on_one_device(run_config, tmp_path / "full")
    model, _ = lljax.prepare_model(tiny)
    model = lljax.prepare_model(
        model,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "use_longlora": True,
            "longlora_sequence_length": 64,
        },
    )
    lljax.train(model, data=documents, workdir=str(tmp_path / "api"), steps=4, training__rows=8)
    assert [r["attention"] for r in records(tmp_path / "api")] == ["shifted"] * 3 + ["full"]


@pytest.mark.slow
def test_weights_of_eight_bits_are_exported_as_they_were_computed_with(run_config, tmp_path):
    import transformers

    run_config.train_type, run_config.optimizer.name, run_config.training.accumulate = (
        "full",
        "q_galore",
        2,
    )
    run_config.context.schedule = ((2, 32, "full"),)
    loop.train(run_config, tmp_path / "run")
    _, model, base = restore_run(tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, 300, size=(2, 60))
    ours = model.logits(model(tokens, positions=np.broadcast_to(np.arange(60), (2, 60))))
    export_merged(model, base, tmp_path / "merged", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(tokens)).logits.numpy(), ours, atol=1e-3)


def command(config, workdir, *overrides):
    return [
        sys.executable,
        "scripts/train.py",
        f"--config={config}",
        f"--workdir={workdir}",
        *overrides,
    ]


@pytest.mark.slow
def test_yaml_trains_and_bad_input_is_one_line(tiny, documents, tmp_path):
    (tmp_path / "base").symlink_to(tiny)
    (tmp_path / "run.yaml").write_text(f"""
model: base
train_type: longlora
context_length: 64
lora_rank: 4
lora_alpha: 8
target_modules: [q_proj, v_proj]
attention_impl: flashattn3
scheduler: {{type: linear, warmup_steps: 1, total_steps: 2}}
context_schedule: [{{max_length: 32, steps: 1}}, {{max_length: 64, steps: 2}}]
dataset: {{train: {documents}, max_length: 64}}
batch_size: 8
dtype: float32
""")

    def run(config, *overrides):
        done = subprocess.run(
            command(config, tmp_path / "run", *overrides), cwd=ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stderr.strip().splitlines()[-1]

    done = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", "--config=run.yaml", "--workdir=a run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "'a run/report.html'" in done.stdout and "lljax export --workdir='a run'" in done.stdout
    assert (tmp_path / "a run" / "report.html").exists()
    # found from any folder
    assert read_config(tmp_path / "a run").model.path == str(tmp_path / "base")
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: x\nlora_rnak: 3\n")
    code, line = run(f"configs/from_yaml.py:{bad}")
    assert code == 2 and "did you mean 'lora_rank'" in line
    code, line = run("configs/quickstart.py", "--config.lora.rnak=3")
    assert code == 2 and "rnak" in line
    code, line = run(
        "configs/quickstart.py",
        "--config.data.train=('/nowhere.jsonl',)",
        "--config.training.rows=8",
    )
    assert code == 3 and "/nowhere.jsonl" in line


@pytest.mark.slow
def test_a_terminated_run_saves_and_exits_with_75_within_ten_seconds(tiny, documents, tmp_path):
    process = subprocess.Popen(
        command(
            "configs/quickstart.py",
            tmp_path / "run",
            f"--config.model.path={tiny}",
            f"--config.data.train=('{documents}',)",
            "--config.training.rows=8",
        ),
        cwd=ROOT,
    )
    wait_for_step(tmp_path / "run", 3, lambda: process.poll() is None)
    process.terminate()
    assert process.wait(timeout=10) == 75
    assert any(int(folder.name) >= 3 for folder in (tmp_path / "run" / "checkpoints").iterdir())
