"""Which batch does a step get? Packed documents, or answers that the model writes; with the
log-probabilities that the objective compares with.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import cast

import jax
import numpy as np
from flax import nnx

from lljax.data.batch import Batch
from lljax.data.kinds import KINDS
from lljax.errors import counted
from lljax.interop.open import end_tokens
from lljax.objectives.objective import OLD, REFERENCE
from lljax.parallel.sharding import Layout, batch_sharding, unzigzag
from lljax.run import inputs, reference, rollouts
from lljax.run.answer_writer import AnswerWriter, open_rewards
from lljax.run.setup import Setup
from lljax.training.curriculum import Stage
from lljax.training.placement import place
from lljax.training.prepare import Program


class RunBatches(Setup):
    """A run's batches, after `Setup`.

    precompute_reference sets `readings`: how the documents of every stage and evaluation are read,
      by ("train", number of the stage) and ("valid", length).
    writer: what writes answers, within `open_writer`; None for an objective that reads them.
    """

    writer: AnswerWriter | None
    readings: dict[tuple[str, int], inputs.Reading]

    def precompute_reference(self) -> None:
        """Sets `readings`. If the reference's log-probabilities are kept with the tokens, computes
        them and gives up the reference's leaves.
        """
        objective, steps = self.prepared.objective, self.prepared.steps
        places = [("train", stage.number, steps[stage.number]) for stage in self.curriculum]
        places += [("valid", n, program) for n, program in self.prepared.evaluations.items()]
        self.readings = {(part, number): inputs.reading_of(objective) for part, number, _ in places}
        if self.reference is None or self.prepared.keeps_reference:
            return
        kind = KINDS[objective.kind]
        for part, number, program in places:
            if part == "train" and self.step >= self.curriculum[number].stop:
                continue
            train = part == "train"
            overlong = self.config.data.overlong if train else kind.overlong[0]
            passes = self.config.training.accumulate if train else 1
            store = self.documents.train if train else self.documents.valid
            values = reference.precomputed(
                self.workdir / "reference" / f"{part}-{number}.npz",
                kind.pieces(store, program.length, overlong),
                objective,
                rows=passes * self.config.training.rows,
                T=program.length,
                identity=self.reference_identity(program),
                score=functools.partial(self.reference_scores, passes=passes, program=program),
                progress=inputs.progress,
            )
            with_reference = reference.with_reference(kind, values)
            self.readings[part, number] = inputs.Reading(
                with_reference, (*objective.fields, reference.FIELD)
            )
        self.reference = None

    def reference_identity(self, program: Program) -> str:
        """A digest of what the reference's log-probabilities in rows of `program` depend on. A
        longer schedule changes none of it.
        """
        run = {name: x for name, x in self.identity.items() if name != "context.schedule"}
        content = json.dumps([run, program.length, repr(program.pattern)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def reference_scores(
        self, batch: dict[str, np.ndarray], *, passes: int, program: Program
    ) -> np.ndarray:
        """The reference's log-probabilities of a batch [rows, T]."""
        scores = np.asarray(cast(dict, self.scored(batch, passes, program))[REFERENCE])
        if program.layout is not None and program.layout.zigzag:
            scores = unzigzag(scores, self.mesh.shape["sequence"])
        return scores.reshape(-1, scores.shape[-1])

    def open_batches(self, stage: Stage) -> inputs.Batches:
        store, objective = self.documents.train, self.prepared.objective
        if self.writer is None:
            reading = self.readings["train", stage.number]
            return inputs.open_batches(store, self.config, stage, self.mesh, reading)
        program = self.prepared.steps[stage.number]
        sharding = batch_sharding(self.mesh, 3)

        def score(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            placed = self.scored(batch, self.config.training.accumulate, program)
            return {name: cast(dict, placed)[name] for name in self.prepared.scored}

        batches = rollouts.Rollouts(
            self.writer,
            store,
            stage,
            objective,
            self.workdir,
            score,
            restore=lambda x: jax.device_put(x, sharding),
        )
        if batches.left_out:
            self.observers.say(
                f"stage {stage.label}: {counted(batches.left_out, 'prompt')} of {len(store):,} "
                "leave no room for their answers in the rows of a step, and are not used"
            )
        return batches

    @contextlib.contextmanager
    def open_writer(self, look: Callable[[], None]) -> Iterator[AnswerWriter | None]:
        """What writes and judges the answers of an objective that trains on its own. look: see
        `AnswerWriter`.
        """
        if not self.prepared.objective.samples:
            yield None
            return
        for stage in self.curriculum:
            if self.step < stage.stop:  # refused now, not when the stage begins
                rollouts.prompts_of(self.config, self.documents.train, stage)
        with open_rewards(self.config) as rewards:
            yield AnswerWriter(
                config=self.config,
                model=lambda: nnx.merge(self.graphdef, self.state.trainable, self.frozen),
                tokenizer=self.tokenizer,
                stop=end_tokens(self.base, self.tokenizer),
                layout=Layout(self.mesh) if self.mesh.size > 1 else None,
                rewards=rewards,
                look=look,
                say=self.observers.say,
            )

    def scored(self, batch: dict[str, np.ndarray], accumulate: int, program: Program) -> Batch:
        """A batch on the device, with the fields that the objective wants scored: those that it
        does not hold yet.
        """
        held = {name: x for name, x in batch.items() if isinstance(x, jax.Array)}
        unplaced = {name: x for name, x in batch.items() if name not in held}
        placed = cast(dict, place(unplaced, accumulate, self.mesh, program.layout)) | held
        if program.scorer is None:
            return cast(Batch, placed)
        leaves = {REFERENCE: self.reference, OLD: self.state.trainable}
        missing = [name for name in self.prepared.scored if name not in batch]
        if not missing:
            return cast(Batch, placed)
        score = program.scorer.compile()
        return cast(
            Batch, placed | {name: score(leaves[name], self.frozen, placed) for name in missing}
        )
