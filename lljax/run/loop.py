"""One run from its configuration to its last checkpoint, read from top to bottom."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from lljax.attention.pattern import FULL
from lljax.build import fill, mesh_of, move, open_run_base, placed_model, rope_unlike_the_adapters
from lljax.config import get, total_steps, validate, with_absolute_paths
from lljax.data.files import atomic_write
from lljax.data.loader import eval_batches, make_loader
from lljax.data.statistics import remarks, statistics
from lljax.data.template import turn_ends
from lljax.data.tokens import prepare
from lljax.errors import ConfigError, ModelError, NumericAbort, Stopped, first_line
from lljax.hardware.chips import of_kind
from lljax.interop.huggingface import checksums
from lljax.interop.open import special_tokens, tokenizer_fingerprint
from lljax.models import lora
from lljax.models.declare import declared
from lljax.parallel.processes import first, first_then_others, from_all, wait
from lljax.parallel.sharding import Layout
from lljax.planning import fit, flops
from lljax.report.page import write_report
from lljax.report.records import read_metrics
from lljax.run.checkpoint import Checkpoints, abstract, check_identity, check_weights, lengthens
from lljax.run.lock import Lock, locked
from lljax.run.monitor import Monitor, Unread
from lljax.run.profile import Tracer, waiting_for_data
from lljax.run.signals import StopRequest
from lljax.run.watchdog import Watchdog
from lljax.training.curriculum import Stage, stages
from lljax.training.optimizer import finite, learning_rate
from lljax.training.placement import (
    abstract_batch,
    check_rows,
    layout_of,
    place,
    row_share,
    rows_of_share,
)
from lljax.training.step import (
    from_items,
    make_evaluate,
    step_settings,
    take_apart,
    to_items,
    without_history,
)

# What a resumed run must have in common with its beginning, so that it ends as if it had not been
# interrupted.
IDENTITY = (
    "seed",
    "train_type",
    "model.init",
    "model.dtype",
    "model.matmul",
    "model.quantize",
    "context",
    "lora",
    "data.packing",
    "data.overlong",
    "optimizer",
    "training.rows",
    "training.accumulate",
    "training.neftune_alpha",
    "training.router_aux_loss_coef",
    "alarm.nonfinite",
    "alarm.spike",
    "alarm.spike_z",
    "alarm.history",
    "alarm.max_bad_steps",
)
# what the record of a rollback has of the step that led to it
SPIKE = ("loss", "loss_z", "grad_norm", "z")
FOLDERS = ("checkpoints", "data", "profile", "tensorboard")  # in a workdir, and files
FILES = (
    "lock",
    "config.json",
    "run.json",
    "data_statistics.json",
    "metrics.jsonl",
    "bad_rows.jsonl",
    "eval_predictions.jsonl",
    "report.html",
)


def train(
    config,
    workdir,
    *,
    model: nnx.Module | None = None,
    profile_steps: range | None = None,
    examiner: Callable | None = None,
) -> nnx.Module:
    """Runs `config` in `workdir`, or goes on with what was begun there; returns the trained model.

    model: a model of this configuration that is at hand (lljax.prepare_model); otherwise the base
      is read.
      Its arrays are given away: use the model that is returned.
    profile_steps: steps to trace, see lljax.run.profile.
    examiner: lljax.evaluation.eval_hook.make_eval_hook, which `training.eval_tasks` needs.

    Raises:
      ConfigError, ModelError, DataError: what the user gave cannot be used; another run is going on
        in `workdir`.
      OutOfMemory: a device has too little, where the plan did not show it.
      NumericAbort: too many unusable gradients in a row; state saved.
      Stopped: SIGTERM, SIGHUP or Ctrl-C; state saved.
    """
    validate(config)
    config = with_absolute_paths(config)
    if profile_steps and profile_steps[-1] > total_steps(config):
        raise ConfigError(
            f"--profile_steps={profile_steps.start}:{profile_steps.stop}: the run ends after step "
            f"{total_steps(config)}"
        )
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir}: it cannot be made ({error.strerror.lower()}): name another folder"
        ) from None
    with locked(workdir) as lock, StopRequest() as stop:
        _check_kinds(workdir)
        return _train(config, workdir, model, profile_steps, examiner, lock, stop)


def _train(
    config,
    workdir: Path,
    model,
    profile_steps: range | None,
    examiner,
    lock: Lock,
    stop: StopRequest,
) -> nnx.Module:
    # ---------------------------------------------------------------- base, tokenizer, documents
    mesh = mesh_of(config.mesh)
    if config.mesh.sequence == -1 and mesh.devices.size == 1:
        logging.info(
            "mesh.sequence=-1: there is one device, and nothing to spread the tokens of a row over"
        )
    check_rows(config.training.rows, mesh)
    base = open_run_base(config)
    tokenizer = base.tokenizer()
    tokenizer_id = tokenizer_fingerprint(tokenizer)
    examine = examiner(config, base, tokenizer, workdir) if config.training.eval_tasks else None
    documents = first_then_others(
        lambda: prepare(
            config.data,
            tokenizer,
            base.config["vocab_size"],
            workdir / "data",
            tokenizer_fingerprint=tokenizer_id,
            progress=_progress,
        )
    )
    if documents.bad:
        logging.warning(
            "%d rows could not be used: %s lists them", documents.bad, workdir / "bad_rows.jsonl"
        )
    curriculum = stages(config.context, marker_ids(config.context.anchor_markers, tokenizer))
    counted = statistics(documents, config.data.overlong, [stage.length for stage in curriculum])
    for line in remarks(counted, config.data.overlong):
        logging.warning("%s", line)
    if counted["train"]["conversations"] and not turn_ends(tokenizer):
        logging.warning(
            "the chat template ends replies with no token: only the last reply of a conversation is trained to end"
        )
    if not all(from_all((workdir / "lock").is_file())):
        raise ConfigError(
            f"--workdir={workdir}: not every process sees what the first one writes there: name a folder on a "
            "file system that they share"
        )

    # ---------------------------------------------------------------- model and optimizer, in
    # outline
    at_hand = model is not None
    if at_hand:
        move(model, mesh)
    else:
        model = placed_model(config, base.config, mesh)
    parts, spec = take_apart(config, model, mesh), model.spec
    if config.lora.adapter and (
        remark := rope_unlike_the_adapters(spec, base, config.lora.adapter)
    ):
        logging.warning("%s", remark)
    layouts = [
        layout_of(
            mesh,
            config.mesh.context_parallel,
            stage.pattern,
            stage.length,
            spec,
            **_facts(config, mesh),
        )
        for stage in curriculum
    ]
    for stage, (layout, reason) in zip(curriculum, layouts):
        if layout is not None:
            logging.info(
                "stage %s: context parallelism %s, %s", stage.label, layout.context_parallel, reason
            )
    rate = learning_rate(config.optimizer, total_steps(config))
    sizes = [
        (math.prod(variable.get_value().shape), lora.is_trainable(path, variable))
        for path, variable in declared(model)
    ]
    counts = {
        "parameters": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trains in sizes if trains),
    }
    if not counts["trainable"]:
        raise ConfigError(
            f"lora.targets={tuple(config.lora.targets)} and lora.also_train={tuple(config.lora.also_train)} "
            "leave nothing to train: name modules, such as ('q_proj', 'v_proj')"
        )
    kind = mesh.devices.flat[0].device_kind
    device = of_kind(kind)
    arithmetic = [
        flops.of_step(model, config, stage, parts=mesh.shape["sequence"]).model
        for stage in curriculum
    ]
    logging.info(
        "%s: %s parameters, %s trainable, on %d x %s",
        config.model.path,
        f"{counts['parameters']:,}",
        f"{counts['trainable']:,}",
        mesh.devices.size,
        kind,
    )

    # ---------------------------------------------------------------- resume
    identity = {
        "base": base.fingerprint(),
        "tokenizer": tokenizer_id,
        "data": documents.fingerprint,
        "special_tokens": special_tokens(tokenizer),
        **_flat({field: get(config, field) for field in IDENTITY}),
    }
    rolls_back = config.alarm.spike == "rollback"
    if rolls_back:  # it says how far back
        identity["checkpoint.every_steps"] = config.checkpoint.every_steps
    checkpoints = Checkpoints(
        workdir,
        every_steps=config.checkpoint.every_steps,
        rollback=rolls_back,
        every_minutes=config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
    )
    step, loader_state, state, rollbacks = 0, None, None, []
    if begun := checkpoints.identity():
        check_identity(begun, identity, checkpoints.newest())
        with fit.in_memory(
            "restoring the checkpoint", "spread it over more devices", checkpoints.newest
        ):
            step, items, loader_state = checkpoints.restore(
                jax.tree.map(abstract, to_items(parts.state))
            )
        state, rollbacks = from_items(items), loader_state["rollbacks"]
        logging.info("resumed at step %d", step)
        if lengthens(begun["context.schedule"], identity["context.schedule"]):
            _say_what_changes(
                config.optimizer, begun["context.schedule"][-1][0], total_steps(config)
            )
    # Not before it is known that this is the same run: export and evaluation go by these.
    for name, content in (
        ("config", json.loads(config.to_json_best_effort())),
        ("run", counts | {"devices": mesh.devices.size, "device": kind}),
        ("data_statistics", counted),
    ):
        _write_json(workdir / f"{name}.json", content)

    # ---------------------------------------------------------------- plan, and then weights
    over = step == total_steps(config) and _evaluated(workdir, step)
    programs, evaluations = _compile(
        parts,
        config,
        mesh,
        spec,
        [(stage, layout) for stage, (layout, _) in zip(curriculum, layouts) if step < stage.stop],
        []
        if over
        else fit.evaluation_lengths(config, [stage for stage in curriculum if step <= stage.stop]),
    )
    if at_hand:
        identity["weights"] = checksums(model, base)
    else:
        with fit.in_memory(
            "reading the weights", "spread them over more devices", checkpoints.newest
        ):
            identity["weights"] = fill(model, config, base, mesh)
            parts = take_apart(config, model, mesh)
    check_weights((begun or {}).get("weights", {}), identity["weights"])
    if any(each != identity["weights"] for each in from_all(identity["weights"])):
        raise ConfigError(
            f"model.path={config.model.path!r} holds other weights for other processes of this run: copy one "
            "folder to all of them"
        )
    graphdef, frozen, state = parts.graphdef, parts.frozen, state or parts.state
    _check_finite(
        state.trainable,
        config.lora.adapter or config.model.path if step == 0 else f"the checkpoint of step {step}",
    )
    del model, parts  # a resumed run does not keep its first values

    # ---------------------------------------------------------------- steps
    def save(wait=False):
        lock.check()
        checkpoints.save(step, to_items(state), loader_state, identity, wait=wait)
        watchdog.alive(step)

    def last_checkpoint():
        checkpoints.settle()
        return checkpoints.newest()

    def leave_if_asked():  # after every step, evaluation batch and example
        watchdog.alive(step)
        if stop.agreed():
            save(wait=True)
            checkpoints.close()
            raise Stopped(f"after step {step}, state saved: the same command goes on from there")

    def roll_back(since, metrics):  # the batches that were read stay read
        nonlocal step, state, rollbacks
        like, state = jax.tree.map(abstract, to_items(state)), None
        with fit.in_memory(
            f"going back from step {step}", "spread it over more devices", last_checkpoint
        ):
            back, items = checkpoints.roll_back(like, since)
        rollbacks = [
            *rollbacks,
            {"to": back, "from": step} | {name: metrics[name] for name in SPIKE},
        ]
        monitor.roll_back(back)
        monitor.say(f"step {step}: back to step {back}, and on with the batches after this one's")
        step, state = back, from_items(items)
        watchdog.alive(step)

    def evaluation(length):
        program, layout = evaluations[length]
        with fit.in_memory(
            f"evaluation of {length:,} tokens after step {step}",
            "lower memory.loss_chunk, or spread it over more devices",
            last_checkpoint,
        ):
            values = _evaluate(
                program,
                state.trainable,
                frozen,
                documents.valid,
                config,
                mesh,
                layout,
                length,
                leave_if_asked,
            )
            found = (
                {}
                if values is None
                else {f"loss@{length}": values, f"perplexity@{length}": float(np.exp(values))}
            )
            if examine:
                found |= examine(
                    nnx.merge(graphdef, state.trainable, frozen),
                    step,
                    Layout(mesh) if mesh.size > 1 else None,
                    leave_if_asked,
                )
        if found:
            monitor.evaluation(step, found)
        else:
            monitor.say(
                f"step {step}: no held-out document has a token to predict: there is no perplexity"
            )

    def evaluate_if_due(length):
        if (
            config.training.eval_every
            and step % config.training.eval_every == 0
            and 0 < step < total_steps(config)
            and not _evaluated(workdir, step)
        ):
            evaluation(length)

    stop.defer(checkpoints.newest)
    work = [(stage.stop, each) for stage, each in zip(curriculum, arithmetic)]
    with (
        Monitor(workdir, stages=work, step=step) as monitor,
        Tracer(workdir, profile_steps, step=step) as tracer,
        Watchdog(
            60 * config.alarm.stall_minutes, step=step, last_checkpoint=checkpoints.newest
        ) as watchdog,
    ):
        # A run may have been stopped between the save of a step and its evaluation.
        evaluate_if_due(next(stage.length for stage in curriculum if step <= stage.stop))
        for stage in curriculum:
            if step >= stage.stop:
                continue
            layout, _ = layouts[stage.number]
            loader = _loader(documents.train, config, stage, mesh)
            if loader_state and loader_state["stage"] == stage.number:
                loader.set_state(loader_state["state"])
            batch = next(loader)
            tokens = config.training.rows * config.training.accumulate * stage.length
            while step < stage.stop:
                loader_state = {
                    "stage": stage.number,
                    "state": loader.get_state(),
                    "rollbacks": rollbacks,
                }
                if step == stage.start:
                    state = without_history(state)
                began, waited = time.monotonic(), 0.0
                with (
                    tracer.step(step + 1),
                    fit.in_memory(
                        f"step {step + 1}, stage {stage.label}",
                        fit.advice(config, spec.layers),
                        last_checkpoint,
                    ),
                ):
                    placed = place(batch, config.training.accumulate, mesh, layout)
                    state, metrics = programs[stage.number](state, frozen, placed)
                    if step + 1 < stage.stop:
                        asked = time.monotonic()
                        with waiting_for_data():
                            batch = next(loader)  # read while the device computes
                        # A batch that was there before the device was done delayed nothing.
                        waited = (time.monotonic() - asked) * metrics["loss"].is_ready()
                    metrics = {
                        name: value.item() for name, value in jax.device_get(metrics).items()
                    }
                seconds = time.monotonic() - began
                speed = {
                    "tokens_per_second": tokens / seconds,
                    "seconds": seconds,
                    "data_seconds": waited,
                }
                if device:
                    speed["mfu"] = arithmetic[stage.number] / (
                        seconds * mesh.devices.size * device.flops
                    )
                here = [rollback for rollback in rollbacks if rollback["to"] == step]
                monitor.step(
                    {
                        "step": step + 1,
                        "stage": stage.number,
                        "length": stage.length,
                        "attention": stage.pattern.kind,
                        "learning_rate": float(rate(step)),
                        **metrics,
                        **speed,
                    }
                    | ({"rollbacks": here} if here else {})
                )
                step += 1
                tracer.done(step)
                if trouble := _trouble(metrics):
                    monitor.say(f"step {step}: {trouble}")
                    point = (
                        checkpoints.point(stage.start) if rolls_back and metrics["spike"] else None
                    )
                    often = (
                        sum(each["to"] == point for each in rollbacks) >= config.alarm.max_bad_steps
                    )
                    if point is not None and not often:
                        if step == stage.stop:
                            batch = next(loader)
                        roll_back(stage.start, metrics)
                        continue
                    if often or _stops(metrics, config.alarm):
                        save(wait=True)
                        checkpoints.close()
                        raise NumericAbort(
                            f"step {step}: {trouble}; the state is saved in {checkpoints.folder}: the same "
                            "command goes on after it; a lower optimizer.learning_rate or other data take a "
                            "new --workdir"
                        )
                leave_if_asked()
                if checkpoints.due(step):
                    save()
                evaluate_if_due(stage.length)
                if config.training.report_every and step % config.training.report_every == 0:
                    _report(workdir)

        # ------------------------------------------------------------ the end
        if len(documents.valid) and not _evaluated(workdir, step):
            evaluation(curriculum[-1].length)
        save(wait=True)
    checkpoints.close()
    _report(workdir)
    wait()
    return nnx.merge(graphdef, state.trainable, frozen)


def _compile(parts, config, mesh, spec, remaining: list, lengths: list[int]) -> tuple[dict, dict]:
    """Compiles the steps of the `remaining` (stage, layout) and the evaluations on rows of
    `lengths`: returns the programs by the stage's number, and by length (program, layout). Logs the
    memory that they need and refuses those that cannot fit.
    """
    rows, programs, evaluations, needs, evaluation_needs = config.training.rows, {}, {}, [], []
    for stage, layout in remaining:
        batch = abstract_batch(config.training.accumulate, rows, stage.length, mesh)
        need, programs[stage.number] = fit.compile_step(
            stage.label, parts, batch, stage.pattern, layout
        )
        needs.append(need)
    evaluate = make_evaluate(parts.graphdef, step_settings(config))
    for length in lengths:
        layout, _ = layout_of(
            mesh, config.mesh.context_parallel, FULL, length, spec, **_facts(config, mesh)
        )
        need, program = fit.compile_evaluation(
            f"evaluation of {length:,}",
            evaluate,
            parts,
            abstract_batch(1, rows, length, mesh),
            layout,
        )
        evaluation_needs.append(need)
        evaluations[length] = program, layout
    memory, host = fit.capacity(mesh)
    needs = fit.with_pool(needs, mesh.devices.flat[0].platform, host) + evaluation_needs
    if needs:  # none where the run is over
        logging.info(
            fit.as_text(
                fit.table(
                    needs,
                    memory,
                    host,
                    f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}, "
                    f"{memory / fit.GiB:.2f} GiB, and {host / fit.GiB:.2f} of the host",
                )
            )
        )
    fit.check(needs, memory, host, config, spec.layers)
    return programs, evaluations


def _trouble(metrics: dict) -> str:
    """What is wrong with a step, or an empty text."""
    if metrics["nonfinite"]:
        what = (
            "update"
            if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
            else "gradient"
        )
        return f"the {what} is not finite; skipped ({metrics['bad']} in a row)"
    if metrics["spike"]:
        skipped = f"skipped ({metrics['bad']} in a row)" if metrics["skipped"] else "applied"
        z, what, name = max(
            (metrics["loss_z"], "loss", "loss"), (metrics["z"], "gradient norm", "grad_norm")
        )
        return f"{what} {metrics[name]:.3g} is {z:.1f} deviations above its median; {skipped}"
    return ""


def _stops(metrics: dict, alarm) -> bool:
    return (
        (metrics["nonfinite"] and alarm.nonfinite == "stop")
        or (metrics["spike"] and alarm.spike == "stop")
        or metrics["bad"] >= alarm.max_bad_steps
    )


def _facts(config, mesh) -> dict:
    """What the choice of a context-parallel mode asks of the run and its devices."""
    return {"bytes_per": jnp.dtype(config.model.dtype).itemsize, "memory": fit.capacity(mesh)[0]}


def _evaluate(
    program, trainable, frozen, store, config, mesh, layout, length: int, leave_if_asked
) -> float | None:
    """Mean loss over held-out pieces of `length` tokens, in full attention; None where they have no
    token to predict. A run that leaves evaluates when it resumes.
    """
    total, count = 0.0, 0
    share, shares = row_share(mesh)
    for batch in eval_batches(
        store, length=length, rows=config.training.rows, limit=config.training.eval_rows
    ):
        mine = {name: np.split(x, shares)[share] for name, x in batch.items()}
        loss, tokens = program(trainable, frozen, place(mine, 1, mesh, layout))
        total, count = total + float(loss), count + int(tokens)
        leave_if_asked()
    return total / count if count else None


def _loader(store, config, stage: Stage, mesh):
    rows, accumulate = config.training.rows, config.training.accumulate
    return make_loader(
        store,
        length=stage.length,
        rows=rows * accumulate,
        packing=config.data.packing,
        overlong=config.data.overlong,
        seed=config.seed + stage.number,
        mine=rows_of_share(rows, accumulate, mesh),
    )


def marker_ids(markers, tokenizer) -> tuple[int, ...]:
    """The token ids of `context.anchor_markers`.

    Raises:
      ConfigError: a marker is not exactly one token.
    """
    ids = []
    for marker in markers:
        tokens = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise ConfigError(
                f"context.anchor_markers: {marker!r} is {len(tokens)} tokens of this tokenizer and must "
                "be one; use another marker"
            )
        ids += tokens
    return tuple(ids)


def _evaluated(workdir: Path, step: int) -> bool:
    return from_all(
        any(record["step"] == step and "eval" in record for record in read_metrics(workdir))
    )[0]


def _progress(items, title):
    return track(items, description=title, transient=True, console=Console(file=Unread(sys.stdout)))


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        out |= (
            _flat(value, f"{prefix}{key}.")
            if hasattr(value, "items")
            else {f"{prefix}{key}": value}
        )
    return out


def _write_json(path: Path, content: dict) -> None:
    if first():
        atomic_write(path, json.dumps(content, indent=2))


def _report(workdir: Path) -> None:
    """Writes the report, which no run depends on."""
    if first():
        try:
            write_report(workdir)
        except Exception as error:
            logging.warning(
                "%s: the report could not be written (%s: %s); scripts/report.py tries again",
                workdir,
                type(error).__name__,
                first_line(error),
            )


def _check_kinds(workdir: Path) -> None:
    """Refuses a workdir in which a file stands where a run needs a folder, or the reverse."""
    for names, right, what in ((FOLDERS, Path.is_dir, "folder"), (FILES, Path.is_file, "file")):
        for path in (workdir / name for name in names):
            if path.exists() and not right(path):
                raise ConfigError(
                    f"--workdir={workdir}: {path.name} is there and is no {what}, which a run needs: move it "
                    "away, or name another folder"
                )


def _check_finite(trainable, source: str) -> None:
    """Refuses to begin with a value that is not finite: no step would be good, and it would be
    saved.
    """
    for path, fine in jax.tree_util.tree_leaves_with_path(
        jax.jit(lambda tree: jax.tree.map(finite, tree))(trainable)
    ):
        if not fine:
            raise ModelError(
                f"{source}: {jax.tree_util.keystr(path)} holds values that are not finite: nothing could be "
                "trained from there"
            )


def _say_what_changes(optimizer, old: int, new: int) -> None:
    """What a longer schedule means for a run that was done."""
    was, now = (float(learning_rate(optimizer, steps)(old)) for steps in (old, new))
    logging.info(
        "context.schedule ends at step %d, and not at %d: the learning rate (%s) goes on at %.3g, where it had come "
        "to %.3g",
        new,
        old,
        optimizer.schedule,
        now,
        was,
    )
