"""The model card of an export: README.md for the hub, with its pictures, from what the export and
its run recorded.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lljax.config.tree import value_or_default
from lljax.data.files import read_object
from lljax.errors import counted
from lljax.report.content import Section, Table
from lljax.report.curves import headline_chart
from lljax.report.drawing import png
from lljax.report.evaluations import during_training, heatmap_chart
from lljax.report.lm_eval import lm_eval_table
from lljax.report.numbers import column, compact, duration, four_figures, to_float
from lljax.report.run_files import RunFiles
from lljax.report.summary import finding
from lljax.report.tables import cell, numeric_column, table_of

Result = TypeVar("Result")

CARD, LOSS = "README.md", "loss.png"
BASE, TRAINED = "base", "trained"  # what names of models in evaluation.json begin with
FEW = 50  # examples, below which a score is called uncertain
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
# A path of a machine, of which a card shows the last part.
PATH = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?/(?:[^\s/'\",|]+/)*([^\s/'\",|]+)")
# What the one who exports could do instead, in a comment among these lines.
ADVICE = re.compile(r"^(# .*?): (?:export with )?--\w+=.*$", re.MULTILINE)
# A line of a shell among the lines of Python that load an export.
SHELL = re.compile(r"(?:# )?((?:[A-Z_]+=\S+ )*(?:vllm|ollama|llama-[\w-]+|\./llama-[\w-]+) .*)")


@dataclass(frozen=True)
class Export:
    """An exported folder for a repository of the hub.

    repo: OWNER/NAME. record: of the export, see `lljax.interop.export_folder`. base: hub id of the
      base, or the name of a local one; "" if unknown. base_is_public: it is a hub id.
    license: the card's fields of it, {} if unknown; license_from: who says so.
    """

    folder: Path
    repo: str
    record: Mapping[str, Any]
    base: str = ""
    base_is_public: bool = False
    license: Mapping[str, str] = field(default_factory=dict)
    license_from: str = ""
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]

    @property
    def format(self) -> str:
        return str(self.record["format"])

    @property
    def adapter(self) -> dict[str, Any]:
        """adapter_config.json; {} if the export has no adapter for PEFT."""
        folders = (self.folder, self.folder / "adapter")
        return next(filter(None, (read_object(f / "adapter_config.json") for f in folders)), {})

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the exported model; of an adapter, the fields that it changes."""
        files = ("config.json", "rope.json", "base/config.json")
        return next(filter(None, (read_object(self.folder / file) for file in files)), {})

    @property
    def is_gguf(self) -> bool:
        return any(str(file).endswith(".gguf") for file in self.record["files"])

    @property
    def quantization(self) -> str:
        """The method that quantized the exported weights; "" if none did."""
        told = self.config.get("quantization_config")
        return str(told.get("quant_method", "quantized")) if isinstance(told, dict) else ""


def card_files(export: Export, files: RunFiles | None) -> dict[str, bytes]:
    """The card and its pictures, by name.

    files: of the run that was exported, or of a folder with an evaluation; None without one.
    """
    run = _until(files, export.record.get("step")) if files else None
    drawn, usage = _pictures(run) if run else {}, usage_blocks(export)
    pictures = {name: title for name, (title, _) in drawn.items()}
    parts = {
        "metadata": _metadata(export, run),
        "summary": _summary(export, run),
        "finding": _guarded("evaluation.json", _finding, run) if run else None,
        "usage": usage,
        "base_to_find": export.base if _is_named(export, usage) else "",
        "tables": _tables(run, newest=run is files) if run else [],
        "heatmaps": {name: pictures[name] for name in pictures if name != LOSS},
        "facts": [*_facts(export, run)],
        "stages": _guarded("config.json", _stages, run) if run and run.started else None,
        "loss": pictures.get(LOSS),
        "limits": [*_limits(export, run)],
    }
    template = _environment().get_template("card.md.j2")
    text = template.render(export=export, version=version("lljax"), **parts)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    contents = {name: content for name, (_, content) in drawn.items()}
    return {CARD: text.encode("utf-8", "replace"), **contents}


def _environment():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lljax", "assets"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"text": markdown_text, "table": markdown_table}
    return environment


