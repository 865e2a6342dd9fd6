"""Shared by the measurements: flags, tables, timing, memory of a process, processes, tokens."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lljax.config import Config, default_config

MB, GB = 1e6, 1e9
IGNORED = -100  # a target that is not predicted
LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
LLAMA_2_7B = LLAMA_3_8B | {
    "vocab_size": 32_000,
    "intermediate_size": 11_008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
}


# ---------------------------------------------------------------- flags and tables
def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `doc`, the docstring of the script."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def table(columns: Sequence[str], *, left: Sequence[str], title: str = "") -> Table:
    """An empty table; the columns in `left` are aligned left, the others (numbers) right."""
    made = Table(title=title or None)
    for column in columns:
        made.add_column(column, justify="left" if column in left else "right")
    return made


def show(content: Any, width: int = 140) -> None:
    """Prints a table or a text."""
    Console(width=width).print(content, highlight=False)


def markdown_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------- configurations and tokens
def plan_config(length: int, attention: str) -> Config:
    """A configuration of one step on rows of `length`, for a model without weights."""
    c = default_config()
    c.model.path, c.data.train = "-", ("-",)  # neither is read
    c.context.length, c.context.schedule = length, ((1, length, attention),)
    return c


def random_row(length: int, vocabulary: int, documents: int = 1) -> dict[str, np.ndarray]:
    """A row of random tokens, int32 [1, length]: `documents` documents of equal length, packed."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, length)
    places, size = np.arange(length), length // documents
    row = {
        "tokens": tokens,
        "targets": np.append(tokens[1:], IGNORED),
        "segments": 1 + places // size,
        "positions": places % size,
    }
    return {name: values.astype(np.int32)[None] for name, values in row.items()}


# ---------------------------------------------------------------- time and memory
def timed(call: Callable, *args: Any) -> tuple[Any, float]:
    """The result of call(*args), once its arrays are computed, and the seconds that it took."""
    began = time.monotonic()
    result = call(*args)
    if jax := sys.modules.get("jax"):  # not imported here: a peer's process must not pay for it
        jax.block_until_ready(result)
    return result, time.monotonic() - began


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory; VmHWM: the peak since `forget_peak`. On Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Lets VmHWM start again from the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------- a process for a measurement
def in_process(script: str, *flags: str) -> dict[str, Any]:
    """Runs `script` in a new process; returns the JSON object in its last line."""
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(flags)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
