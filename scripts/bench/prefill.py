"""What reading a long prompt takes: memory and tokens a second, by its length.

python scripts/bench_prefill.py

A prompt is read in chunks, as lljax.generation does before it writes. Keys and values of all its
tokens must be held (`cache`);
the rest is temporary: by the compiler's account of the program that reads a chunk, and by what the
  resident memory of a process (one for each row of the table) grew by at most, cache included,
  while it read: once its programs are there, and with compiling. On Linux with glibc.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.build import load_base
from lljax.errors import exit_cleanly
from lljax.generation.generate import CHUNK, read_chunk, stream
from lljax.interop.open import open_base
from lljax.models import spec
from lljax.models.cache import empty_cache

CACHES = ("float32", "int8")
MB = 1e6


def memory(field: str) -> float:
    """VmRSS, the resident set of this process, or VmHWM, its largest; MB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024 / MB


def measure(path: str, length: int, kept: str) -> dict:
    base = open_base(path)
    model = load_base(base, spec.from_hf(base.config), jnp.float32)
    tokens = np.random.default_rng(0).integers(0, base.config["vocab_size"], length)
    before = memory("VmRSS")
    # Compiles what reads `tokens`: the prompt is shorter, and the room is the same.
    next(stream(model, [tokens[:CHUNK]], tokens=length, cache_dtype=jnp.dtype(kept)))
    compiling = memory("VmHWM") - before
    gc.collect()
    # what compiling gave back must not be there to be taken again
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    began = time.monotonic()
    list(stream(model, [tokens], tokens=1, cache_dtype=jnp.dtype(kept)))
    seconds, grown = time.monotonic() - began, memory("VmHWM") - before
    cache = jax.eval_shape(lambda: empty_cache(model.spec, 1, length + CHUNK, jnp.dtype(kept)))
    chunk = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
    program = read_chunk.lower(
        *nnx.split(model),
        chunk,
        chunk,
        chunk,
        cache,
        rope_length=length,
        dtype=jnp.float32,
        layout=None,
    ).compile()
    return {
        "cache": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) / MB,
        "temporary": program.memory_analysis().temp_size_in_bytes / MB,
        "grown": grown,
        "compiling": max(compiling, grown),
        "speed": length / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lljax/assets/tiny-512")
    parser.add_argument("--lengths", default="4096,32768", help=f"of prompts, multiples of {CHUNK}")
    parser.add_argument(
        "--kept", choices=CACHES, help="measure one length, in this process, and print JSON"
    )
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    with exit_cleanly():
        if given.kept:
            print(json.dumps(measure(given.model, lengths[0], given.kept)))
            return
        print(
            "| prompt | cache in | cache, MB | temporary, MB | resident, MB | with compiling, MB | tokens/s |"
        )
        print("|---" * 7 + "|")
        for kept in CACHES:
            found = []
            for length in lengths:
                done = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        f"--model={given.model}",
                        f"--lengths={length}",
                        f"--kept={kept}",
                    ],
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    sys.exit(
                        f"{length}, {kept}: exit code {done.returncode}\n{done.stderr[-2000:]}"
                    )
                found.append(json.loads(done.stdout.splitlines()[-1]))
                sizes = " | ".join(
                    f"{found[-1][name]:,.1f}"
                    for name in ("cache", "temporary", "grown", "compiling")
                )
                print(f"| {length:,} | {kept} | {sizes} | {found[-1]['speed']:,.0f} |", flush=True)
            print(
                f"| {lengths[-1] / lengths[0]:g} times | | "
                + " | ".join(f"{found[-1][name] / found[0][name]:.2f}" for name in found[0])
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
