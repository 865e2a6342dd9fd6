"""The front matter of a model card: the YAML at its top, which the hub reads."""

from typing import Any

from lljax.config.tree import value_or_default
from lljax.report.card_export import (
    TRAINED,
    Export,
    finite_scores,
    is_perplexity,
    is_trained,
    schedule_of,
)
from lljax.report.run_files import RunFiles


def metadata(export: Export, run: RunFiles | None) -> str:
    """The YAML at the top, which the hub reads."""
    from huggingface_hub import ModelCardData

    results = _results(run) if run and not export.quantization and not export.is_gguf else []
    fields: dict[str, Any] = {
        "base_model": export.base if export.base_is_public else None,
        "base_model_relation": _relation(export, run) if export.base_is_public else None,
        "library_name": _library(export),
        **export.license,
        "pipeline_tag": "text-generation",
        "tags": _tags(export, run),
    }
    if results:
        fields |= {"model_name": export.name, "eval_results": results}
    return ModelCardData(**fields).to_yaml()


def _relation(export: Export, run: RunFiles | None) -> str:
    """A trained model in 4 bits or as GGUF is a finetune of its base and no quantization of it."""
    if export.adapter or "lora" in export.format:
        return "adapter"
    return "finetune" if is_trained(export, run) else "quantized"


def _library(export: Export) -> str:
    if export.is_gguf:
        return "gguf"
    return "peft" if export.adapter else "transformers"


def _tags(export: Export, run: RunFiles | None) -> list[str]:
    tags = ["lljax"]
    if run and run.started:
        tags += ["long-context"]
        if any(stage[2] == "shifted" for stage in schedule_of(run)):
            tags += ["longlora"]
        objective = value_or_default(run.config, "objective.name")
        tags += [objective]
        if value_or_default(run.config, "train_type") == "lora":
            tags += ["dora" if value_or_default(run.config, "lora.dora") else "lora"]
    elif export.adapter:
        tags += ["lora"]
    tags += ["gguf"] * export.is_gguf + [export.quantization] * bool(export.quantization)
    if export.adapter:
        tags += ["transformers"]
        tags += [f"base_model:adapter:{export.base}"] * export.base_is_public
    return list(dict.fromkeys(tags))


def _results(run: RunFiles) -> list[Any]:
    """The scores of the trained model as the hub's `EvalResult`s."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="held-out" if is_perplexity(score) else score["task"],
            dataset_name="held-out documents" if is_perplexity(score) else score["task"],
            dataset_config=f"{score['length']} tokens",
            metric_type="perplexity" if is_perplexity(score) else "score",
            metric_name=f"{score['task']} at {score['length']:,} tokens",
            metric_value=round(score["score"], 4),
        )
        for score in finite_scores(run)
        if score["model"].startswith(TRAINED)
    ]
