"""Memory and time of steps of Llama-3.1-8B at length on this device, beside the plan.

python scripts/bench/steps.py --row='h100-80g shifted 32k nf4'    # a row of capacity_rows.py
python scripts/bench/steps.py --row='h100-80g full 32k' --one_document    # cuDNN serves such rows
python scripts/bench/steps.py --row='h100-80g shifted 288k' --one_document --steps=1

The last keeps 72 GiB of residuals on the host.

Weights and tokens are random, on which a step takes as long. The peak is the allocator's, which is
never lower than the peak of drawing the weights. A row that does not fit is refused as in training,
before the weights are drawn.
"""

import dataclasses
import logging
import math
import os
import resource
import statistics
import threading
from typing import Any

import common
import jax
import jax.numpy as jnp
from capacity_rows import LLAMA, ROWS, Row, config_of

from lljax.build import mesh_of, placed_model
from lljax.errors import ConfigError, exit_cleanly
from lljax.hardware.chips import GiB, of_kind
from lljax.hardware.compiler_flags import take_gpu_memory
from lljax.hardware.host_memory import LIMIT, available_memory
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.initialize import initialize
from lljax.parallel.processes import processes_on_host
from lljax.planning import fit, flops
from lljax.training.curriculum import stages
from lljax.training.placement import place
from lljax.training.prepare import prepare_step
from lljax.training.state import split


def draw(model: Decoder, dtype: jnp.dtype) -> None:
    """Gives the model random weights, a layer at a time: `initialize` draws a whole stack in
    float32 first, which is more memory than some steps need.
    """
    for _, variable in declared(model):
        value = variable.get_value()
        if variable.get_metadata("init") == "normal" and len(value.shape) > 2:
            leaves, tree = jax.tree.flatten(value)
            variable.set_value(
                tree.unflatten(_random(leaf, key) for key, leaf in enumerate(leaves))
            )
    initialize(
        model,
        0,
        dtype=dtype,
        shardings=lambda variable: jax.tree.map(lambda x: x.sharding, variable.get_value()),
    )


def _random(leaf: jax.Array, key: int) -> jax.Array:
    def layer(key):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.bits(key, leaf.shape[1:], jnp.uint8).astype(leaf.dtype)
        return (0.02 * jax.random.normal(key, leaf.shape[1:])).astype(leaf.dtype)

    return jax.jit(
        lambda: jax.lax.map(layer, jax.random.split(jax.random.key(key), leaf.shape[0])),
        out_shardings=leaf.sharding,
    )()


