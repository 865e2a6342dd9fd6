"""Model, layouts, training step and evaluation, built and compiled in one place, so that a plan
compiles exactly what a run executes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lljax.attention.pattern import FULL, AttentionPattern
from lljax.build import placed_model
from lljax.data.batch import Batch
from lljax.errors import ConfigError
from lljax.models.spec import DecoderSpec
from lljax.objectives.objective import Objective
from lljax.parallel.sharding import Layout
from lljax.training import curriculum
from lljax.training.placement import abstract_batch, layout_of
from lljax.training.state import TrainState, split
from lljax.training.step import make_evaluate, make_step, step_settings


@dataclasses.dataclass(eq=False)
class Program:
    """A step of a stage, or an evaluation, before and after it is compiled.

    label: for tables and messages, such as "8,192 shifted".
    reason: for the context-parallel mode of the layout.
    length: tokens of a row.
    batch: abstract arrays [A, B, T].
    trains: True for a step, which is called with (state, frozen, batch) and returns (state,
      metrics). False for an evaluation, which is called with (trainable, frozen, batch) and returns
      (sums by name, weight).
    """

    label: str
    pattern: AttentionPattern
    layout: Layout | None
    reason: str
    length: int
    batch: Batch
    trains: bool
    _lower: Callable[[], jax.stages.Lowered] = dataclasses.field(repr=False)
    _compiled: jax.stages.Compiled | None = dataclasses.field(default=None, init=False, repr=False)

    def compile(self) -> jax.stages.Compiled:
        """The compiled program; later calls return the same. Raises what the compiler raises."""
        if self._compiled is None:
            self._compiled = self._lower().compile()
        return self._compiled


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run before its first step. state, frozen: abstract if the model was.

    steps: by the number of the stage. evaluations: by the length of their rows, in full attention.
    """

    spec: DecoderSpec
    objective: Objective
    graphdef: nnx.GraphDef
    state: TrainState
    frozen: nnx.State
    steps: dict[int, Program]
    evaluations: dict[int, Program]


def prepare_step(
    config,
    hf_config: dict,
    mesh: jax.sharding.Mesh,
    *,
    model: nnx.Module | None = None,
    memory: float = math.inf,
    stages: Sequence[curriculum.Stage] | None = None,
    evaluation_lengths: Sequence[int] = (),
) -> Prepared:
    """Prepares the steps of `stages` and the evaluations on rows of `evaluation_lengths`; nothing is
    compiled before `Program.compile`.

    model: of this configuration, abstract or with values; None builds an abstract one.
    memory: bytes of a device, which choose the context-parallel mode.
    stages: None for all stages of the configuration.

    Raises:
      ConfigError: the objective refuses the model, or the configuration cannot be laid out on the
        mesh.
    """
    if model is None:
        model = placed_model(config, hf_config, mesh)
    settings = step_settings(config)
    if reason := settings.objective.refuses(config, model.spec):
        raise ConfigError(reason)
    parts = split(config, model, mesh)
    state, frozen, rows = parts.state, parts.frozen, config.training.rows
    step, evaluate = make_step(parts, settings), make_evaluate(parts.graphdef, settings)

    def program(label: str, pattern: AttentionPattern, length: int, *, trains: bool) -> Program:
        layout, reason = layout_of(
            mesh,
            config.mesh.context_parallel,
            pattern,
            length,
            model.spec,
            bytes_per=jnp.dtype(config.model.dtype).itemsize,
            memory=memory,
        )
        passes = config.training.accumulate if trains else 1
        batch = abstract_batch(passes, rows, length, mesh, settings.objective.fields)
        function, first = (step, state) if trains else (evaluate, state.trainable)
        return Program(
            label=label,
            pattern=pattern,
            layout=layout,
            reason=reason,
            length=length,
            batch=batch,
            trains=trains,
            _lower=lambda: function.lower(first, frozen, batch, pattern, layout),
        )

    return Prepared(
        spec=model.spec,
        objective=settings.objective,
        graphdef=parts.graphdef,
        state=state,
        frozen=frozen,
        steps={
            stage.number: program(stage.label, stage.pattern, stage.length, trains=True)
            for stage in (curriculum.stages(config.context) if stages is None else stages)
        },
        evaluations={
            length: program(f"evaluation of {length:,}", FULL, length, trains=False)
            for length in evaluation_lengths
        },
    )
