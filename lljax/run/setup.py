"""Everything before the first step of a run: inputs, programs, checkpoint, weights."""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lljax.build import fill, mesh_of, move, open_run_base, placed_model, rope_change_warning
from lljax.config import Config, total_steps, validate, with_absolute_paths
from lljax.data.template import with_template
from lljax.errors import ConfigError
from lljax.hardware.chips import of_kind
from lljax.interop.huggingface import checksums
from lljax.interop.open import special_tokens, tokenizer_fingerprint
from lljax.interop.peft import adapter_fingerprint
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.objectives.objective import REFERENCE
from lljax.objectives.table import OBJECTIVES
from lljax.parallel.processes import from_all
from lljax.planning import fit, flops
from lljax.run import inputs, rollouts, workdirs
from lljax.run.checkpoint import Checkpoints, abstract
from lljax.run.identity import check_identity, check_weights, identity_of, lengthens
from lljax.run.observer import Observer, RunInfo
from lljax.run.observers import DEFAULT_OBSERVERS, Observers
from lljax.run.programs import check_finite, compile_programs, count_parameters, prepare_programs
from lljax.training.curriculum import stages
from lljax.training.placement import check_rows
from lljax.training.rule import learning_rate
from lljax.training.state import TrainState, from_items, split, to_items
from lljax.training.step import metrics_of


