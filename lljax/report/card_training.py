"""How an exported model was trained, as its card says it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lljax.config.tree import value_or_default
from lljax.errors import counted
from lljax.report.card_export import (
    Export,
    base_link,
    guarded,
    is_trained,
    lengths_of,
    markdown_text,
    schedule_of,
)
from lljax.report.content import Table
from lljax.report.numbers import column, compact, duration
from lljax.report.run_files import RunFiles

ROPES = {
    "linear": "position interpolation",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "llama3": "Llama 3",
    "longrope": "LongRoPE",
}
OBJECTIVES = {"sft": "next-token prediction"}  # others are known by their names in capitals
ATTENTION = {
    "full": "full",
    "shifted": "shifted sparse (S²-Attn of LongLoRA)",
    "window": "sliding window with anchors",
}
ROLES = {"embed": "embeddings", "norm": "norms", "head": "output head"}


def facts(export: Export, run: RunFiles | None) -> Iterator[tuple[str, str]]:
    """(label, text) of what was done, as far as it is recorded."""
    if export.base:
        revision = value_or_default(run.config, "model.revision") if run and run.started else "main"
        at = "" if revision == "main" else f", revision {markdown_text(revision)}"
        where = at if export.base_is_public else " (a local model without a hub id)"
        yield "base", f"{base_link(export)}{where}"
    if method := guarded("config.json", _method, export, run):
        yield "method", method
    before, after = lengths_of(export, run)
    if after:
        yield "context", f"{before:,} → {after:,} tokens" if before else f"{after:,} tokens"
    if rope := guarded("config.json", _rope, export, run):
        yield "RoPE", rope
    if export.quantization:
        yield "weights", f"quantized: {markdown_text(export.quantization)}"
    for source, make in TRAINING if run and run.started else ():
        if fact := guarded(source, make, run):
            yield fact


def _method(export: Export, run: RunFiles | None) -> str:
    if run and run.started and value_or_default(run.config, "train_type") == "full":
        return "every weight trained"
    adapter, config = export.adapter, run.config if run and run.started else {}
    if not adapter and not config:
        return "trained with lljax" if is_trained(export, run) else "no training"

    def value(name: str, field: str) -> Any:
        return adapter[name] if name in adapter else value_or_default(config, f"lora.{field}")

    kind = "DoRA" if value("use_dora", "dora") else "LoRA"
    targets = ", ".join(map(str, value("target_modules", "targets")))
    text = f"{kind} of rank {value('r', 'rank')}, alpha {value('lora_alpha', 'alpha'):g}"
    text += " (rank-stabilized)" if value("use_rslora", "rslora") else ""
    text += ", several ranks by pattern" if value("rank_pattern", "rank_pattern") else ""
    text += f", on {markdown_text(targets)}" if targets else ""
    roles = value_or_default(config, "lora.also_train") if config else ()
    whole = [ROLES.get(role, str(role)) for role in roles or adapter.get("modules_to_save") or ()]
    return text + (f"; {markdown_text(', '.join(whole))} trained whole" if whole else "")


def _rope(export: Export, run: RunFiles | None) -> str:
    told = export.config.get("rope_parameters") or export.config.get("rope_scaling") or {}
    kind, factor = told.get("rope_type", told.get("type")), told.get("factor")
    if kind is None and run and run.started:
        kind = value_or_default(run.config, "context.rope.type")
        factor = value_or_default(run.config, "context.rope.factor")
    if kind not in ROPES:
        return "as in the base" if kind in ("default", "keep") else ""
    return ROPES[kind] + (f", factor {factor:g}" if isinstance(factor, (int, float)) else "")


def _objective(run: RunFiles) -> tuple[str, str]:
    name = value_or_default(run.config, "objective.name")
    return "objective", OBJECTIVES.get(name) or markdown_text(name.upper())


def _data(run: RunFiles) -> tuple[str, str] | None:
    part = run.statistics.get("train")
    if not isinstance(part, dict) or not part.get("documents"):
        return None
    text = f"{part['documents']:,} documents"
    text += f", {compact(part['tokens'])} tokens" if part.get("tokens") else ""
    text += f", from {counted(len(part['unread']), 'file')}" if part.get("unread") else ""
    if lengths := part.get("lengths"):
        text += f"; median {lengths['p50']:,} tokens, longest {lengths['max']:,}"
    return "data", text


def _trained(run: RunFiles) -> tuple[str, str] | None:
    if not run.steps:
        return None
    name = str(run.run.get("counted", "tokens"))
    number = float(np.nansum(column(run.steps, name)))
    rows = value_or_default(run.config, "training.rows")
    rows *= value_or_default(run.config, "training.accumulate")
    steps = counted(run.steps[-1]["step"], "step")
    return (
        "trained",
        f"{compact(number)} {markdown_text(name)} in {steps} of {counted(rows, 'row')}",
    )


def _optimizer(run: RunFiles) -> tuple[str, str]:
    name, rate, schedule = (
        value_or_default(run.config, f"optimizer.{field}")
        for field in ("name", "learning_rate", "schedule")
    )
    text = f"{markdown_text(name)}, learning rate {rate:g}, {markdown_text(schedule)}"
    return "optimizer", text


def _precision(run: RunFiles) -> tuple[str, str]:
    dtype, form = (value_or_default(run.config, f"model.{name}") for name in ("dtype", "quantize"))
    held = "" if form == "none" else f", frozen kernels in {markdown_text(form)}"
    return "precision", f"{markdown_text(dtype)}{held}; trained weights in float32"


def _hardware(run: RunFiles) -> tuple[str, str] | None:
    if "device" not in run.run:
        return None
    text = f"{run.run.get('devices', 1):,} × {markdown_text(run.run['device'])}"
    seconds = float(np.nansum(column(run.steps, "seconds"))) if run.steps else 0
    return "hardware", text + (f", {duration(seconds)} in steps" if seconds else "")


TRAINING = (  # the file that a fact is read from, and the function that reads it
    ("config.json", _objective),
    ("data_statistics.json", _data),
    ("metrics.jsonl", _trained),
    ("config.json", _optimizer),
    ("config.json", _precision),
    ("run.json", _hardware),
)


def stages(run: RunFiles) -> Table | None:
    """The stages that the run reached."""
    start, rows = 1, []
    last = run.steps[-1]["step"] if run.steps else 0
    for until, length, attention in schedule_of(run):
        if start > last:
            break
        rows.append([f"{start:,} to {min(until, last):,}", length, ATTENTION.get(attention)])
        start = until + 1
    return Table(["steps", "tokens a row", "attention"], rows) if rows else None
