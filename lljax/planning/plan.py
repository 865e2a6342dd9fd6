"""What a run needs, before any weight is read: every stage's real step compiled for the real target.

Memory comes from the compiler, but for the workspace of cuDNN, which only a device would tell it; arithmetic is counted by
`lljax.training.flops`; traffic is read from the program.
"""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
from flax import nnx

from lljax import sharding
from lljax.build import abstract_model, mesh_of
from lljax.errors import ConfigError
from lljax.models import lora
from lljax.models.declare import declared
from lljax.planning import hlo
from lljax.planning.devices import Target
from lljax.training import flops
from lljax.training.curriculum import Stage, stages
from lljax.training.optimizer import make_optimizer, roles_of
from lljax.training.placement import check_rows, layout_of
from lljax.training.step import abstract_state, make_step, step_settings

MARGIN = 0.03                                # of the device's memory, for what the runtime keeps to itself


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Bytes are of one device, FLOPs and tokens of one optimizer step of all devices, seconds of one step.

    peak: arguments + outputs - what they share + temporaries. seconds: the largest of the arithmetic (at `efficiency`),
    memory and network bounds.
    """

    stage: Stage
    context_parallel: str
    base: int
    trainable: int
    optimizer: int
    temporary: int
    peak: int
    host: int
    fits: bool
    model_flops: float
    hardware_flops: float
    collectives: dict
    tokens: int
    bounds: dict
    compile_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())


def plan(config, hf_config: dict, target: Target, *, efficiency: float = 0.5, host: int | None = None) -> list[StagePlan]:
    """The plan of every stage. host: bytes of host memory a device, that of a typical node where it is not given.

    Raises:
      ConfigError: the configuration cannot be laid out on the target, or its compiler is missing.
    """
    return [plan_stage(config, hf_config, target, stage, efficiency=efficiency, host=host)
            for stage in stages(config.context)]


def plan_stage(config, hf_config: dict, target: Target, stage: Stage, *, efficiency: float = 0.5,
               host: int | None = None) -> StagePlan:
    """Compiles one stage's step for the target."""
    device, mesh = target.device, mesh_of(config.mesh, target.devices())
    check_rows(config.training.rows, mesh)
    model = _abstract(config, hf_config, mesh)
    layout, _ = layout_of(mesh, config.mesh.context_parallel, stage.pattern, stage.length, model.spec,
                          bytes_per=jnp.dtype(config.model.dtype).itemsize, memory=device.memory)
    graphdef, trainable, frozen = nnx.split(model, lora.is_trainable, ...)
    optimizer = make_optimizer(config.optimizer, stage.stop, roles_of(trainable))
    trainable, frozen = nnx.as_pure(trainable), nnx.as_pure(frozen)
    state = abstract_state(trainable, optimizer, mesh, history=config.alarm.history)
    shape = (config.training.accumulate, config.training.rows, stage.length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh, 3))
             for name in ("tokens", "targets", "segments", "positions", "index")}
    step = make_step(graphdef, optimizer, step_settings(config), state)

    began = time.monotonic()
    memory, collectives = _compile(step, state, frozen, batch, stage.pattern, layout)
    counted = flops.of_step(model, config, stage)
    base, weights, moments = _bytes(frozen), _bytes(trainable), _bytes(state.optimizer)
    passes = 2 if config.memory.remat == "none" else 3       # the weights are read forward, again, and backward
    bounds = {"arithmetic": counted.hardware / (target.count * device.flops * efficiency),
              "memory": config.training.accumulate * passes * base * target.count / device.bandwidth,
              "network": sum(collectives.values()) / device.link}
    peak = memory["peak"]
    fits = memory["fits"] and peak <= device.memory * (1 - MARGIN) and memory["host"] <= (host or device.host)
    return StagePlan(stage, layout.context_parallel, base, weights, moments, memory["temp"], peak,
                     memory["host"], fits, counted.model, counted.hardware, collectives,
                     shape[0] * shape[1] * shape[2], bounds, time.monotonic() - began)


def _abstract(config, hf_config: dict, mesh):
    model = abstract_model(config, hf_config)
    for _, variable in declared(model):
        value, trains = variable.get_value(), variable.get_metadata().get("trainable", False)
        where = sharding.weight_sharding(mesh, variable.get_metadata("axes"), value.shape)
        dtype = jnp.float32 if trains else jnp.dtype(config.model.dtype)
        variable.set_value(jax.ShapeDtypeStruct(value.shape, dtype, sharding=where))
    return model


def _compile(step, *arguments) -> tuple[dict, dict]:
    """(memory, collectives) of the compiled step. The TPU compiler refuses what does not fit, and says by how much."""
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([GM]) of|([\d.]+)([GM]) exceeds", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        size, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
        peak = int(float(size) * (2 ** 30 if unit == "G" else 2 ** 20))
        return {"fits": False, "peak": peak, "temp": peak, "host": 0}, {}
    m, text = compiled.memory_analysis(), compiled.as_text()
    temp = m.temp_size_in_bytes + hlo.cudnn_workspace(text)
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + temp
    return {"fits": True, "peak": peak, "temp": temp, "host": m.host_temp_size_in_bytes}, hlo.collective_bytes(text)


def _bytes(tree) -> int:
    """Of one device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def longest_context(config, hf_config: dict, target: Target, **options) -> tuple[int, list[StagePlan]]:
    """The longest last stage, a multiple of a power of two near a sixteenth of it, that fits; and the plans tried.

    Raises:
      ConfigError: not even 1,024 tokens fit.
    """
    last = stages(config.context)[-1]
    tried: dict[int, StagePlan] = {}

    def fits(length):
        if length not in tried:
            changed = config.copy_and_resolve_references()
            changed.context.length = max(length, changed.context.length)
            changed.context.schedule = ((last.stop, length, last.pattern.kind),)
            tried[length] = plan_stage(changed, hf_config, target, stages(changed.context)[0], **options)
        return tried[length].fits
    low = 1024
    if not fits(low):
        raise ConfigError(f"--device={target.name}: the model does not fit with {low} tokens")
    while fits(2 * low):
        low *= 2
    step = low // 2
    while step >= low // 16:
        if fits(low + step):
            low += step
        step //= 2
    return low, list(tried.values())
