"""Objectives on rows that share prompts against answers in rows of their own: values and gradients
of the adapter, for a pair, a judged and a policy objective.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.test_context_parallel import reorder
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from models.test_decoder import BASE

from lljax.attention.pattern import AttentionPattern
from lljax.config import default_config
from lljax.data.batch import IGNORED
from lljax.data.groups import branch_positions
from lljax.models import lora
from lljax.models.declare import LoraWeight, declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.memory import EVERYTHING
from lljax.objectives.objective import Pass, PassSettings
from lljax.objectives.policy_losses import POLICY_LOSSES, PolicyOptions, Sampled
from lljax.objectives.preference_losses import PAIR_LOSSES, PairOptions, Pairs, kto
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.sharding import ROWS, TOKENS, Layout, make_mesh

V, T = 97, 96
# Tokens of a prompt, and of each of its answers by branch. Rows hold several prompts.
GROUPS = {
    "pairs": [[(21, {1: 5, 2: 9}), (13, {1: 7, 2: 2})], [(40, {1: 3, 2: 12})]],
    "judged": [[(21, {1: 5, 3: 7}), (13, {2: 4, 3: 3})], [(30, {1: 6, 2: 8, 3: 5})]],
    "prompts": [[(21, {1: 5, 2: 9, 3: 1}), (13, {1: 7, 2: 2})], [(40, {1: 3, 2: 12, 3: 4})]],
}
PATTERNS = {
    "full": AttentionPattern(),
    "window": AttentionPattern("window", window=10, anchors=3),
    "shifted": AttentionPattern("shifted", group=24),
}


@dataclasses.dataclass
class Answer:
    """A prompt with one answer. values: of the answer's tokens, by field."""

    group: int
    branch: int
    prompt: np.ndarray
    answer: np.ndarray
    values: dict[str, np.ndarray]


def made(kind: str) -> tuple[dict, list[Answer]]:
    """A batch of packed rows, and its answers."""
    rng, rows, answers, group = np.random.default_rng(0), [], [], 0
    for groups in GROUPS[kind]:
        row = {name: [] for name in ("tokens", "targets", "segments", "branches", "positions")}
        row |= {name: [] for name in ("reference", "old", "advantages")}
        for segment, (n, lengths) in enumerate(groups, 1):
            prompt = rng.integers(1, V, n)
            piece = {"tokens": [*prompt[:-1]], "targets": [IGNORED] * (n - 1)}
            piece |= {"branches": [0] * (n - 1)}
            values = {name: [0.0] * (n - 1) for name in ("reference", "old", "advantages")}
            for branch, length in lengths.items():
                answer = rng.integers(1, V, length)
                own = {name: -rng.exponential(4.0, length) for name in ("reference", "old")}
                own["advantages"] = np.full(length, rng.normal())
                answers.append(Answer(group, branch, prompt, answer, own))
                piece["tokens"] += [prompt[-1], *answer[:-1]]
                piece["targets"] += [*answer]
                piece["branches"] += [branch] * length
                for name in values:
                    values[name] += [*own[name]]
            positions = branch_positions({name: np.asarray(x) for name, x in piece.items()})
            piece |= values | {"positions": positions, "segments": [segment] * len(positions)}
            for name in row:
                row[name] += [*piece[name]]
            group += 1
        rows.append(row)
    padding = {"targets": IGNORED}
    batch = {
        name: jnp.asarray(
            [
                np.pad(row[name], (0, T - len(row[name])), constant_values=padding.get(name, 0))
                for row in rows
            ],
            jnp.float32 if isinstance(rows[0][name][0], float) else jnp.int32,
        )
        for name in rows[0]
    }
    return batch, answers


def build() -> Decoder:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128}
    model = Decoder(spec_from_hf(BASE | sizes))
    lora.attach(model, rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
    initialize(model, 0, deviation=0.2)
    for number, (_, variable) in enumerate(declared(model)):
        if isinstance(variable, LoraWeight):
            shape = variable.get_value().shape
            variable.set_value(jax.random.normal(jax.random.key(number), shape) * 0.1)
    return model


def config_of(name: str):
    c = default_config()
    c.objective.name, c.rollout.answers = name, 3
    if name in POLICY_LOSSES:
        c.objective.kl_beta, c.rollout.updates = 0.04, 2
    return c


def on_packed_rows(name, batch, pattern, layout=None):
    """The loss of the objective divided by its weight, and the gradient of the adapter."""
    objective, c = OBJECTIVES[name], config_of(name)
    settings = PassSettings(
        memory=EVERYTHING,
        loss_chunk=32,
        dtype="float32",
        packed=True,
        neftune_alpha=0.0,
        options=objective.options(c),
    )
    graphdef, trainable, frozen = nnx.split(build(), LoraWeight, ...)

    @jax.jit
    def run(trainable, batch):
        pass_ = Pass(nnx.merge(graphdef, trainable, frozen), settings, pattern, layout)
        return objective.loss(pass_, batch).total / objective.weight(batch)

    return jax.value_and_grad(run)(trainable, batch)


def on_separate_rows(name, answers, pattern):
    """The same from the log-probabilities of every answer in a row of its own, without branches."""
    graphdef, trainable, frozen = nnx.split(build(), LoraWeight, ...)
    tokens = np.zeros((len(answers), T), np.int32)
    for row, a in zip(tokens, answers, strict=True):
        row[: len(a.prompt) + len(a.answer)] = [*a.prompt, *a.answer]

    @jax.jit
    def run(trainable):
        model = nnx.merge(graphdef, trainable, frozen)
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
        hidden = model(jnp.asarray(tokens), positions=positions, pattern=pattern, memory=EVERYTHING)
        logits = model.logits(hidden)
        logs = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(tokens)[:, 1:, None], axis=-1
        )[..., 0]
        policy = [
            logs[i, len(a.prompt) - 1 : len(a.prompt) + len(a.answer) - 1]
            for i, a in enumerate(answers)
        ]
        return LOSSES[OBJECTIVES[name].kind](name, policy, answers)

    return jax.value_and_grad(run)(trainable)


