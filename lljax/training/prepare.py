"""Model, layouts, training step and evaluation, built and compiled in one place, so that a plan
compiles the programs that a run executes. `prepare_step` builds the programs; lljax.run.programs
compiles those of one run and refuses a run that does not fit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lljax.attention.pattern import KINDS, AttentionPattern
from lljax.build import placed_model
from lljax.config import Config
from lljax.data.batch import Batch
from lljax.errors import ConfigError
from lljax.models.decoder import Decoder
from lljax.models.spec import DecoderSpec
from lljax.objectives.objective import Objective
from lljax.parallel.sharding import Layout
from lljax.training import curriculum
from lljax.training.placement import abstract_batch, has_branches, layout_of
from lljax.training.rollout import longest_prompt, lower_rollout
from lljax.training.state import Split, TrainState, split
from lljax.training.step import StepSettings, make_evaluate, make_scorer, make_step, step_settings


@dataclasses.dataclass(eq=False)
class Program:
    """A step of a stage, an evaluation or a part of a rollout, before and after it is compiled.

    label: its name in tables and messages, such as "8,192 shifted".
    reason: why this context-parallel mode was chosen.
    length: tokens of a row.
    batch: abstract arrays [A, B, T]; none of a rollout.
    trains: True for a step, which is called with (state, frozen, batch) and returns (state,
      metrics). False for an evaluation, which is called with (trainable, frozen, batch) and returns
      (sums by name, weight).
    lower: traces the function; no argument needs a value.
    scorer: the program that fills the scored fields of its batch (`Objective.scored`), called with
      (trainable, frozen, batch without them); None if there are none.
    writes: True for a part of a rollout, which lljax.generation.forked calls.
    """

    label: str
    pattern: AttentionPattern
    layout: Layout | None
    reason: str
    length: int
    batch: Batch
    trains: bool
    lower: Callable[[], jax.stages.Lowered] = dataclasses.field(repr=False)
    scorer: "Program | None" = None
    writes: bool = False
    _compiled: jax.stages.Compiled | None = dataclasses.field(default=None, init=False, repr=False)

    def compile(self) -> jax.stages.Compiled:
        """The compiled program; later calls return the same.

        Raises:
          JaxRuntimeError: the compiler refuses the program.
        """
        if self._compiled is None:
            self._compiled = self.lower().compile()
        return self._compiled


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run before its first step.

    state, frozen: abstract if the model is abstract.
    scored: the fields of a batch that `Program.scorer` fills, see `Objective.scored`.
    keeps_reference: whether the reference's leaves stay on the device.
    steps: the step of every stage, by the number of the stage.
    evaluations: in full attention, by the length of their rows.
    rollouts: the programs that write the answers of a stage, for its longest prompt, by the number
      of the stage; empty if the objective does not sample. A run compiles them when it writes.
    """

    spec: DecoderSpec
    objective: Objective
    graphdef: nnx.GraphDef
    state: TrainState
    frozen: nnx.State
    scored: tuple[str, ...]
    keeps_reference: bool
    steps: dict[int, Program]
    evaluations: dict[int, Program]
    rollouts: dict[int, tuple[Program, ...]]


