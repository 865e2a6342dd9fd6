"""What steps of Llama-3.1-8B at length take of the device at hand and its host, beside what their
program says; and time.

python scripts/bench_steps.py --row='h100-80g shifted 32k nf4'           # see capacity_rows.py; on
such a device or another python scripts/bench_steps.py --row='h100-80g full 32k' --one_document   #
rows that cuDNN serves python scripts/bench_steps.py --row='h100-80g shifted 288k' --one_document
--steps=1     # 72 GiB of residuals on the host

Weights and tokens are random: a step takes as long over them. The peak is the allocator's, which is
  never lower than what drawing the weights took. What does not fit is refused as train.py does,
  before the weights are drawn.
"""

import argparse
import dataclasses
import logging
import math
import os
import resource
import statistics
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from capacity_rows import LLAMA, ROWS, Row, config_of
from rich.console import Console

from lljax.build import mesh_of, placed_model
from lljax.data.packing import IGNORED
from lljax.errors import ConfigError, exit_cleanly
from lljax.hardware.chips import GiB, of_kind
from lljax.hardware.compiler_flags import take_gpu_memory
from lljax.hardware.host_memory import LIMIT, available_memory
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.initialise import initialise
from lljax.planning import fit, flops
from lljax.training.curriculum import stages
from lljax.training.placement import abstract_batch, place
from lljax.training.step import take_apart


def draw(model: Decoder, dtype) -> None:
    """Random weights, a layer at a time: `initialise` draws a whole stack in float32 first, more
    than some steps take.
    """
    for _, variable in declared(model):
        value = variable.get_value()
        if variable.get_metadata("init") == "normal" and len(value.shape) > 2:
            leaves, tree = jax.tree.flatten(value)
            variable.set_value(
                tree.unflatten(_random(leaf, key) for key, leaf in enumerate(leaves))
            )
    initialise(
        model,
        0,
        dtype=dtype,
        shardings=lambda variable: jax.tree.map(lambda x: x.sharding, variable.get_value()),
    )


def _random(leaf, key: int):
    def layer(key):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.bits(key, leaf.shape[1:], jnp.uint8).astype(leaf.dtype)
        return (0.02 * jax.random.normal(key, leaf.shape[1:])).astype(leaf.dtype)

    return jax.jit(
        lambda: jax.lax.map(layer, jax.random.split(jax.random.key(key), leaf.shape[0])),
        out_shardings=leaf.sharding,
    )()


class HostMemoryMonitor:
    """A context. taken: the largest fall of the host's available memory since, in bytes, sampled
    four times a second. The resident set of a process does not include all pinned memory.
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


def measure(row: Row, one_document: bool, steps: int, of_host: HostMemoryMonitor) -> str:
    """What the row's steps took. The first step does not count for the time."""
    device = jax.devices()[0]
    chip = of_kind(device.device_kind)
    if chip is None:
        raise ConfigError(
            f"--row={row.name}: it is for {row.device}, and of {device.device_kind} no figures are known"
        )
    config = config_of(row)
    config.data.packing = not one_document
    mesh, stage = mesh_of(config.mesh, [device]), stages(config.context)[0]
    model = placed_model(config, LLAMA, mesh)
    T = stage.length
    of_document = T if one_document else T // 2
    counted = flops.of_step(model, config, dataclasses.replace(stage, length=of_document))
    # s at the peak
    hardware, useful = (
        each * T / of_document / chip.flops for each in (counted.hardware, counted.model)
    )
    began = time.monotonic()
    parts = take_apart(config, model, mesh)
    need, program = fit.compile_step(
        stage.label, parts, abstract_batch(1, 1, T, mesh), stage.pattern, None
    )
    compiling = time.monotonic() - began
    memory, host = fit.capacity(mesh)
    fit.check([need], memory, host, config, model.spec.layers)
    draw(model, jnp.dtype(config.model.dtype))
    parts = take_apart(config, model, mesh)
    del model
    drawing = device.memory_stats()["peak_bytes_in_use"]
    tokens, places = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], T), np.arange(T)
    batch = {
        "tokens": tokens,
        "targets": np.append(tokens[1:], IGNORED),
        "segments": 1 + places // of_document,
        "positions": places % of_document,
    }
    batch = place({name: x.astype(np.int32)[None] for name, x in batch.items()}, 1, mesh, None)
    state, seconds = parts.state, []
    before = of_host.taken
    for _ in range(steps + 1):
        began = time.monotonic()
        state, metrics = program(state, parts.frozen, batch)
        loss = float(metrics["loss"])
        seconds.append(time.monotonic() - began)
    peak, took = device.memory_stats()["peak_bytes_in_use"], statistics.median(seconds[1:])
    assert math.isfinite(loss)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{row.name}, {'one document' if one_document else 'two documents'} a row, on {device.device_kind}\n"
        f"device: planned {need.peak / GiB:.2f} GiB, peak {peak / GiB:.2f} (drawing the weights {drawing / GiB:.2f})\n"
        f"host: planned {need.host / GiB:.2f} GiB of {host / GiB:.2f} ({LIMIT}={os.environ.get(LIMIT)}), taken "
        f"{of_host.taken / GiB:.2f} ({before / GiB:.2f} before the first step), resident {resident:.2f}\n"
        f"time: {took:.2f} s a step ({', '.join(f'{s:.2f}' for s in seconds)}), {T / took:,.0f} tokens/s, "
        f"{hardware / took:.1%} of the peak arithmetic, {useful / took:.1%} without "
        f"what is computed again; compiled in {compiling:.0f} s; loss {loss:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = {row.name: row for row in ROWS}
    parser.add_argument(
        "--row", required=True, metavar="NAME", choices=rows, help="one of: " + "; ".join(rows)
    )
    parser.add_argument(
        "--one_document", action="store_true", help="a row is one document, not two side by side"
    )
    parser.add_argument("--steps", type=int, default=3, help="counted ones")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    take_gpu_memory()
    with exit_cleanly():
        with HostMemoryMonitor() as of_host:
            text = measure(rows[arguments.row], arguments.one_document, arguments.steps, of_host)
        Console(width=140).print(text, highlight=False)


if __name__ == "__main__":
    main()
