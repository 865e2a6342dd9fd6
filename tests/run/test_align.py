"""Runs of preference and policy objectives: from files to checkpoints, metrics and rollouts."""

import json
import math

import numpy as np
import pytest
from run.cases import bits, records, write_answers

from lljax.config import validate
from lljax.data.batch import IGNORED
from lljax.errors import ConfigError
from lljax.interop.export import export_peft
from lljax.objectives.objective import ratio
from lljax.objectives.table import OBJECTIVES
from lljax.report.records import read_metrics
from lljax.run import reference
from lljax.run.checkpoint import Checkpoints
from lljax.run.restore import restore_run
from lljax.run.rollout_rows import Answer, RowPlan, batch_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align")
    write_answers(folder)
    return folder


@pytest.fixture
def config(run_config, folder):
    """config(objective, kind) -> a run of six steps in two stages on one device."""

    def of(objective, kind):
        c = run_config
        c.objective.name, c.data.overlong = objective, "drop"
        c.context.length, c.context.schedule = 96, ((2, 64, "shifted"), (6, 96, "full"))
        c.data.train = (str(folder / f"{kind}.jsonl"),)
        c.training.rows, c.training.accumulate, c.training.eval_rows = 2, 2, 4
        c.checkpoint.every_steps, c.mesh.fsdp = 100, 1
        c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
        if kind == "prompts":
            c.rollout.answers, c.rollout.tokens, c.rollout.updates = 4, 8, 2
            c.rollout.log, c.objective.kl_beta = "texts", 0.04
            c.reward.functions = ((f"{folder / 'reward.py'}:letters", 1.0), ("contains", 0.5))
        return c

    return of


def steps(workdir):
    return [record for record in read_metrics(workdir) if "loss" in record]


def ends_alike(c, train, tmp_path, stops):
    """Trains in one go, and with a stop after each of `stops`; compares checkpoint and metrics."""
    whole = tuple(c.context.schedule)
    train(c, tmp_path / "whole")
    for stop in (*stops, whole[-1][0]):
        c.context.schedule = tuple(
            (min(until, stop), length, kind)
            for i, (until, length, kind) in enumerate(whole)
            if i == 0 or whole[i - 1][0] < stop
        )
        train(c, tmp_path / "parts")
    left, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert left == parts
    whole, parts = (
        [record for record in records(tmp_path / name) if "loss" in record]
        for name in ("whole", "parts")
    )
    assert whole == parts


def newest(workdir):
    from faults.runs import like

    checkpoints = Checkpoints(workdir, every_steps=1, every_minutes=1, keep=1, read_only=True)
    step, items, _ = checkpoints.restore(like(workdir))
    checkpoints.close()
    return step, bits(items)


def test_dpo_starts_at_log_2_and_learns_the_pairs(config, train_on_one_device, tmp_path):
    c = config("dpo", "pairs")
    c.optimizer.learning_rate, c.objective.sft_weight = 3e-3, 0.1
    train_on_one_device(c, tmp_path)
    first, *_, last = steps(tmp_path)
    sft = 0.1 * first["nll_loss"]
    np.testing.assert_allclose(first["loss"], math.log(2) + sft, rtol=1e-6)
    assert first["rewards/margins"] == 0 and last["rewards/margins"] > 0
    (evaluation,) = [r["eval"] for r in read_metrics(tmp_path) if "eval" in r]
    assert {"loss@96", "rewards/accuracies@96", "rewards/margins@96"} <= set(evaluation)
    report = (tmp_path / "report.html").read_text()
    assert "Reward margin of chosen over rejected answers" in report


@pytest.mark.parametrize(
    "objective,kind", [("ipo", "pairs"), pytest.param("kto", "judged", marks=pytest.mark.slow)]
)
def test_precomputed_log_probabilities_are_those_of_the_adapter_off(
    objective, kind, config, train_on_one_device, tmp_path
):
    c = config(objective, kind)
    c.context.schedule = ((4, 96, "full"),)
    train_on_one_device(c, tmp_path / "off")
    c.objective.reference = "precomputed"
    train_on_one_device(c, tmp_path / "kept")
    off, kept = steps(tmp_path / "off"), steps(tmp_path / "kept")
    for name in ("loss", "grad_norm", "rewards/chosen", "logps/rejected"):
        np.testing.assert_allclose(
            [r[name] for r in off], [r[name] for r in kept], rtol=2e-4, atol=1e-5
        )
    evaluations = [
        next(r["eval"]["loss@96"] for r in read_metrics(tmp_path / run) if "eval" in r)
        for run in ("off", "kept")
    ]
    np.testing.assert_allclose(*evaluations, rtol=1e-4)
    assert {path.name for path in (tmp_path / "kept" / "reference").iterdir()} == {
        "train-0.npz",
        "valid-96.npz",
    }


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", "precomputed"])
def test_a_continued_adapter_is_its_own_reference(reference, config, train_on_one_device, tmp_path):
    train_on_one_device(config("dpo", "pairs"), tmp_path / "first")
    export_peft(*restore_run(tmp_path / "first")[1:], tmp_path / "adapter")
    c = config("dpo", "pairs")
    c.lora.adapter = str(tmp_path / "adapter")
    c.objective.reference = reference
    train_on_one_device(c, tmp_path / "second")
    np.testing.assert_allclose(steps(tmp_path / "second")[0]["loss"], math.log(2), rtol=1e-6)


