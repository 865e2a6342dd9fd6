"""Speed and memory of a LoRA step beside transformers + peft, on this machine.

python scripts/bench_peers.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --length=2048
python scripts/bench_peers.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --length=8192
--attention=shifted

Both train rank-8 factors on q_proj and v_proj in float32 with AdamW, every layer recomputed in the
backward pass, one row of the same tokens a step; the peer attends with sdpa over the whole row. One
process per system, in turns, so that a machine that slows down slows both. Needs the `test` extra
(torch, peft). On Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lljax.config import default_config
from lljax.errors import exit_cleanly

RANK, ALPHA, TARGETS = 8, 16.0, ("q_proj", "v_proj")


def lljax_step(model: str, length: int, attention: str):
    """A function that takes one optimizer step and returns its loss."""
    from lljax.build import build_model, mesh_of
    from lljax.interop.open import open_base
    from lljax.training.curriculum import stages
    from lljax.training.placement import place
    from lljax.training.step import take_apart

    c = default_config()
    c.model.path, c.model.dtype = model, "float32"
    c.context.rope.type, c.context.length, c.context.schedule = (
        "keep",
        length,
        ((1, length, attention),),
    )
    c.lora.rank, c.lora.alpha, c.lora.targets, c.lora.also_train = RANK, ALPHA, TARGETS, ()
    c.optimizer.schedule, c.optimizer.warmup_steps, c.optimizer.beta2 = "constant", 0, 0.999
    mesh = mesh_of(c.mesh)
    base = open_base(c.model.path, c.model.revision)
    parts = take_apart(c, build_model(c, base, mesh), mesh)
    state = parts.state
    pattern = stages(c.context, ())[0].pattern
    tokens = row(length, base.config["vocab_size"])
    batch = {
        "tokens": tokens,
        "targets": np.append(tokens[1:], -100),
        "segments": np.ones(length),
        "positions": np.arange(length),
    }
    batch = place({name: np.asarray(x, np.int32)[None] for name, x in batch.items()}, 1, mesh, None)

    def take():
        nonlocal state
        state, metrics = parts.step(state, parts.frozen, batch, pattern)
        return float(metrics["loss"])

    return take


def peft_step(model: str, length: int, attention: str):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    del attention  # the peer knows full attention alone
    path = Path(model)
    source = (
        {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if path.suffix == ".gguf"
        else {"pretrained_model_name_or_path": model}
    )
    base = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="sdpa"
    )
    base.config.use_cache = False
    base.gradient_checkpointing_enable({"use_reentrant": False})
    net = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    ).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-4)
    tokens = torch.from_numpy(row(length, base.config.vocab_size))[None]

    def take():
        optimizer.zero_grad()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return take


SYSTEMS = {"lljax": lljax_step, "peft": peft_step}


def row(length: int, vocabulary: int) -> np.ndarray:
    """The same tokens for every system, int64 [length]."""
    return np.random.default_rng(0).integers(0, vocabulary, length)


def measure(system: str, model: str, length: int, attention: str, steps: int) -> dict:
    """In a process of its own: loads, warms up with one step (compilation), then times `steps`."""
    take = SYSTEMS[system](model, length, attention)
    began = time.monotonic()
    take()
    warm_up = time.monotonic() - began
    loading = peak_memory()
    # forgets the peak of loading and compiling, which differ by file
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(steps):
        began = time.monotonic()
        loss = take()
        seconds.append(time.monotonic() - began)
    return {
        "tokens_per_second": length / statistics.median(seconds),
        "peak": peak_memory(),
        "peak_with_loading": max(loading, peak_memory()),
        "warm_up": warm_up,
        "loss": loss,
    }


def peak_memory() -> float:
    """Largest resident set of this process, GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def compare(model: str, length: int, attention: str, steps: int, rounds: int) -> None:
    seen = {system: [] for system in SYSTEMS}
    console = Console()
    for number in range(rounds):
        for system in SYSTEMS:
            with console.status(f"round {number + 1} of {rounds}: {system}"):
                command = [
                    sys.executable,
                    __file__,
                    f"--model={model}",
                    f"--length={length}",
                    f"--steps={steps}",
                    f"--attention={attention}",
                    f"--system={system}",
                ]
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{system}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            seen[system].append(json.loads(done.stdout.splitlines()[-1]))
            console.print(
                f"{system}: "
                + ", ".join(f"{name} {value:.4g}" for name, value in seen[system][-1].items())
            )
    middle = {
        system: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for system, runs in seen.items()
    }
    table = Table("", "tokens/s", "peak GB, training", "peak GB, whole process")
    for name, of in (("lljax, " + attention, "lljax"), ("transformers + peft, full", "peft")):
        table.add_row(
            name,
            f"{middle[of]['tokens_per_second']:.1f}",
            f"{middle[of]['peak']:.2f}",
            f"{middle[of]['peak_with_loading']:.2f}",
        )
    table.add_row(
        "ratio",
        *(
            f"{middle['lljax'][name] / middle['peft'][name]:.2f}"
            for name in ("tokens_per_second", "peak", "peak_with_loading")
        ),
    )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a GGUF file, a folder, or a hub id")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the row")
    parser.add_argument("--attention", choices=("full", "shifted"), default="full", help="of lljax")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per system")
    parser.add_argument(
        "--system", choices=tuple(SYSTEMS), help="measure one, in this process, and print JSON"
    )
    arguments = vars(parser.parse_args())
    with exit_cleanly():
        if system := arguments.pop("system"):
            arguments.pop("rounds")
            print(json.dumps(measure(system, **arguments)))
        else:
            compare(**arguments)


if __name__ == "__main__":
    main()
