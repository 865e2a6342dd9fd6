"""Reading a long prompt: memory and tokens a second, by its length.

python scripts/bench/prefill.py

A prompt is read in chunks, as lljax.generation does before it writes. Columns: `cache`, keys and
values of all its tokens; `temporary`, of the program that reads a chunk, by its compiler;
`resident`, the largest growth of a process while it reads, cache included, once its programs are
compiled; and the same with compiling. A process measures each row. On Linux with glibc.
"""

import argparse
import ctypes
import gc
import json

import common
import jax
import jax.numpy as jnp
import numpy as np

from lljax.build import load_base
from lljax.errors import exit_cleanly
from lljax.generation import programs
from lljax.generation.engine import CHUNK
from lljax.generation.generate import generate
from lljax.interop.open import open_base
from lljax.models.cache import empty_cache
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf

CACHES = ("float32", "int8")
COLUMNS = ("cache", "temporary", "grown", "compiling", "speed")


def measure(path: str, length: int, cache: str) -> dict[str, float]:
    """COLUMNS of this process: MB, and tokens a second."""
    base, dtype = open_base(path), jnp.dtype(cache)
    model = load_base(base, spec_from_hf(base.config), jnp.float32)
    tokens = np.random.default_rng(0).integers(0, base.config["vocab_size"], length)
    before = common.resident()
    generate(model, [tokens], tokens=1, cache_dtype=dtype)  # compiles
    compiling = common.resident("VmHWM") - before
    gc.collect()
    # memory that compiling returned must not be there to be taken again
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = common.resident()
    common.forget_peak()
    _, seconds = common.timed(lambda: generate(model, [tokens], tokens=1, cache_dtype=dtype))
    grown = common.resident("VmHWM") - before
    held, temporary = compiled_memory(model, length, dtype)
    return {
        "cache": held / common.MB,
        "temporary": temporary / common.MB,
        "grown": grown / common.MB,
        "compiling": max(compiling, grown) / common.MB,
        "speed": length / seconds,
    }


def compiled_memory(model: Decoder, length: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Bytes of the cache, and of the temporaries of the program that reads a chunk."""
    cache = jax.eval_shape(lambda: empty_cache(model.spec, 1, 2 * length, dtype))
    chunk, one = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, CHUNK), (1,)))
    settings, weights = programs.program_of(model, jnp.dtype("float32"), None)
    program = programs.read_prompt.lower(settings, weights, cache, chunk, one, one).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    memory = program.memory_analysis()
    assert memory is not None  # a CPU reports it
    return held, memory.temp_size_in_bytes


def compare(model: str, lengths: list[int]) -> None:
    """Prints the table: a row for each cache and length, and the growth from first to last."""
    print(
        common.markdown_row(
            *("prompt", "cache in", "cache, MB", "temporary, MB", "resident, MB"),
            *("with compiling, MB", "tokens/s"),
        )
    )
    print("|---" * 7 + "|")
    for cache in CACHES:
        rows = []
        for length in lengths:
            row = common.in_process(
                __file__, f"--model={model}", f"--lengths={length}", f"--cache={cache}"
            )
            rows.append(row)
            sizes = [f"{row[name]:,.1f}" for name in COLUMNS[:-1]]
            cells = (f"{length:,}", cache, *sizes, f"{row['speed']:,.0f}")
            print(common.markdown_row(*cells), flush=True)
        ratios = [f"{rows[-1][name] / rows[0][name]:.2f}" for name in COLUMNS]
        print(common.markdown_row(f"{lengths[-1] / lengths[0]:g} times", "", *ratios), flush=True)


def read_arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="lljax/assets/tiny-512")
    parser.add_argument("--lengths", default="4096,32768", help=f"of prompts, multiples of {CHUNK}")
    parser.add_argument(
        "--cache", choices=CACHES, help="measure one length, in this process, and print JSON"
    )
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    with exit_cleanly():
        if arguments.cache:
            print(json.dumps(measure(arguments.model, lengths[0], arguments.cache)))
        else:
            compare(arguments.model, lengths)


if __name__ == "__main__":
    main()