class Setup:
    """A run up to its first step: `open`, `prepare`, `restore`, `compile`, `read_weights`, in this
    order. The arguments are the arguments of lljax.run.loop.train.

    Every method sets attributes that later ones and lljax.run.loop.Run read:
      open: mesh, base, tokenizer, fingerprints, eval_hook, documents, curriculum, statistics.
      prepare: model, prepared, learning_rate, counts, device_kind, device, flops.
      restore: identity, rolls_back, checkpoints, saved, restored, step, progress, rollbacks.
      read_weights: graphdef, frozen, state, reference; it gives up model and restored.

    step: optimizer steps done.
    state: the train state after `step` steps.
    reference: the trainable leaves before the first step, if the objective compares with them.
    progress: the position in the data after `step` steps, with the rollbacks so far; the same in
      every process.
    rollbacks: the rollbacks so far, see Observer.step.
    counts: parameters and trainable parameters. device: the chip, None if its peak is not known.
    flops: model FLOPs of a step, by stage. saved: the identity in the newest checkpoint.
    """

    step: int
    state: TrainState
    progress: dict
    rollbacks: list[dict]

    default_observers: Sequence[type[Observer]] = DEFAULT_OBSERVERS

    def __init__(
        self,
        config: Config,
        workdir: Path,
        *,
        model: Decoder | None = None,
        profile_steps: range | None = None,
        make_eval_hook: Callable | None = None,
        observers: Sequence[Observer] = (),
        devices: Sequence[Any] | None = None,
    ):
        validate(config)
        self.config, self.workdir = with_absolute_paths(config), workdir
        self.total_steps = total_steps(config)
        if profile_steps and profile_steps[-1] > self.total_steps:
            raise ConfigError(
                f"--profile_steps={profile_steps.start}:{profile_steps.stop}: the run ends after "
                f"step {self.total_steps}"
            )
        self.model, self.given_model = model, model is not None
        self.profile_steps, self.make_eval_hook, self.devices = (
            profile_steps,
            make_eval_hook,
            devices,
        )
        self.observers = Observers(self.default_observers, observers)

    def open(self) -> None:
        """Opens the base, its tokenizer and the documents."""
        config = self.config
        self.mesh = mesh_of(config.mesh, self.devices)
        if config.mesh.sequence == -1 and self.mesh.devices.size == 1:
            logging.info(
                "mesh.sequence=-1: there is one device, and nothing to spread the tokens of a row "
                "over"
            )
        check_rows(config.training.rows, self.mesh)
        _refuse_processes(config)
        self.base = open_run_base(config)
        tokenizer = self.base.tokenizer()
        self.fingerprints = {
            "base": self.base.fingerprint(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "special_tokens": special_tokens(tokenizer),
        }
        if config.lora.adapter:  # its values are the reference of a preference, also after a resume
            self.fingerprints["adapter"] = adapter_fingerprint(config.lora.adapter)
        self.has_chat_template = tokenizer.chat_template is not None
        self.eval_hook = None
        if config.training.eval_tasks:
            assert self.make_eval_hook is not None, "training.eval_tasks needs make_eval_hook"
            self.eval_hook = self.make_eval_hook(config, self.base, tokenizer, self.workdir)
        tokenizer = self.tokenizer = with_template(tokenizer)
        self.documents = inputs.read_documents(
            config,
            self.workdir,
            tokenizer,
            self.fingerprints["tokenizer"],
            self.base.config["vocab_size"],
        )
        markers = inputs.marker_ids(config.context.anchor_markers, tokenizer)
        self.curriculum = stages(config.context, markers)
        self.statistics = inputs.count_documents(self.documents, config, self.curriculum, tokenizer)
        workdirs.check_shared(self.workdir)

    def prepare(self) -> None:
        """Lays out the model, the step of every stage and the evaluations; no values yet."""
        config, mesh = self.config, self.mesh
        if self.model is None:
            self.model = placed_model(config, self.base.config, mesh)
        else:
            move(self.model, mesh)
        self.prepared = prepare_programs(
            config, self.base.config, mesh, self.model, self.curriculum
        )
        if config.lora.adapter and (
            remark := rope_change_warning(self.prepared.spec, self.base, config.lora.adapter)
        ):
            logging.warning("%s", remark)
        self.learning_rate = _learning_rate(config, self.total_steps)
        self.counts = count_parameters(self.model, config)
        self.device_kind = mesh.devices.flat[0].device_kind
        self.device = of_kind(self.device_kind)
        self.flops = [
            flops.of_step(
                self.model,
                config,
                stage,
                parts=mesh.shape["sequence"],
                passes=self.prepared.objective.passes(config),
            ).model
            for stage in self.curriculum
        ]
        logging.info(
            "%s: %s parameters, %s trainable, on %d x %s",
            config.model.path,
            f"{self.counts['parameters']:,}",
            f"{self.counts['trainable']:,}",
            mesh.devices.size,
            self.device_kind,
        )

    def restore(self) -> None:
        """Restores the newest checkpoint, if it belongs to this run, and records the settings."""
        config = self.config
        self.identity = identity_of(config, **self.fingerprints, data=self.documents.fingerprint)
        self.rolls_back = config.alarm.spike == "rollback"
        self.checkpoints = Checkpoints(self.workdir, **config.checkpoint, rollback=self.rolls_back)
        self.step, self.progress, self.rollbacks = 0, {"rollbacks": []}, []
        self.restored: TrainState | None = None
        self.saved = self.checkpoints.identity()
        if self.saved is not None:
            check_identity(self.saved, self.identity, self.checkpoints.newest())
            like = jax.tree.map(abstract, to_items(self.prepared.state))
            with self.explain_out_of_memory(
                "restoring the checkpoint", "spread it over more devices"
            ):
                restored = self.checkpoints.restore(like)
            assert restored is not None, "there is a checkpoint: its identity was read"
            self.step, items, self.progress = restored
            self.restored, self.rollbacks = from_items(items), self.progress["rollbacks"]
            logging.info("resumed at step %d", self.step)
            if lengthens(self.saved["context.schedule"], self.identity["context.schedule"]):
                self.log_longer_schedule(self.saved["context.schedule"][-1][0])
        # Written only after the identity check: the folder may belong to another run, whose files
        # export and evaluation read.
        workdirs.write_json(self.workdir / "config.json", json.loads(config.to_json_best_effort()))
        workdirs.write_json(self.workdir / "run.json", self.run_json())
        workdirs.write_json(self.workdir / "data_statistics.json", self.statistics)

    def run_json(self) -> dict:
        """The content of run.json."""
        return self.counts | {
            "devices": self.mesh.devices.size,
            "device": self.device_kind,
            "chat_template": self.has_chat_template,
            "base_length": spec_from_hf(self.base.config).max_length,
            "headline": self.prepared.objective.headline,
            "counted": self.prepared.objective.counted.name,
            "metrics": {metric.name: metric.title for metric in metrics_of(self.prepared.objective)}
            | (rollouts.titles(self.config) if self.prepared.objective.samples else {}),
        }

    def log_longer_schedule(self, old_end: int) -> None:
        """Logs the effect of a longer schedule on the learning rate of a finished run."""
        logging.info(
            "context.schedule ends at step %d, and not at %d: the learning rate (%s) goes on at "
            "%.3g, where it had come to %.3g",
            self.total_steps,
            old_end,
            self.config.optimizer.schedule,
            self.learning_rate(old_end),
            _learning_rate(self.config, old_end)(old_end),
        )

    def compile(self) -> None:
        """Compiles the steps and evaluations that remain; refuses a run that does not fit."""
        finished = self.step == self.total_steps and workdirs.is_evaluated(self.workdir, self.step)
        remaining = [stage for stage in self.curriculum if self.step < stage.stop]
        # A stage that has just ended may still need its evaluation.
        to_evaluate = [stage for stage in self.curriculum if self.step <= stage.stop]
        compile_programs(
            self.prepared,
            self.config,
            self.mesh,
            remaining,
            [] if finished else fit.evaluation_lengths(self.config, to_evaluate),
        )

    def read_weights(self) -> None:
        """Reads the base into the model; a resumed run keeps its restored state."""
        config, model = self.config, self.model
        assert model is not None, "prepare() builds it"
        if self.given_model:
            weights = checksums(model, self.base)
            parts = split(config, model, self.mesh)
        else:
            with self.explain_out_of_memory("reading the weights", "spread them over more devices"):
                weights = fill(model, config, self.base, self.mesh)
                parts = split(config, model, self.mesh)
        self.identity["weights"] = weights
        check_weights((self.saved or {}).get("weights", {}), weights)
        if any(others != weights for others in from_all(weights)):
            raise ConfigError(
                f"model.path={config.model.path!r} holds other weights for other processes of "
                "this run: copy one folder to all of them"
            )
        self.graphdef, self.frozen = parts.graphdef, parts.frozen
        self.state = self.restored or parts.state
        self.reference = None
        if REFERENCE in self.prepared.scored:  # a step donates its state
            self.reference = jax.tree.map(jnp.copy, parts.state.trainable)
        self.restored = self.model = None  # a resumed run does not keep its first values
        source = config.lora.adapter or config.model.path
        check_finite(
            self.state.trainable,
            f"the checkpoint of step {self.step}" if self.step else source,
        )

    def info(self) -> RunInfo:
        return RunInfo(
            workdir=self.workdir,
            config=self.config,
            step=self.step,
            stages=tuple(
                (stage.stop, work) for stage, work in zip(self.curriculum, self.flops, strict=True)
            ),
            last_checkpoint=self.checkpoints.newest,
            profile_steps=self.profile_steps,
        )

    def explain_out_of_memory(self, action: str, way_out: str) -> contextlib.AbstractContextManager:
        """A context that reports out-of-memory as a one-line error, see lljax.planning.fit."""

        def last_checkpoint() -> int | None:
            self.checkpoints.settle()
            return self.checkpoints.newest()

        return fit.explain_out_of_memory(action, way_out, last_checkpoint)


def _refuse_processes(config: Config) -> None:
    """Raises ConfigError if a run of several processes cannot do what `config` asks for."""
    if jax.process_count() == 1:
        return
    if OBJECTIVES[config.objective.name].samples:
        raise ConfigError(
            f"objective.name={config.objective.name!r}: a run of {jax.process_count()} processes "
            "cannot write answers yet: use one process with all devices of a host"
        )
    if config.objective.reference == "precomputed":
        raise ConfigError(
            f"objective.reference='precomputed' and {jax.process_count()} processes: use "
            "objective.reference='adapter_off'"
        )


def _learning_rate(config: Config, steps: int) -> Callable[[int], float]:
    """(step) -> the learning rate of step + 1 in a schedule of so many `steps`."""
    schedule: Any = learning_rate(config.optimizer, steps)
    return lambda step: float(schedule(step))
