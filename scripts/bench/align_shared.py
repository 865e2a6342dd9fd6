"""One step of a row that shares its prompt against rows that repeat it: FLOPs and time. Run by
align.py.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import common
import jax
import jax.numpy as jnp
import numpy as np
from align_rows import ANSWERS, Group
from products import product_flops

from lljax.attention.blocks import block_pairs
from lljax.attention.blockwise import block_sizes
from lljax.attention.mask import branched, causal, pad
from lljax.build import build_model, mesh_of, placed_model
from lljax.config import Config
from lljax.data.batch import Batch
from lljax.interop.open import open_base
from lljax.objectives.objective import REFERENCE, Loss, Pass
from lljax.objectives.policy import ADVANTAGES
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.rounding import round_up
from lljax.training.placement import place
from lljax.training.prepare import Prepared, prepare_step

REPEATED = "{}, prompts repeated"  # the name of an objective whose rows share nothing


# ---------------------------------------------------------------- rows that share nothing
@dataclasses.dataclass(frozen=True)
class RowsPass(Pass):
    """A pass that reads a batch [1, rows * T] as `rows` rows without branches."""

    rows: int = 1

    def hidden(self, batch: Batch) -> jax.Array:
        names = "tokens", "targets", "segments", "positions", "index"
        fields: dict[str, jax.Array] = {name: batch[name] for name in names}
        rows = {name: x.reshape(self.rows, -1) for name, x in fields.items()}
        hidden = super().hidden(Batch(**rows))
        return hidden.reshape(*fields["tokens"].shape, -1)


@contextmanager
def registered(group: Group) -> Iterator[str]:
    """The name of the group's objective; one that repeats prompts is in the table meanwhile."""
    if group.shared:
        yield group.objective
        return
    plain, name = OBJECTIVES[group.objective], REPEATED.format(group.objective)

    def loss(pass_: Pass, batch: Batch) -> Loss:
        fields = {field.name: getattr(pass_, field.name) for field in dataclasses.fields(pass_)}
        return plain.loss(RowsPass(**fields, rows=group.rows), batch)

    OBJECTIVES[name] = dataclasses.replace(plain, name=name, loss=loss)
    try:
        yield name
    finally:
        del OBJECTIVES[name]


# ---------------------------------------------------------------- shared prompts
def config_of(model: str, group: Group, name: str) -> Config:
    c = common.plan_config(group.row_length * group.rows, "full")
    c.model.path, c.model.dtype, c.mesh.fsdp, c.data.packing = model, "float32", 1, False
    c.context.implementation = "blockwise"  # whose loops `visits` counts
    c.objective.name, c.objective.reference = name, "precomputed"
    c.training.rows, c.rollout.answers, c.lora.also_train = 1, group.answers, ()
    return c


def prepared_of(model: str, group: Group, *, values: bool) -> Prepared:
    """The step of a group. values: whether the model has its values."""
    base = open_base(model)
    with registered(group) as name:
        c = config_of(model, group, name)
        # Costs do not depend on the angles: the base reads rows of any length.
        base.config["max_position_embeddings"] = c.context.length
        mesh = mesh_of(c.mesh, jax.devices()[:1])
        built = build_model(c, base, mesh) if values else placed_model(c, base.config, mesh)
        return prepare_step(c, base.config, mesh, model=built)


def batch_of(group: Group, vocabulary: int) -> dict[str, np.ndarray]:
    """The group's fields with values of the reference, or advantages."""
    fields = group.batch(vocabulary)
    answered = fields["targets"] != common.IGNORED
    advantage = np.linspace(-1, 2, group.answers)[np.maximum(fields["branches"] - 1, 0)]
    name, values = (REFERENCE, -8.0) if group.objective == "dpo" else (ADVANTAGES, advantage)
    return fields | {name: np.where(answered, values, 0).astype(np.float32)}


def visits(group: Group, fields: dict[str, np.ndarray]) -> tuple[int, int]:
    """The blocks of queries of a row, and the pairs of blocks that attention visits in it."""
    T = group.row_length
    rows = {name: jnp.asarray(x.reshape(group.rows, -1)[:1]) for name, x in fields.items()}
    mask = causal(1, T)
    if group.shared:
        mask = causal(1, T, rows["segments"])
        mask = branched(mask, rows["positions"], rows["branches"])
    bq, bk = block_sizes(T, T, mask)
    visited, _ = block_pairs(pad(mask, round_up(T, bq), round_up(T, bk)), bq, bk)
    return visited.shape[1], int(visited.sum())


def flops_of(model: str, group: Group) -> dict[str, float]:
    """FLOPs of a step, and pairs of attention: visible pairs, and pairs of blocks."""
    prepared = prepared_of(model, group, values=False)
    text = prepared.steps[0].compile().as_text()
    assert text is not None, "XLA's CPU compiler gives the text of its program"
    fields = batch_of(group, prepared.spec.V)
    blocks, visited = visits(group, fields)
    # Visited blocks that need a mask have a loop of their own, with the same products: two loops.
    return {
        "tokens": group.rows * group.row_length,
        "flops": product_flops(text, visited / blocks / 2),
        "visible pairs": group.visible_pairs,
        "visited blocks": group.rows * visited,
    }


def taker(model: str, group: Group) -> Callable[[], tuple[float, float]]:
    """Takes a step and returns its loss and the norm of its gradient; the first compiles."""
    prepared = prepared_of(model, group, values=True)
    program, state = prepared.steps[0], prepared.state
    mesh = jax.tree.leaves(state.trainable)[0].sharding.mesh
    batch = place(batch_of(group, prepared.spec.V), 1, mesh, program.layout)

    def take() -> tuple[float, float]:
        nonlocal state
        state, metrics = program.compile()(state, prepared.frozen, batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return take


def seconds_of(model: str, groups: list[Group], rounds: int) -> list[float]:
    """Median seconds of a step of each group, in turns; the first steps must be equal."""
    takers = [taker(model, group) for group in groups]
    first = [take() for take in takers]
    np.testing.assert_allclose(first[1:], first[:-1], rtol=1e-3)
    seen = [[common.timed(take)[1] for take in takers] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*seen, strict=True)]


def shared(model: str, prompt: int, answer: int, rounds: int) -> None:
    """Prints the costs of both layouts, and their ratios."""
    for objective in ANSWERS:
        groups = [Group(objective, prompt, answer, shared) for shared in (True, False)]
        costs = [flops_of(model, group) for group in groups]
        if rounds:
            for cost, seconds in zip(costs, seconds_of(model, groups, rounds), strict=True):
                cost["seconds"] = seconds
        title = f"{objective}: {prompt:,} tokens, {groups[0].answers} answers of {answer:,}"
        table = common.table(("", "shared", "repeated", "ratio"), left=("",), title=title)
        for name in costs[0]:
            one, other = (cost[name] for cost in costs)
            table.add_row(name, f"{one:,.6g}", f"{other:,.6g}", f"{one / other:.3f}")
        common.show(table)