def prepare_step(
    config: Config,
    hf_config: dict,
    mesh: Mesh,
    *,
    model: Decoder | None = None,
    memory: float = math.inf,
    stages: Sequence[curriculum.Stage] | None = None,
    evaluation_lengths: Sequence[int] = (),
) -> Prepared:
    """Prepares the steps of `stages` and the evaluations on rows of `evaluation_lengths`. Nothing
    is compiled before `Program.compile`.

    model: a model of this configuration, abstract or with values; None builds an abstract one.
    memory: bytes per device, used to choose the context-parallel mode.
    stages: None for all stages of the configuration.

    Raises:
      ConfigError: the objective refuses the model, the configuration cannot be laid out on the
        mesh, or a stage leaves no room for prompts beside their answers.
    """
    model = model or placed_model(config, hf_config, mesh)
    if stages is None:
        stages = curriculum.stages(config.context)
    settings = step_settings(config)
    if reason := settings.objective.refuses(config, model.spec):
        raise ConfigError(reason)
    parts = split(config, model, mesh)
    programs = _Programs(
        config=config, mesh=mesh, spec=model.spec, memory=memory, parts=parts, settings=settings
    )
    return Prepared(
        spec=model.spec,
        objective=settings.objective,
        graphdef=parts.graphdef,
        state=parts.state,
        frozen=parts.frozen,
        scored=settings.objective.scored(config),
        keeps_reference=settings.objective.keeps_reference(config),
        steps=programs.steps(stages),
        evaluations=programs.evaluations(evaluation_lengths),
        rollouts=programs.rollouts(stages) if settings.objective.samples else {},
    )


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Builds the programs of one run."""

    config: Config
    mesh: Mesh
    spec: DecoderSpec
    memory: float
    parts: Split
    settings: StepSettings

    def steps(self, stages: Sequence[curriculum.Stage]) -> dict[int, Program]:
        step, state = make_step(self.parts, self.settings), self.parts.state

        def program(stage: curriculum.Stage) -> Program:
            lower = functools.partial(step.lower, state)
            return self._program(stage.label, stage.pattern, stage.length, lower, trains=True)

        return {stage.number: program(stage) for stage in stages}

    def evaluations(self, lengths: Sequence[int]) -> dict[int, Program]:
        if not lengths:
            return {}
        evaluate = make_evaluate(self.parts.graphdef, self.settings)
        trainable = self.parts.state.trainable

        def program(length: int) -> Program:
            pattern = KINDS["full"](self.config.context, length, ())
            lower = functools.partial(evaluate.lower, trainable)
            label = f"evaluation of {length:,}"
            return self._program(label, pattern, length, lower, trains=False)

        return {length: program(length) for length in lengths}

    def rollouts(self, stages: Sequence[curriculum.Stage]) -> dict[int, tuple[Program, ...]]:
        parts, config = self.parts, self.config
        model = nnx.merge(parts.graphdef, parts.state.trainable, parts.frozen)

        def programs(stage: curriculum.Stage) -> tuple[Program, ...]:
            prompt = longest_prompt(config, stage.length)
            # Lowered together, when the first is compiled.
            lowered = functools.cache(lambda: lower_rollout(model, config, self.mesh, prompt))
            return tuple(
                Program(
                    label=f"rollout, {part}, {stage.label}",
                    pattern=KINDS["full"](config.context, stage.length, ()),
                    layout=Layout(self.mesh),
                    reason="answers are written token by token",
                    length=stage.length,
                    batch=cast(Batch, {}),
                    trains=False,
                    writes=True,
                    lower=lambda name=name: lowered()[name],
                )
                for name, part in (("read", "reading"), ("write", "writing"))
            )

        return {stage.number: programs(stage) for stage in stages}

    def _program(
        self, label: str, pattern: AttentionPattern, length: int, lower: Callable, *, trains: bool
    ) -> Program:
        """lower: (frozen, batch, pattern, layout) -> the traced program. trains: see `Program`."""
        objective, config = self.settings.objective, self.config
        layout, reason = layout_of(
            self.mesh,
            config.mesh.context_parallel,
            pattern,
            length,
            self.spec,
            bytes_per=jnp.dtype(config.model.dtype).itemsize,
            memory=self.memory,
            branches=has_branches(objective.fields),
        )
        training, frozen = config.training, self.parts.frozen
        passes = training.accumulate if trains else 1
        shape = passes, training.rows, length, self.mesh
        batch = abstract_batch(*shape, objective.batch_fields(config))
        program = functools.partial(
            Program, pattern=pattern, layout=layout, reason=reason, length=length
        )
        scorer = None
        if objective.scored(config):
            unscored = abstract_batch(*shape, objective.fields)
            score = make_scorer(self.parts.graphdef, self.settings, self.mesh)
            state = self.parts.state
            scorer = program(
                label=f"log-probabilities, {label}",
                batch=unscored,
                trains=False,
                lower=lambda: score.lower(state.trainable, frozen, unscored, pattern, layout),
            )
        return program(
            label=label,
            batch=batch,
            trains=trains,
            lower=lambda: lower(frozen, batch, pattern, layout),
            scorer=scorer,
        )
