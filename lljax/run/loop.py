"""One run of a process, from its configuration to its last checkpoint.

`train` opens the folder, and a `Run` does the rest: read its methods from the top down.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx

from lljax.config import Config
from lljax.errors import NumericAbort, Stopped
from lljax.models.decoder import Decoder
from lljax.parallel.processes import barrier
from lljax.parallel.sharding import Layout
from lljax.planning import fit
from lljax.run import alarms, inputs, workdirs
from lljax.run.batches import RunBatches
from lljax.run.checkpoint import abstract
from lljax.run.lock import locked
from lljax.run.observer import Observer
from lljax.run.profile import mark_data, mark_step
from lljax.run.signals import StopRequest
from lljax.training.curriculum import Stage
from lljax.training.state import from_items, to_items, without_history


def train(
    config: Config,
    workdir: str | Path,
    *,
    model: Decoder | None = None,
    profile_steps: range | None = None,
    make_eval_hook: Callable | None = None,
    observers: Sequence[Observer] = (),
    devices: Sequence[Any] | None = None,
) -> Decoder:
    """Runs `config` in `workdir`, or resumes the run there; returns the trained model.

    model: a model of this configuration with its values (lljax.prepare_model); None reads the base.
      Its arrays are donated; use the returned model.
    profile_steps: steps to trace, see lljax.run.profile.
    make_eval_hook: lljax.evaluation.eval_hook.make_eval_hook, which `training.eval_tasks` needs.
    observers: called after the default ones, see lljax.run.observer.
    devices: the devices to train on; None for all.

    Raises:
      ConfigError, ModelError, DataError: something that the user gave cannot be used; or another
        run is going on in `workdir`.
      OutOfMemory: a device has too little memory, although the plan did not show it.
      NumericAbort: too many unusable gradients in a row; state saved.
      Stopped: SIGTERM, SIGHUP or Ctrl-C; state saved.
      Exception: an observer failed; state saved.
    """
    return Run(
        config,
        Path(workdir),
        model=model,
        profile_steps=profile_steps,
        make_eval_hook=make_eval_hook,
        observers=observers,
        devices=devices,
    ).train()


class Run(RunBatches):
    """A run in its workdir: `train()` takes it to its end."""

    def train(self) -> Decoder:
        workdirs.make(self.workdir)
        with locked(self.workdir) as self.lock, StopRequest() as self.stop:
            workdirs.check_kinds(self.workdir)
            self.open()
            self.prepare()
            self.restore()
            self.compile()
            self.read_weights()
            self.precompute_reference()
            self.stop.defer(self.checkpoints.newest)
            with (
                self.observers.opened(self.info()),
                self.open_writer(self.stop_if_asked) as self.writer,
            ):
                self.take_steps()
                self.finish()
            self.checkpoints.close()
            barrier()
        return nnx.merge(self.graphdef, self.state.trainable, self.frozen)

    # ---------------------------------------------------------------- steps
    def take_steps(self) -> None:
        # A run may have been stopped between the save of a step and its evaluation.
        self.evaluate_if_due(
            next(stage.length for stage in self.curriculum if self.step <= stage.stop)
        )
        for stage in self.curriculum:
            if self.step < stage.stop:
                self.take_steps_of(stage)

    def take_steps_of(self, stage: Stage) -> None:
        self.batches = self.open_batches(stage)
        if self.progress.get("stage") == stage.number:
            self.batches.set_state(self.progress["state"])
        self.batch = None
        while self.step < stage.stop:
            self.take_step(stage)

    def take_step(self, stage: Stage) -> None:
        waited = 0.0
        if self.batch is None:
            start = time.monotonic()
            with mark_data():
                self.batch = next(self.batches)
            self.batch_metrics = self.batches.metrics
            waited = time.monotonic() - start
        self.progress = {
            "stage": stage.number,
            "state": self.batches.get_state(),
            "rollbacks": self.rollbacks,
        }
        if self.step == stage.start:
            self.state = without_history(self.state)
        self.observers.begin(self.step + 1)
        metrics, speed = self.compute(stage, waited)
        self.observers.step(self.record(stage, metrics, speed))
        if trouble := alarms.trouble(metrics):
            self.observers.say(f"step {self.step}: {trouble}")
            if self.handle_trouble(stage, metrics, trouble):
                return
        self.stop_if_asked()
        self.save_if_due()
        self.evaluate_if_due(stage.length)

    def compute(self, stage: Stage, waited: float) -> tuple[dict, dict]:
        """Takes a step on the batch at hand, and reads the next batch while the device computes.

        waited: seconds that the step waited for its batch, which are part of its time.

        Returns: metrics and speed.
        """
        start = time.monotonic() - waited
        with (
            mark_step(self.step + 1),
            self.explain_out_of_memory(
                f"step {self.step + 1}, stage {stage.label}",
                fit.advice(self.config, self.prepared.spec.layers),
            ),
        ):
            metrics = self.update(stage)
            self.batch = None
            if self.step + 1 < stage.stop and self.batches.reads_ahead:
                waited += self.read_batch(metrics["loss"])
            metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.step += 1
        seconds = time.monotonic() - start
        tokens = self.config.training.rows * self.config.training.accumulate * stage.length
        speed = {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "data_seconds": waited,
        }
        if self.device:
            peak = self.mesh.devices.size * self.device.flops
            speed["mfu"] = self.flops[stage.number] / (seconds * peak)
        return metrics, speed

    def update(self, stage: Stage) -> dict[str, jax.Array]:
        """Starts a step on the device: replaces the state and returns the metrics."""
        assert self.batch is not None, "take_step() reads it"
        program = self.prepared.steps[stage.number]
        batch = self.scored(self.batch, self.config.training.accumulate, program)
        self.state, metrics = program.compile()(self.state, self.frozen, batch)
        return metrics

    def read_batch(self, loss: Any) -> float:
        """Reads the next batch; returns the seconds that the device waited for it.

        If the device is still computing (`loss` is not ready), no time was lost.
        """
        start = time.monotonic()
        with mark_data():
            self.batch = next(self.batches)
        seconds = time.monotonic() - start
        return seconds if loss.is_ready() else 0.0

    def record(self, stage: Stage, metrics: dict, speed: dict) -> dict:
        """The line of metrics.jsonl for a step."""
        rollbacks = [rollback for rollback in self.rollbacks if rollback["to"] == self.step - 1]
        return {
            "step": self.step,
            "stage": stage.number,
            "length": stage.length,
            "attention": stage.pattern.kind,
            "learning_rate": self.learning_rate(self.step - 1),
            **metrics,
            **self.batch_metrics,
            **speed,
            **({"rollbacks": rollbacks} if rollbacks else {}),
        }

    # ---------------------------------------------------------------- after a step
    def handle_trouble(self, stage: Stage, metrics: dict, trouble: str) -> bool:
        """Rolls back after a bad step, or stops the run, as `config.alarm` says; returns whether it
        rolled back.
        """
        alarm, target, earlier_rollbacks = self.config.alarm, None, 0
        if self.rolls_back and metrics["spike"]:
            target = self.checkpoints.rollback_target(stage.start)
            earlier_rollbacks = sum(rollback["to"] == target for rollback in self.rollbacks)
        exhausted = target is not None and earlier_rollbacks >= alarm.max_bad_steps
        if target is not None and not exhausted:
            self.roll_back(stage.start, metrics)
            return True
        if exhausted or alarms.stops(metrics, alarm):
            self.save_and_stop(
                NumericAbort(
                    f"step {self.step}: {trouble}; the state is saved in "
                    f"{self.checkpoints.folder}: the same command goes on after it; a lower "
                    "optimizer.learning_rate or other data take a new --workdir"
                )
            )
        return False

    def roll_back(self, since: int, metrics: dict) -> None:
        """Restores an earlier checkpoint of the stage that began at `since`. The batches that were
        read stay read.
        """
        like = jax.tree.map(abstract, to_items(self.state))
        del self.state  # makes room for the restored one
        with self.explain_out_of_memory(
            f"going back from step {self.step}", "spread it over more devices"
        ):
            target, items = self.checkpoints.roll_back(like, since)
        rollback = {"to": target, "from": self.step}
        rollback |= {name: metrics[name] for name in alarms.SPIKE}
        self.rollbacks = [*self.rollbacks, rollback]
        self.observers.rollback(target)
        self.observers.say(
            f"step {self.step}: back to step {target}, and on with the batches after this one's"
        )
        self.step, self.state = target, from_items(items)
        self.observers.heartbeat(self.step)

    def stop_if_asked(self) -> None:
        """Saves and ends the run if a signal or a failed observer asks for it. Called after every
        step, held-out batch and evaluation example.
        """
        self.observers.heartbeat(self.step)
        self.stop.requested |= self.observers.failure is not None
        if self.stop.agreed():
            stopped = Stopped(
                f"after step {self.step}, state saved: the same command goes on from there"
            )
            self.save_and_stop(self.observers.failure or stopped)

    def save_and_stop(self, error: Exception) -> NoReturn:
        self.save(wait=True)
        self.checkpoints.close()
        raise error

    def save_if_due(self) -> None:
        if self.checkpoints.due(self.step):
            self.save()

    def save(self, wait: bool = False) -> None:
        """Saves the state; `wait` returns when it is on disk."""
        self.lock.check()
        if self.checkpoints.save(
            self.step, to_items(self.state), self.progress, self.identity, wait=wait
        ):
            self.observers.checkpoint(self.step)
        self.observers.heartbeat(self.step)

    # ---------------------------------------------------------------- evaluation and the end
    def evaluate_if_due(self, length: int) -> None:
        every = self.config.training.eval_every
        if (
            every
            and self.step % every == 0
            and 0 < self.step < self.total_steps
            and not workdirs.is_evaluated(self.workdir, self.step)
        ):
            self.evaluate(length)

    def evaluate(self, length: int) -> None:
        """Evaluates on held-out rows of `length` tokens, and on `training.eval_tasks`."""
        with self.explain_out_of_memory(
            f"evaluation of {length:,} tokens after step {self.step}",
            "lower memory.loss_chunk, or spread it over more devices",
        ):
            values = self.held_out_scores(length)
            if self.eval_hook:
                values |= self.eval_hook(
                    nnx.merge(self.graphdef, self.state.trainable, self.frozen),
                    self.step,
                    Layout(self.mesh) if self.mesh.size > 1 else None,
                    self.stop_if_asked,
                )
        if values:
            self.observers.evaluation(self.step, values)
        else:
            self.observers.say(
                f"step {self.step}: no held-out document has a token to predict: there is no "
                "perplexity"
            )

    def held_out_scores(self, length: int) -> dict[str, float]:
        """The objective's scores over the held-out rows, in full attention, such as
        {"loss@4096": 2.1}; empty if there are none, or none has a token to predict.

        If the run is stopped here, it evaluates after resuming.
        """
        if not len(self.documents.valid):
            return {}
        if self.writer is not None:
            return self.writer.evaluate(self.documents.valid, length)
        program, objective = self.prepared.evaluations[length], self.prepared.objective
        totals: dict[str, Any] = {}
        count = 0.0
        for rows in inputs.held_out_batches(
            self.documents.valid,
            self.config,
            length,
            self.mesh,
            self.readings["valid", length],
        ):
            batch = self.scored(rows, 1, program)
            sums, weight = program.compile()(self.state.trainable, self.frozen, batch)
            totals = {name: totals.get(name, 0.0) + np.float64(x) for name, x in sums.items()}
            count += weight.item()
            self.stop_if_asked()
        if not count:
            return {}
        scores = objective.scores({name: total / count for name, total in totals.items()})
        return {f"{name}@{length}": value for name, value in scores.items()}

    def finish(self) -> None:
        evaluates = len(self.documents.valid) or self.eval_hook
        if evaluates and not workdirs.is_evaluated(self.workdir, self.step):
            self.evaluate(self.curriculum[-1].length)
        self.save(wait=True)
        if self.observers.failure:
            raise self.observers.failure
