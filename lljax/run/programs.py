"""Compiles the programs of a run before it reads weights, and refuses what cannot fit."""

import logging
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lljax.attention.pattern import FULL
from lljax.config import Config
from lljax.errors import ConfigError
from lljax.models import lora
from lljax.models.declare import declared
from lljax.parallel.sharding import Layout
from lljax.planning import fit
from lljax.training.curriculum import Stage
from lljax.training.placement import abstract_batch, layout_of
from lljax.training.step import Parts, make_evaluate, step_settings


def layouts_of(config: Config, mesh: Mesh, spec, curriculum) -> dict[int, Layout | None]:
    """The layout of the rows of every stage, by its number; logs the choices."""
    layouts = {}
    for stage in curriculum:
        layout, reason = _layout(config, mesh, spec, stage.pattern, stage.length)
        if layout is not None:
            logging.info(
                "stage %s: context parallelism %s, %s", stage.label, layout.context_parallel, reason
            )
        layouts[stage.number] = layout
    return layouts


def _layout(config: Config, mesh: Mesh, spec, pattern, length: int) -> tuple[Layout | None, str]:
    return layout_of(
        mesh,
        config.mesh.context_parallel,
        pattern,
        length,
        spec,
        bytes_per=jnp.dtype(config.model.dtype).itemsize,
        memory=fit.capacity(mesh)[0],
    )


def compile_programs(
    parts: Parts,
    config: Config,
    mesh: Mesh,
    spec,
    remaining: list[tuple[Stage, Layout | None]],
    lengths: list[int],
) -> tuple[dict, dict]:
    """Compiles the steps of the `remaining` stages and the evaluations on rows of `lengths`.

    Logs the memory that they need.

    Returns: the programs by the number of the stage, and (program, layout) by length.

    Raises:
      ConfigError: a program cannot fit.
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
        layout, _ = _layout(config, mesh, spec, FULL, length)
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
    if needs:  # none if the run is over
        title = (
            f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}, "
            f"{memory / fit.GiB:.2f} GiB, and {host / fit.GiB:.2f} of the host"
        )
        logging.info(fit.as_text(fit.table(needs, memory, host, title)))
    fit.check(needs, memory, host, config, spec.layers)
    return programs, evaluations


def count_parameters(model: nnx.Module, config: Config) -> dict[str, int]:
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


def device_of(mesh: Mesh) -> jax.Device:
    return mesh.devices.flat[0]