class HostMemoryMonitor:
    """A context that samples the host's available memory four times a second.

    taken: its largest fall, in bytes. The resident set of a process lacks some pinned memory.
    """

    def __enter__(self):
        self._before, self.taken, self._over = available_memory(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._over.wait(0.25):
            self.taken = max(self.taken, self._before - available_memory())

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


@dataclasses.dataclass(frozen=True)
class Measured:
    """The steps of a row. Sizes in bytes, seconds of every step; the first does not count."""

    need: fit.Need
    host_room: float
    drawing: int  # peak of the device while the weights are drawn
    peak: int
    host_before: int
    host_taken: int
    compiling: float
    seconds: list[float]
    loss: float


def measure(row: Row, one_document: bool, steps: int) -> Measured:
    """Compiles the step of a row, refuses it if it does not fit, and takes `steps` + 1 of them."""
    device, config = jax.devices()[0], config_of(row)
    config.data.packing = not one_document
    mesh, stage = mesh_of(config.mesh, [device]), stages(config.context)[0]
    with HostMemoryMonitor() as host:
        model = placed_model(config, common.LLAMA_3_8B, mesh)
        prepared = prepare_step(config, common.LLAMA_3_8B, mesh, model=model)
        program = prepared.steps[stage.number]
        compiled, compiling = common.timed(program.compile)
        need = fit.need_of(program, prepared)
        memory, host_room = fit.capacity(mesh)
        fit.check([need], memory, host_room, config, model.spec.layers)
        draw(model, jnp.dtype(config.model.dtype))
        parts = split(config, model, mesh)
        del model
        drawing = _peak(device)
        documents = 1 if one_document else 2
        tokens = common.random_row(stage.length, common.LLAMA_3_8B["vocab_size"], documents)
        batch = place(tokens, 1, mesh, program.layout)
        state, seconds, before, loss = parts.state, [], host.taken, math.nan
        for _ in range(steps + 1):
            (state, metrics), took = common.timed(compiled, state, parts.frozen, batch)
            loss = float(metrics["loss"])
            seconds.append(took)
    assert math.isfinite(loss)
    return Measured(
        need=need,
        host_room=host_room,
        drawing=drawing,
        peak=_peak(device),
        host_before=before,
        host_taken=host.taken,
        compiling=compiling,
        seconds=seconds,
        loss=loss,
    )


def _peak(device: Any) -> int:
    stats = device.memory_stats()
    if not stats:
        raise ConfigError(f"{device.device_kind}: the device does not report its memory")
    return stats["peak_bytes_in_use"]


def arithmetic(row: Row, one_document: bool) -> tuple[float, float]:
    """Seconds of a step at the peak of this device, with and without recomputation.

    Raises:
      ConfigError: the peak of this device is not known.
    """
    kind = jax.devices()[0].device_kind
    chip = of_kind(kind)
    if chip is None:
        raise ConfigError(
            f"--row={row.name}: it is for {row.device}, and no figures of {kind} are known"
        )
    config = config_of(row)
    stage = stages(config.context)[0]
    model = placed_model(config, common.LLAMA_3_8B, mesh_of(config.mesh, jax.devices()[:1]))
    documents = 1 if one_document else 2
    # pairs are counted within a document
    stage = dataclasses.replace(stage, length=stage.length // documents)
    counted = flops.of_step(model, config, stage)
    return counted.hardware * documents / chip.flops, counted.model * documents / chip.flops


def text(row: Row, one_document: bool, m: Measured) -> str:
    hardware, useful = arithmetic(row, one_document)
    kind, took = jax.devices()[0].device_kind, statistics.median(m.seconds[1:])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    documents = "one document" if one_document else "two documents"
    steps = ", ".join(f"{s:.2f}" for s in m.seconds)
    return (
        f"{row.name}, {documents} a row, on {kind}\n"
        f"device: planned {m.need.peak / GiB:.2f} GiB, peak {m.peak / GiB:.2f} "
        f"(drawing the weights {m.drawing / GiB:.2f})\n"
        f"host: planned {m.need.host / GiB:.2f} GiB of {m.host_room / GiB:.2f} "
        f"({LIMIT}={os.environ.get(LIMIT)}), taken {m.host_taken / GiB:.2f} "
        f"({m.host_before / GiB:.2f} before the first step), resident {resident:.2f}\n"
        f"time: {took:.2f} s a step ({steps}), {row.length / took:,.0f} tokens/s, "
        f"{hardware / took:.1%} of the peak arithmetic, {useful / took:.1%} without "
        f"recomputation; compiled in {m.compiling:.0f} s; loss {m.loss:.3f}"
    )


def main() -> None:
    parser = common.parser(__doc__)
    rows = {row.name: row for row in ROWS if (row.objective, row.model) == ("sft", LLAMA)}
    parser.add_argument(
        "--row", required=True, metavar="NAME", choices=rows, help="one of: " + "; ".join(rows)
    )
    parser.add_argument(
        "--one_document", action="store_true", help="a row is one document, not two side by side"
    )
    parser.add_argument("--steps", type=int, default=3, help="counted steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    take_gpu_memory(processes_on_host)
    row, one_document = rows[arguments.row], arguments.one_document
    with exit_cleanly():
        arithmetic(row, one_document)  # refuses an unknown device before anything is compiled
        common.show(text(row, one_document, measure(row, one_document, arguments.steps)))


if __name__ == "__main__":
    main()
