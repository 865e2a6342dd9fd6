"""Speed and memory of a LoRA step beside transformers + peft, on this machine.

python scripts/bench/peers.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --length=2048
python scripts/bench/peers.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --length=8192 \\
    --attention=shifted

Both train rank-8 factors on q_proj and v_proj in float32 with AdamW, every layer recomputed in the
backward pass, one row of the same tokens a step; the peer attends with sdpa over the whole row. One
process per system, in turns, so that a machine that slows down slows both. Needs the `test` extra
(torch, peft). On Linux.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from rich.console import Console

from lljax.config import default_config
from lljax.errors import exit_cleanly

RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "v_proj")
Step = Callable[[], float]  # takes one optimizer step and returns its loss


def lljax_step(model: str, length: int, attention: str) -> Step:
    from lljax.build import build_model, mesh_of
    from lljax.interop.open import open_base
    from lljax.training.placement import place
    from lljax.training.prepare import prepare_step

    c = default_config()
    c.model.path, c.model.dtype, c.context.rope.type = model, "float32", "keep"
    c.context.length, c.context.schedule = length, ((1, length, attention),)
    c.lora.rank, c.lora.alpha, c.lora.targets, c.lora.also_train = RANK, float(ALPHA), TARGETS, ()
    c.optimizer.schedule, c.optimizer.warmup_steps, c.optimizer.beta2 = "constant", 0, 0.999
    mesh, base = mesh_of(c.mesh), open_base(c.model.path, c.model.revision)
    prepared = prepare_step(c, base.config, mesh, model=build_model(c, base, mesh))
    program, state = prepared.steps[0], prepared.state
    row = common.random_row(length, base.config["vocab_size"])
    batch = place(row, 1, mesh, program.layout)

    def take() -> float:
        nonlocal state
        state, metrics = program.compile()(state, prepared.frozen, batch)
        return float(metrics["loss"])

    return take


def peft_step(model: str, length: int, attention: str) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    del attention  # the peer has full attention alone
    path = Path(model)
    source: dict[str, Any] = (
        {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if path.suffix == ".gguf"
        else {"pretrained_model_name_or_path": model}
    )
    base = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="sdpa"
    )
    base.config.use_cache = False
    base.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    net = get_peft_model(base, adapter).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-4)
    row = common.random_row(length, base.config.vocab_size)
    tokens = torch.from_numpy(row["tokens"]).long()

    def take() -> float:
        optimizer.zero_grad()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return take


SYSTEMS = {"lljax": lljax_step, "peft": peft_step}


def measure(system: str, model: str, length: int, attention: str, steps: int) -> dict[str, float]:
    """Loads, warms up with one step (compilation), then times `steps`; in this process."""
    take = SYSTEMS[system](model, length, attention)
    loss, warm_up = common.timed(take)
    loading = common.resident("VmHWM") / common.GB
    common.forget_peak()  # of loading and compiling, which differ by file
    seconds = []
    for _ in range(steps):
        loss, took = common.timed(take)
        seconds.append(took)
    peak = common.resident("VmHWM") / common.GB
    return {
        "tokens_per_second": length / statistics.median(seconds),
        "peak": peak,
        "peak_with_loading": max(loading, peak),
        "warm_up": warm_up,
        "loss": loss,
    }


def compare(model: str, length: int, attention: str, steps: int, rounds: int) -> None:
    """Measures the systems in turns and prints the medians side by side."""
    seen = {system: [] for system in SYSTEMS}
    console = Console(width=120)
    flags = [f"--model={model}", f"--length={length}", f"--steps={steps}"]
    for number in range(rounds):
        for system, runs in seen.items():
            with console.status(f"round {number + 1} of {rounds}: {system}"):
                flags_of = [*flags, f"--attention={attention}", f"--system={system}"]
                runs.append(common.in_process(__file__, *flags_of))
            values = ", ".join(f"{name} {value:.4g}" for name, value in runs[-1].items())
            console.print(f"{system}: {values}")
    middle = {
        system: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for system, runs in seen.items()
    }
    table = common.table(
        ("system", "tokens/s", "peak GB, training", "peak GB, whole process"), left=("system",)
    )
    names, digits = ("tokens_per_second", "peak", "peak_with_loading"), (1, 2, 2)
    for title, system in (("lljax, " + attention, "lljax"), ("transformers + peft, full", "peft")):
        cells = (f"{middle[system][name]:.{n}f}" for name, n in zip(names, digits, strict=True))
        table.add_row(title, *cells)
    ratios = (f"{middle['lljax'][name] / middle['peft'][name]:.2f}" for name in names)
    table.add_row("ratio", *ratios)
    console.print(table)


def read_arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", required=True, help="a GGUF file, a folder, or a hub id")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the row")
    parser.add_argument("--attention", choices=("full", "shifted"), default="full", help="of lljax")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per system")
    parser.add_argument(
        "--system", choices=tuple(SYSTEMS), help="measure one, in this process, and print JSON"
    )
    return parser.parse_args()


def main() -> None:
    arguments = vars(read_arguments())
    with exit_cleanly():
        if system := arguments.pop("system"):
            arguments.pop("rounds")
            print(json.dumps(measure(system, **arguments)))
        else:
            compare(**arguments)


if __name__ == "__main__":
    main()