def test_a_policy_run_resumes_bitwise_within_a_rollout(config, train_on_one_device, tmp_path):
    c = config("grpo", "prompts")
    c.data.valid_fraction, c.context.schedule = 0.0, ((3, 64, "full"),)
    ends_alike(c, train_on_one_device, tmp_path, stops=(1,))
    for name in ("whole", "parts"):
        lines = map(json.loads, (tmp_path / name / "rollouts.jsonl").read_text().splitlines())
        lines = list(lines)
        places = [(x["stage"], x["rollout"], x["document"], x["answer"]) for x in lines]
        assert len(places) == len(set(places)) and {x["answer"] for x in lines} == {0, 1, 2, 3}
    first = steps(tmp_path / "whole")[0]
    assert first["kl"] == 0 and first["clip_ratio/region_mean"] == 0 and first["entropy"] > 0
    assert 0 < first["reward"] < 1.5 and first["answers"] == 4 * first["rollout/prompts"]
    assert "Reward of an answer" in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.slow
def test_a_preference_run_resumes_bitwise(config, train_on_one_device, tmp_path):
    ends_alike(config("kto", "judged"), train_on_one_device, tmp_path, stops=(1, 2, 5))


def test_equal_rewards_change_nothing_and_a_broken_reward_is_said(
    config, folder, train_on_one_device, tmp_path, capfd
):
    c = config("dr_grpo", "prompts")
    c.objective.kl_beta, c.rollout.updates = 0.0, 1
    c.context.schedule = ((2, 64, "full"),)
    c.reward.functions = tuple((f"{folder / 'reward.py'}:{n}", 1.0) for n in ("same", "broken"))
    train_on_one_device(c, tmp_path)
    for record in steps(tmp_path):
        assert record["grad_norm"] == 0 and record["loss"] == 0 and record["reward"] == 1
        assert record["frac_reward_zero_std"] == 1
    (evaluation,) = [r["eval"] for r in read_metrics(tmp_path) if "eval" in r]
    assert {"reward@64", "rewards/same@64", "completions/mean_length@64"} <= set(evaluation)
    captured = capfd.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert "reward broken counts as None" in said and "no answer is good enough" in said


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"objective.simpo_gamma": 1.0}, "objective.simpo_gamma=1.0.*'dpo'.*simpo"),
        ({"rollout.answers": 4}, "rollout.answers=4.*'dpo'.*grpo"),
        ({"data.overlong": "split"}, "data.overlong='split'.*'dpo'.*'drop'"),
        ({"data.loss_on": "everything"}, "data.loss_on='everything'.*'dpo'"),
        (
            {"objective.name": "grpo", "mesh.sequence": 2},
            "mesh.sequence=2.*'grpo'.*mesh.tensor",
        ),
        ({"objective.name": "rloo", "objective.delta": 2.0}, "objective.delta=2.0.*'rloo'"),
    ],
)
def test_what_an_objective_does_not_read_is_refused(changes, message, config):
    c = config("dpo", "pairs")
    for name, value in changes.items():
        group, _, field = name.partition(".")
        c[group][field] = value
    with pytest.raises(ConfigError, match=message):
        validate(c)


def test_prompts_that_leave_no_room_are_refused(config, train_on_one_device, tmp_path):
    c = config("grpo", "prompts")
    c.rollout.tokens = 80
    with pytest.raises(ConfigError, match="rollout.tokens=80.*a stage of 64 tokens"):
        train_on_one_device(c, tmp_path)