def markdown_text(value: Any) -> str:
    """`value` as one line of Markdown that is neither markup nor the end of a table's cell."""
    text = " ".join(without_paths(str(value)).split())
    return re.sub(r"([|<>`*\[\]]|\b_|_\b)", r"\\\1", text)


def without_paths(text: str) -> str:
    """`text` with the last part of every path in the place of the path."""
    return PATH.sub(r"\1", text)


def markdown_table(table: Table) -> str:
    """A table in Markdown, numbers to the right."""
    columns = range(len(table.columns))
    rules = ["---:" if numeric_column(table.rows, i) else "---" for i in columns]
    rows = [[cell(value).text for value in row] for row in table.rows]
    lines = [[*map(markdown_text, row)] for row in (table.columns, *rows)]
    lines.insert(1, rules)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def usage_blocks(export: Export) -> list[tuple[str, str]]:
    """(language, lines) that load the export from a folder of the repository's name: the recorded
    lines, those of a shell apart.
    """
    usage = str(export.record.get("usage", ""))
    base = str(export.record.get("base", ""))
    paths = [(str(export.record.get("written_to", "")), export.name), (base, export.base)]
    if base.endswith(".gguf"):  # transformers takes its folder
        paths.append((str(Path(base).parent), export.base if export.base_is_public else "."))
    for path, name in paths:
        if path and name:
            usage = replace_path(usage, path, name)
    python, shell = [], []
    for line in ADVICE.sub(r"\1.", usage).splitlines():
        if match := SHELL.fullmatch(line):
            shell.append(match[1])
        else:
            python.append(line)
    blocks = [("python", "\n".join(python).strip()), ("bash", "\n".join(shell).strip())]
    return [(language, lines) for language, lines in blocks if lines]


def _is_named(export: Export, usage: list[tuple[str, str]]) -> bool:
    """Whether the lines name a base that is not on the hub."""
    name = rf"(['\"]|serve ){re.escape(export.base)}(['\"\s]|$)"
    if export.base_is_public or not export.base:
        return False
    return any(re.search(name, lines) for _, lines in usage)


def replace_path(usage: str, path: str, name: str) -> str:
    """The lines with `name` in place of `path`, where it stands as a path: in quotes, as a value or
    argument, whole or before a slash.
    """
    before = r"""(['"=]|\bserve |\s-{1,2}[\w-]+ )"""
    return re.sub(
        rf"{before}{re.escape(path)}(?=['\"/\s]|$)",
        lambda match: match[1] + name,
        usage,
        flags=re.MULTILINE,
    )


def _until(files: RunFiles, step: Any) -> RunFiles:
    """The run up to the step that was exported. Its evaluation, which is of the newest checkpoint,
    counts if there is no later step.
    """
    if type(step) is not int or not files.steps or step >= files.steps[-1]["step"]:
        return files
    return replace(
        files,
        steps=[record for record in files.steps if record["step"] <= step],
        evaluations=[record for record in files.evaluations if record["step"] <= step],
        evaluation={},
    )


# ---------------------------------------------------------------- front matter
def _metadata(export: Export, run: RunFiles | None) -> str:
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
    return "finetune" if _is_trained(export, run) else "quantized"


def _is_trained(export: Export, run: RunFiles | None) -> bool:
    told = export.record.get("trained")
    if told is None and not (run and run.started):  # not recorded: dense weights are of a run
        return not export.quantization and not export.is_gguf
    return bool(told or (run and run.started))


def _library(export: Export) -> str:
    if export.is_gguf:
        return "gguf"
    return "peft" if export.adapter else "transformers"


def _tags(export: Export, run: RunFiles | None) -> list[str]:
    tags = ["lljax"]
    if run and run.started:
        tags += ["long-context"]
        if any(stage[2] == "shifted" for stage in _schedule(run)):
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
            dataset_type="held-out" if _is_perplexity(score) else score["task"],
            dataset_name="held-out documents" if _is_perplexity(score) else score["task"],
            dataset_config=f"{score['length']} tokens",
            metric_type="perplexity" if _is_perplexity(score) else "score",
            metric_name=f"{score['task']} at {score['length']:,} tokens",
            metric_value=round(score["score"], 4),
        )
        for score in _scores(run)
        if score["model"].startswith(TRAINED)
    ]


