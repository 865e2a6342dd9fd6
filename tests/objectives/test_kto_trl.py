"""Steps of KTO equal those of TRL's KTOTrainer, and first losses of pairs those of its DPOTrainer:
the same weights, a reference with other weights, the same rows in the same order.
"""

import functools

import jax
import numpy as np
import pytest
from conftest import TEXT, write_base

from lljax.build import build_model
from lljax.config import default_config
from lljax.data.batch import IGNORED
from lljax.data.groups import ANSWERS, branch_positions
from lljax.data.packing import row_of
from lljax.interop.open import open_base
from lljax.objectives.objective import REFERENCE
from lljax.parallel.sharding import make_mesh
from lljax.training.placement import place
from lljax.training.prepare import prepare_step

pytestmark = pytest.mark.slow
pytest.importorskip("trl", reason="no TRL: pip install -e '.[trl]'")

T, ROWS, STEPS = 160, 4, 10
ONE = make_mesh(devices=jax.devices()[:1])
CHOSEN, REJECTED, MISMATCHED = 1, 2, 3  # branches
TRL_NAMES = {"dpo": "sigmoid", "ipo": "ipo", "apo_zero": "apo_zero", "nca_pair": "nca_pair"}
RATE, BETA, WEIGHTS = 3e-3, 0.3, {"desirable_weight": 1.3, "undesirable_weight": 0.7}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the policy and of the reference, in float32."""
    folder = tmp_path_factory.mktemp("bases")
    changes = {"max_position_embeddings": T, "torch_dtype": "float32"}
    return [write_base(folder / str(seed), seed, **changes) for seed in range(2)]


@functools.cache
def texts(count: int) -> list[tuple[str, str, str]]:
    """Prompts, each with two answers, of uneven length."""
    rng, words = np.random.default_rng(0), TEXT.split()

    def words_of(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    return [(words_of(3, 12) + " ", words_of(1, 8), words_of(1, 8)) for _ in range(count)]


# ---------------------------------------------------------------- TRL
def trainer_of(kind, config, rows, bases, folder, **options):
    """A trainer of TRL whose `batches` and `losses` are those of its steps."""
    import datasets
    import transformers

    class Recorded(kind):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.batches.append({name: x.numpy().copy() for name, x in inputs.items()})
            self.losses.append(loss.item())
            return loss

    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to=[],
        save_strategy="no",
        **options,
    )
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in bases
    )
    trainer = Recorded(
        policy,
        reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(bases[0]),
    )
    trainer.batches, trainer.losses = [], []
    return trainer


def split_row(ids, attention, completion) -> tuple[np.ndarray, np.ndarray]:
    """The prompt and the answer in a padded row."""
    ids, completion = ids[attention == 1], completion[attention == 1]
    return ids[completion == 0], ids[completion == 1]


def answers_in(batch, prefix="") -> list[tuple[np.ndarray, np.ndarray]]:
    fields = (batch[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [split_row(*row) for row in zip(*fields, strict=True)]


# ---------------------------------------------------------------- lljax
def group(prompt: np.ndarray, answers: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """A row of a prompt and of its answers, by branch."""
    tokens, targets = [prompt[:-1]], [np.full(len(prompt) - 1, IGNORED)]
    branches = [np.zeros(len(prompt) - 1)]
    for branch, answer in answers.items():
        tokens += [prompt[-1:], answer[:-1]]
        targets.append(answer)
        branches.append(np.full(len(answer), branch))
    parts = {"tokens": tokens, "targets": targets, "branches": branches}
    piece = {name: np.concatenate(x).astype(np.int32) for name, x in parts.items()}
    return row_of(piece | {"positions": branch_positions(piece)}, T, ANSWERS)


def config_of(objective: str, path: str):
    c = default_config()
    c.model.path, c.model.dtype, c.train_type, c.context.rope.type = path, "float32", "full", "keep"
    c.context.length, c.context.schedule = T, ((STEPS, T, "full"),)
    c.training.rows, c.memory.remat, c.mesh.fsdp = ROWS, "none", 1
    c.optimizer.learning_rate, c.optimizer.schedule = RATE, "constant"
    c.optimizer.warmup_steps, c.optimizer.beta2 = 0, 0.999
    c.alarm.spike = "warn"
    c.objective.name, c.objective.reference, c.objective.beta = objective, "precomputed", BETA
    for name, weight in WEIGHTS.items():
        c.objective[name] = weight
    return c


def prepared_of(objective: str, path: str):
    c, base = config_of(objective, path), open_base(path)
    return prepare_step(c, base.config, ONE, model=build_model(c, base, ONE))


def steps_of(objective: str, bases, batches: list[list[dict]]) -> list[dict[str, float]]:
    """The metrics of a step on every batch of rows."""
    policy, reference = (prepared_of(objective, path) for path in bases)
    program, scorer, state = policy.steps[0], reference.steps[0].scorer, policy.state
    records = []
    for rows in batches:
        batch = place(
            {name: np.stack([row[name] for row in rows]) for name in rows[0]}, 1, ONE, None
        )
        scores = scorer.compile()(reference.state.trainable, reference.frozen, batch)
        state, metrics = program.compile()(state, policy.frozen, batch | {REFERENCE: scores})
        records.append({name: float(x) for name, x in metrics.items()})
    return records


# ---------------------------------------------------------------- both
def test_ten_steps_of_kto_equal_trl(bases, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": prompt, "completion": answer, "label": i % 3 != 1}
        for i, (prompt, answer, _) in enumerate(texts(ROWS * STEPS))
    ]
    trainer = trainer_of(KTOTrainer, KTOConfig, rows, bases, tmp_path, **WEIGHTS)
    trainer.train()
    ours = []
    for batch in trainer.batches:
        pairs = zip(answers_in(batch), answers_in(batch, "KL_"), batch["label"], strict=True)
        ours.append(
            [
                group(prompt, {CHOSEN if good else REJECTED: answer, MISMATCHED: other})
                for (prompt, answer), (_, other), good in pairs
            ]
        )
    records, logs = steps_of("kto", bases, ours), trainer.state.log_history[:STEPS]
    assert len(records) == STEPS
    losses = [record["loss"] for record in records]
    np.testing.assert_allclose(losses, trainer.losses, rtol=1e-4)
    (untrained,) = steps_of("kto", bases, ours[-1:])
    assert abs(untrained["loss"] - losses[-1]) > 1e-2, "the updates before it do not matter"
    assert sum(log["kl"] > 0.1 for log in logs) > STEPS // 3
    for name in ("kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
        wanted = [log[name] for log in logs]
        np.testing.assert_allclose(
            [r[name] for r in records], wanted, rtol=1e-3, atol=1e-3, err_msg=name
        )


@pytest.fixture(scope="module")
def pairs_of_trl(bases, tmp_path_factory):
    """A trainer of pairs that has taken no step, and its first batch."""
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in texts(ROWS)
    ]
    folder = tmp_path_factory.mktemp("pairs")
    trainer = trainer_of(DPOTrainer, DPOConfig, rows, bases, folder)
    return trainer, next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("name", TRL_NAMES)
def test_the_first_loss_of_pairs_equals_trl(pairs_of_trl, bases, name):
    trainer, batch = pairs_of_trl
    trainer.loss_types = [TRL_NAMES[name]]
    wanted = trainer.compute_loss(trainer.model, batch).item()
    answers = answers_in({field: x.numpy() for field, x in batch.items()})
    rows = [
        group(prompt, {CHOSEN: chosen, REJECTED: rejected})
        for (prompt, chosen), (_, rejected) in zip(answers[:ROWS], answers[ROWS:], strict=True)
    ]
    (record,) = steps_of(name, bases, [rows])
    assert record["loss"] == pytest.approx(wanted, rel=1e-5)
    assert record["pairs"] == ROWS