@pytest.mark.slow
def test_an_adapter_that_changes_is_not_the_reference_of_a_resumed_run(
    config, train_on_one_device, tmp_path
):
    c = config("cpo", "pairs")
    c.data.valid_fraction, c.context.schedule = 0.0, ((1, 64, "full"),)
    train_on_one_device(c, tmp_path / "first")
    adapter = tmp_path / "adapter"
    export_peft(*restore_run(tmp_path / "first")[1:], adapter)
    c.lora.adapter = str(adapter)
    train_on_one_device(c, tmp_path / "second")
    c.context.schedule = ((2, 64, "full"),)
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(ConfigError, match="another adapter"):
        train_on_one_device(c, tmp_path / "second")


def test_kept_log_probabilities_of_another_run_are_computed_again(tmp_path):
    class Pieces(list):
        def counts(self):
            return {}

    pieces = Pieces(
        {"tokens": np.arange(n), "targets": np.arange(n), "branches": np.ones(n, np.int32)}
        for n in (3, 5, 2)
    )
    calls = []

    def score(batch):
        calls.append(batch["tokens"].shape)
        return batch["tokens"] * len(calls) * 1.0

    def values(identity):
        return reference.precomputed(
            tmp_path / "reference" / "train-0.npz",
            pieces,
            OBJECTIVES["dpo"],
            rows=2,
            T=8,
            identity=identity,
            score=score,
            progress=lambda items, title: items,
        ).tolist()

    first = values("one")
    assert first == [0, 1, 2, 0, 1, 2, 3, 4, 0, 2] and calls == [(2, 8), (2, 8)]
    assert values("one") == first and len(calls) == 2
    assert values("other") != first and len(calls) == 4


def test_a_mean_of_nothing_is_no_number():
    assert np.isnan(ratio(np.asarray([0.0, 0.0])))
    assert np.isnan(ratio(np.asarray([3.0, 2.0, 0.0, 0.0])))
    assert ratio(np.asarray([3.0, 2.0, 1.0, 4.0])) == 1.25


@pytest.mark.parametrize("functions", [(), (("nosuch", 1.0),), (("contain?x=1", 1.0),)])
def test_rewards_are_checked_before_anything_is_read(functions, config):
    c = config("grpo", "prompts")
    c.reward.functions = functions
    with pytest.raises(ConfigError, match="reward.functions"):
        validate(c)


# ---------------------------------------------------------------- rows
def test_a_prompt_stands_in_several_rows_only_if_it_must():
    plan = RowPlan(rows=3, T=50, answers=4, longest=6, packing=True)
    assert plan.sizes(27) == [4] and plan.sizes(28) == [2, 2]
    assert plan.sizes(45) == [] and plan.sizes(39) == [2, 2]
    assert plan.add(39) and not plan.add(27 + 1)
    assert [(s.row, s.prompt, list(s.answers)) for s in plan.shares] == [
        (0, 0, [0, 1]),
        (1, 0, [2, 3]),
    ]
    assert plan.add(10) and plan.shares[-1].row == 2 and plan.prompts == 2
    apart = RowPlan(rows=2, T=50, answers=2, longest=6, packing=False)
    assert apart.add(5) and apart.add(5) and not apart.add(5)


def test_the_batch_of_a_rollout_has_every_answer_after_its_prompt():
    prompts = [np.arange(10, 14), np.arange(20, 22)]
    answers = [
        [Answer(np.asarray([1, 2, 3]), 0.5, True), Answer(np.asarray([4]), -0.5, False)],
        [Answer(np.asarray([5, 6]), 1.0, True), Answer(np.asarray([7]), -1.0, True)],
    ]
    plan = RowPlan(rows=1, T=16, answers=2, longest=3, packing=True)
    assert plan.add(4) and not plan.add(9) and plan.add(2)
    batch = batch_of(plan.shares, prompts, answers, rows=1, T=16)
    row = {name: values[0].tolist() for name, values in batch.items()}
    none = IGNORED
    assert row["tokens"] == [10, 11, 12, 13, 1, 2, 13, 20, 21, 5, 21, 0, 0, 0, 0, 0]
    assert row["targets"] == [none] * 3 + [1, 2, 3, none, none, 5, 6, 7] + [none] * 5
    assert row["branches"] == [0, 0, 0, 1, 1, 1, 2, 0, 1, 1, 2, 0, 0, 0, 0, 0]
    assert row["positions"] == [0, 1, 2, 3, 4, 5, 3, 0, 1, 2, 1, 0, 0, 0, 0, 0]
    assert row["segments"] == [1] * 7 + [2] * 4 + [0] * 5
    assert row["advantages"] == [0] * 3 + [0.5] * 3 + [-0.5] + [0, 1, 1, -1] + [0] * 5