def _scores(run: RunFiles) -> list[dict[str, Any]]:
    """The finite scores of evaluation.json."""
    rows = run.evaluation.get("scores")
    return [
        row
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict)
        and all(type(row.get(name)) is str for name in ("model", "task"))
        and all(type(row.get(name)) is int for name in ("length", "samples"))
        and math.isfinite(to_float(row.get("score")))
    ]


def _is_perplexity(score: Mapping[str, Any]) -> bool:
    return score["task"].startswith("perplexity")


# ---------------------------------------------------------------- what it is
def _summary(export: Export, run: RunFiles | None) -> str:
    """The first sentence: what this is."""
    base = _link(export)
    if export.adapter:
        kind = f"A LoRA adapter for {base}"
        kind += ", with the base to serve it on," if export.format == "split" else ""
    else:
        kind = f"A fine-tune of {base}" if _is_trained(export, run) else base
    kind += f" in the format {export.format}" if export.is_gguf or export.quantization else ""
    before, after = _lengths(export, run)
    if not after:
        return f"{kind}."
    grown = f" instead of {before:,}" if before and before < after else ""
    return f"{kind} for texts of up to {after:,} tokens{grown}."


def _link(export: Export) -> str:
    name = markdown_text(export.base or "an unnamed base")
    return f"[{name}](https://huggingface.co/{export.base})" if export.base_is_public else name


def _lengths(export: Export, run: RunFiles | None) -> tuple[int | None, int | None]:
    """Tokens that the base was made for, and that the model reads."""
    before = run.run.get("base_length") if run else None
    after = run.context.get("length") if run else None
    after = after if type(after) is int else export.config.get("max_position_embeddings")
    return (before if type(before) is int else None), (after if type(after) is int else None)


def _finding(run: RunFiles) -> Table | None:
    facts = [fact for fact in finding(run).facts if fact.before is not None]
    rows = [[fact.label, fact.before, fact.value, fact.note] for fact in facts]
    notes = [re.sub(r"^base \u2192 trained(, )?", "", str(row[3])) for row in rows]
    base = not run.evaluations or bool(run.evaluation.get("finding"))
    columns = ["", *(("base", "trained") if base else ("first", "last")), "note"]
    rows = [[*row[:3], note] for row, note in zip(rows, notes, strict=True)]
    return Table(columns, rows) if rows else None


def _tables(run: RunFiles, *, newest: bool) -> list[Table]:
    """The tables of the evaluation, or else of the evaluations during training; those of lm-eval if
    the export is of the newest checkpoint.
    """
    section = Section()
    section.extend(section.tables, "evaluation.json", table_of, run.evaluation.get("tables"))
    if not section.tables and run.evaluations:
        table = section.guarded("metrics.jsonl", during_training, run.evaluations)
        section.tables += [table] if table else []
    if newest:
        table = section.guarded("lm-eval's results", lm_eval_table, run.workdir)
        section.tables += [table] if table else []
    return section.tables


def _pictures(run: RunFiles) -> dict[str, tuple[str, bytes]]:
    """{file: (title, PNG)}: the heatmaps of base and trained model, and the loss."""
    section, drawn = Section(), {}
    rows = run.evaluation.get("charts")
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or row.get("kind") != "heatmap":
            continue
        title = str(row.get("title", ""))
        model = title.rpartition(": ")[2]
        if model == BASE or model.startswith(TRAINED):
            figure = section.guarded("evaluation.json", heatmap_chart, row)
            if figure is not None:
                name = re.sub(r"\W+", "-", model.lower()).strip("-")
                drawn[f"needles-{name}.png"] = title, png(figure)
    if run.steps:
        chart = section.guarded("metrics.jsonl", headline_chart, run)
        if chart is not None:
            drawn[LOSS] = f"{chart[1]} over the steps", png(chart[0])
    return drawn


