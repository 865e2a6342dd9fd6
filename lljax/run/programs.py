"""Prepares and compiles the programs of a run before it reads weights, and refuses a run that
does not fit. The programs themselves are built by lljax.training.prepare.
"""

import logging
import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from lljax.attention.context_parallel import NO_BRANCHES
from lljax.config import Config
from lljax.errors import ConfigError, ModelError
from lljax.models import lora
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.parallel.sharding import token_parts
from lljax.planning import fit
from lljax.run.checkpoint import abstract
from lljax.training.curriculum import Stage
from lljax.training.placement import has_branches
from lljax.training.prepare import Prepared, Program, prepare_step
from lljax.training.rule import finite


def prepare_programs(
    config: Config, hf_config: dict, mesh: Mesh, model: Decoder, curriculum: Sequence[Stage]
) -> Prepared:
    """Every step and evaluation of a run, not compiled yet; logs the layouts of their rows.

    model: abstract or with values. Its arrays are not kept.
    """
    graphdef, state = nnx.split(model)
    prepared = prepare_step(
        config,
        hf_config,
        mesh,
        model=nnx.merge(graphdef, jax.tree.map(abstract, state)),
        memory=fit.capacity(mesh)[0],
        stages=curriculum,
        evaluation_lengths=fit.evaluation_lengths(config, curriculum),
    )
    for program in prepared.steps.values():
        if program.layout is not None:
            mode = program.layout.context_parallel
            logging.info(
                "stage %s: context parallelism %s, %s", program.label, mode, program.reason
            )
        if has_branches(prepared.objective.fields) and _could_stream(program, prepared, config):
            logging.info(
                "stage %s: projections and MLP go by memory.tile=%d, attention by whole rows: %s",
                *(program.label, config.memory.tile, NO_BRANCHES),
            )
    return prepared


def _could_stream(program: Program, prepared: Prepared, config: Config) -> bool:
    """Whether layers go tile by tile in rows without branches."""
    held = program.length // token_parts(program.layout)
    limited = program.pattern.group or program.pattern.window
    windows = any(layer.window for layer in prepared.spec.layers)
    return 0 < config.memory.tile < held and bool(limited or windows)


def compile_programs(
    prepared: Prepared, config: Config, mesh: Mesh, remaining: Sequence[Stage], lengths: list[int]
) -> None:
    """Compiles the steps of the `remaining` stages and the evaluations on rows of `lengths`, and
    logs the memory that they need.

    Raises:
      ConfigError: a program cannot fit.
    """
    needs = [
        need for stage in remaining for need in fit.needs_of(prepared.steps[stage.number], prepared)
    ]
    evaluation_needs = [
        need for length in lengths for need in fit.needs_of(prepared.evaluations[length], prepared)
    ]
    memory, host = fit.capacity(mesh)
    device = mesh.devices.flat[0]
    needs = fit.with_pool(needs, device.platform, host) + evaluation_needs
    if needs:  # none if the run is over
        title = (
            f"{mesh.devices.size} x {device.device_kind}, {memory / fit.GiB:.2f} GiB, and "
            f"{host / fit.GiB:.2f} of the host"
        )
        logging.info(fit.as_text(fit.table(needs, memory, host, title)))
    fit.check(needs, memory, host, config, prepared.spec.layers)


def count_parameters(model: Decoder, config: Config) -> dict[str, int]:
    """The number of parameters, and of trainable ones.

    Raises:
      ConfigError: nothing trains.
    """
    sizes = [
        (math.prod(variable.get_value().shape), lora.is_trainable(path, variable))
        for path, variable in declared(model)
    ]
    trainable = sum(size for size, trains in sizes if trains)
    if not trainable:
        raise ConfigError(
            f"lora.targets={tuple(config.lora.targets)} and "
            f"lora.also_train={tuple(config.lora.also_train)} leave nothing to train: name "
            "modules, such as ('q_proj', 'v_proj')"
        )
    return {"parameters": sum(size for size, _ in sizes), "trainable": trainable}


def check_finite(trainable: nnx.State, source: str) -> None:
    """Refuses to begin with a value that is not finite: no step would be good, and it would be
    saved.

    source: where the values come from, for the message.
    """
    fine = jax.jit(lambda tree: jax.tree.map(finite, tree))(trainable)
    for path, is_finite in jax.tree_util.tree_leaves_with_path(fine):
        if not is_finite:
            raise ModelError(
                f"{source}: {jax.tree_util.keystr(path)} holds values that are not finite: "
                "nothing could be trained from there"
            )
