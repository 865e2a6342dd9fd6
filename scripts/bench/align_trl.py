"""Steps of DPO beside TRL's DPOTrainer: speed and memory. Run by align.py.

Both train rank-8 factors on q_proj and v_proj in float32 with AdamW on one pair of the same tokens
a step, every layer recomputed in the backward pass, and compute the reference in every step with
the adapter off. lljax reads the prompt once; TRL reads a row for each answer. One process per
system, in turns, so that a machine that slows down slows both.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from align_rows import Group
from rich.console import Console

RANK, ALPHA, TARGETS, RATE, BETA = 8, 16, ("q_proj", "v_proj"), 2e-4, 0.1
Done = Callable[[float], None]  # called after every step with its loss


def lljax_steps(model: str, group: Group, steps: int, done: Done) -> None:
    import jax
    import jax.numpy as jnp

    from lljax.build import build_model, mesh_of
    from lljax.interop.open import open_base
    from lljax.objectives.objective import REFERENCE
    from lljax.training.placement import place
    from lljax.training.prepare import prepare_step

    c = common.plan_config(group.row_length, "full")
    c.model.path, c.model.dtype, c.context.rope.type = model, "float32", "keep"
    c.lora.rank, c.lora.alpha, c.lora.targets, c.lora.also_train = RANK, float(ALPHA), TARGETS, ()
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = RATE, "constant", 0
    c.optimizer.beta2, c.training.rows = 0.999, 1
    c.objective.name, c.objective.beta = group.objective, BETA
    mesh, base = mesh_of(c.mesh), open_base(c.model.path, c.model.revision)
    prepared = prepare_step(c, base.config, mesh, model=build_model(c, base, mesh))
    program, state = prepared.steps[0], prepared.state
    assert program.scorer is not None, "DPO has a reference"
    reference = jax.tree.map(jnp.copy, state.trainable)  # before the first step B is 0
    batch = place(group.batch(base.config["vocab_size"]), 1, mesh, program.layout)
    for _ in range(steps):
        scores = program.scorer.compile()(reference, prepared.frozen, batch)
        state, metrics = program.compile()(state, prepared.frozen, batch | {REFERENCE: scores})
        done(float(metrics["loss"]))


def trl_steps(model: str, group: Group, steps: int, done: Done) -> None:
    import datasets  # pyright: ignore[reportMissingImports]
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    net = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )

    class Timed(DPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.loss = loss.item()
            return loss

    class StepEnd(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done(trainer.loss)

    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}  # replaced by tokens
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            net,
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=1,
                max_steps=steps,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                beta=BETA,
                max_length=None,
                bf16=False,
                use_cpu=True,
                activation_checkpointing=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=adapter,
            callbacks=[StepEnd()],
        )
        prompt, (chosen, rejected) = group.tokens(net.config.vocab_size)
        tokens = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        pair = {name: ids.tolist() for name, ids in tokens.items()}
        trainer.train_dataset = datasets.Dataset.from_list([pair] * steps)
        trainer.train()


SYSTEMS = {"lljax": lljax_steps, "trl": trl_steps}


def measure(system: str, model: str, prompt: int, answer: int, steps: int) -> dict[str, float]:
    """Loads, warms up with one step (compilation), then times `steps`; in this process."""
    group = Group("dpo", prompt, answer, shared=True)
    ends, cpu, losses, loading = [], [], [], 0

    def done(loss: float) -> None:
        nonlocal loading
        ends.append(time.monotonic())
        cpu.append(time.process_time())
        losses.append(loss)
        if len(ends) == 1:
            loading = common.resident("VmHWM")
            common.forget_peak()  # of loading and compiling, which differ by file

    SYSTEMS[system](model, group, steps + 1, done)
    peak = common.resident("VmHWM")
    assert len(ends) == steps + 1, f"{len(ends)} of {steps + 1} steps were seen"
    return {
        "tokens_per_second": (prompt + 2 * answer) / statistics.median(np.diff(ends)),
        "tokens_per_cpu_second": (prompt + 2 * answer) / statistics.median(np.diff(cpu)),
        "peak": peak / common.GB,
        "peak_with_loading": max(loading, peak) / common.GB,
        "first_loss": losses[0],
        "loss": losses[-1],
    }


def in_float32(model: str, folder: Path) -> None:
    """Writes a base of any format to `folder`: Trainer refuses models that it read from GGUF."""
    from lljax.build import load_base
    from lljax.interop.export import export_merged
    from lljax.interop.open import open_base
    from lljax.models.families import spec_from_hf

    base = open_base(model)
    dense = load_base(base, spec_from_hf(base.config), "float32")
    export_merged(dense, base, folder, dtype="float32")


def compare(script: str, model: str, prompt: int, answer: int, steps: int, rounds: int) -> None:
    """Measures the systems in turns and prints the medians side by side."""
    with tempfile.TemporaryDirectory() as folder:
        if model.endswith(".gguf"):
            in_float32(model, Path(folder) / "base")
            model = f"{folder}/base"
        show_medians(measured(script, model, prompt, answer, steps, rounds))


def measured(
    script: str, model: str, prompt: int, answer: int, steps: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """The measurements of every system, a process each, in turns."""
    seen: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    console = Console(width=120)
    flags = ["--measure=trl", f"--model={model}", f"--prompt={prompt}", f"--answer={answer}"]
    for number in range(rounds):
        for system, runs in seen.items():
            with console.status(f"round {number + 1} of {rounds}: {system}"):
                runs.append(
                    common.in_process(script, *flags, f"--steps={steps}", f"--system={system}")
                )
            values = ", ".join(f"{name} {value:.4g}" for name, value in runs[-1].items())
            console.print(f"{system}: {values}")
    return seen


def show_medians(seen: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        system: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for system, runs in seen.items()
    }
    titles = "tokens/s", "tokens / CPU second", "peak GB, training", "peak GB, whole process"
    table = common.table(("system", *titles), left=("system",))
    names = "tokens_per_second", "tokens_per_cpu_second", "peak", "peak_with_loading"
    digits = 1, 1, 2, 2
    for title, system in (("lljax", "lljax"), ("TRL DPOTrainer", "trl")):
        cells = (f"{middle[system][name]:.{n}f}" for name, n in zip(names, digits, strict=True))
        table.add_row(title, *cells)
    ratios = (f"{middle['lljax'][name] / middle['trl'][name]:.2f}" for name in names)
    table.add_row("ratio", *ratios)
    common.show(table)