# ---------------------------------------------------------------- how it was trained
def _facts(export: Export, run: RunFiles | None) -> Iterator[tuple[str, str]]:
    """(label, text) of what was done, as far as it is recorded."""
    if export.base:
        revision = value_or_default(run.config, "model.revision") if run and run.started else "main"
        at = "" if revision == "main" else f", revision {markdown_text(revision)}"
        where = at if export.base_is_public else " (a local model without a hub id)"
        yield "base", f"{_link(export)}{where}"
    if method := _guarded("config.json", _method, export, run):
        yield "method", method
    before, after = _lengths(export, run)
    if after:
        yield "context", f"{before:,} → {after:,} tokens" if before else f"{after:,} tokens"
    if rope := _guarded("config.json", _rope, export, run):
        yield "RoPE", rope
    if export.quantization:
        yield "weights", f"quantized: {markdown_text(export.quantization)}"
    for source, make in TRAINING if run and run.started else ():
        if fact := _guarded(source, make, run):
            yield fact


def _method(export: Export, run: RunFiles | None) -> str:
    if run and run.started and value_or_default(run.config, "train_type") == "full":
        return "every weight trained"
    adapter, config = export.adapter, run.config if run and run.started else {}
    if not adapter and not config:
        return "trained with lljax" if _is_trained(export, run) else "no training"

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


def _guarded(source: str, make: Callable[..., Result | None], *arguments: Any) -> Result | None:
    return Section().guarded(source, make, *arguments)


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


def _schedule(run: RunFiles) -> list[Any]:
    schedule = run.context.get("schedule")
    stages = schedule if isinstance(schedule, list) else []
    return [
        stage
        for stage in stages
        if isinstance(stage, list) and len(stage) == 3 and all(type(n) is int for n in stage[:2])
    ]


def _stages(run: RunFiles) -> Table | None:
    """The stages that the run reached."""
    start, rows = 1, []
    last = run.steps[-1]["step"] if run.steps else 0
    for until, length, attention in _schedule(run):
        if start > last:
            break
        rows.append([f"{start:,} to {min(until, last):,}", length, ATTENTION.get(attention)])
        start = until + 1
    return Table(["steps", "tokens a row", "attention"], rows) if rows else None


# ---------------------------------------------------------------- what is not known
def _evaluated(run: RunFiles) -> list[int]:
    """The lengths at which the trained model was evaluated."""
    lengths = {s["length"] for s in _scores(run) if s["model"].startswith(TRAINED)}
    return sorted(lengths)


def _limits(export: Export, run: RunFiles | None) -> Iterator[str]:
    _, length = _lengths(export, run)
    scores, lengths = (_scores(run), _evaluated(run)) if run else ([], [])
    if not scores:
        during = " beyond the held-out documents of the training" if run and run.evaluations else ""
        yield f"It was not evaluated{during}: measure it on your task before you rely on it."
    if lengths and length and lengths[-1] < length:
        yield (
            f"It was evaluated up to {lengths[-1]:,} tokens, and reads {length:,}: how well it "
            "does in between is not known."
        )
    elif lengths:
        yield f"It was evaluated up to {lengths[-1]:,} tokens; nothing is known beyond."
    if scores and (least := min(score["samples"] for score in scores)) < FEW:
        yield (
            f"Some scores rest on {counted(least, 'example')}: small differences between them are "
            "chance."
        )
    if scores and (export.quantization or export.is_gguf):
        yield "The scores are of the trained weights before they were written in this format."
    if run:
        yield from _costs(scores)
    if run and run.started and (stages := _schedule(run)) and stages[-1][2] != "full":
        yield (
            f"Its training ended in {stages[-1][2]} attention, while it is used with full "
            "attention: retrieval from long texts tends to suffer from that."
        )
    yield (
        "Knowledge, instruction following, safety and bias were not measured; those of the base "
        "may have changed."
        if run and run.started
        else "Knowledge, safety and bias are not measured here: see the base's card."
    )


def _costs(scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Tasks whose score at the shortest common length is worse than the base's."""
    by_key = {(s["model"], s["task"], s["length"]): float(s["score"]) for s in scores}
    for task in dict.fromkeys(score["task"] for score in scores):
        both = [n for m, t, n in by_key if m == TRAINED and t == task and (BASE, t, n) in by_key]
        if not both:
            continue
        shortest = min(both)
        after, before = by_key[TRAINED, task, shortest], by_key[BASE, task, shortest]
        if after > before if task.startswith("perplexity") else after < before:
            yield (
                f"Short texts pay for the long ones: {markdown_text(task)} at {shortest:,} tokens "
                f"is {four_figures(after)}, and {four_figures(before)} for the base."
            )