def pair_loss(name, policy, answers):
    def of(branch, values):
        return jnp.stack([v for v, a in zip(values, answers, strict=True) if a.branch == branch])

    sums = [x.sum() for x in policy]
    reference = [a.values["reference"].sum() for a in answers]
    lengths = [float(len(a.answer)) for a in answers]
    columns = [of(branch, values) for values in (sums, reference, lengths) for branch in (1, 2)]
    row = PAIR_LOSSES[name]
    if not row.reference:
        columns[2:4] = [jnp.zeros(3)] * 2
    return row.loss(Pairs(*columns), PairOptions()).mean()


def kto_loss(name, policy, answers):
    ratios = [x.sum() - a.values["reference"].sum() for x, a in zip(policy, answers, strict=True)]
    kl = jnp.stack([r for r, a in zip(ratios, answers, strict=True) if a.branch == 3]).mean()
    judged = [(r, a.branch == 1) for r, a in zip(ratios, answers, strict=True) if a.branch < 3]
    return kto(
        jnp.stack([r for r, _ in judged]), jnp.asarray([good for _, good in judged]), kl, beta=0.1
    ).mean()


def policy_loss(name, policy, answers):
    def joined(field):
        return jnp.concatenate([jnp.asarray(a.values[field], jnp.float32) for a in answers])

    numbers = np.repeat(np.arange(len(answers)), [len(a.answer) for a in answers])
    sampled = Sampled(
        policy=jnp.concatenate(policy),
        old=joined("old"),
        reference=joined("reference"),
        advantage=joined("advantages"),
        answer=jnp.asarray(numbers),
        trained=jnp.ones(len(numbers), bool),
        answers=len(answers),
    )
    row = POLICY_LOSSES[name]
    total = row.total(sampled, PolicyOptions(beta=0.04))
    return total / (len(answers) if row.answers else len(numbers))


LOSSES = {"pairs": pair_loss, "judged": kto_loss, "prompts": policy_loss}


def check(got, wanted):
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(wanted[1]))
    assert largest > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-4),
        got[1],
        wanted[1],
    )


THREE = ("dpo", "kto", "grpo")
OTHERS = [name for name in OBJECTIVES if name not in ("sft", *THREE)]
FAST = [*((name, "full") for name in THREE), ("dpo", "shifted"), ("kto", "window")]
SLOW = [(name, kind) for name in THREE for kind in PATTERNS if (name, kind) not in FAST]
SLOW += [(name, "full") for name in OTHERS]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("name,kind", CASES)
def test_rows_with_shared_prompts_equal_separate_rows(name, kind):
    batch, answers = made(OBJECTIVES[name].kind)
    pattern = PATTERNS[kind]
    check(on_packed_rows(name, batch, pattern), on_separate_rows(name, answers, pattern))


FAST_MODES = [("dpo", "allgather", "window"), ("kto", "ulysses", "full"), ("grpo", "ring", "full")]
MODES = [(mode, "full") for mode in ("allgather", "ulysses", "ring")]
MODES += [("allgather", "window"), ("allgather", "shifted")]
SLOW_MODES = [case for name in THREE for mode in MODES if (case := (name, *mode)) not in FAST_MODES]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name,mode,kind",
    [*FAST_MODES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_MODES)],
)
def test_rows_over_devices_equal_separate_rows(name, mode, kind):
    batch, answers = made(OBJECTIVES[name].kind)
    mesh = make_mesh(sequence=4, devices=jax.devices()[:4])
    layout = Layout(mesh, mode, mode != "ulysses" and kind == "full")
    batch["index"] = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), batch["tokens"].shape)
    if layout.zigzag:
        batch = {field: reorder(x, 4) for field, x in batch.items()}
    sharding = NamedSharding(mesh, PartitionSpec(ROWS, TOKENS))
    batch = {field: jax.device_put(x, sharding) for field, x in batch.items()}
    got = on_packed_rows(name, batch, PATTERNS[kind], layout)
    check(got, on_separate_rows(name, answers, PATTERNS[kind]))
