"""An export as its model card sees it, and what several parts of the card read."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lljax.data.files import read_object
from lljax.report.content import Section
from lljax.report.numbers import to_float
from lljax.report.run_files import RunFiles

Result = TypeVar("Result")

BASE, TRAINED = "base", "trained"  # what names of models in evaluation.json begin with
# A path of a machine, of which a card shows the last part.
PATH = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?/(?:[^\s/'\",|]+/)*([^\s/'\",|]+)")


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


def markdown_text(value: Any) -> str:
    """`value` as one line of Markdown that is neither markup nor the end of a table's cell."""
    text = " ".join(without_paths(str(value)).split())
    return re.sub(r"([|<>`*\[\]]|\b_|_\b)", r"\\\1", text)


def without_paths(text: str) -> str:
    """`text` with the last part of every path in the place of the path."""
    return PATH.sub(r"\1", text)


def base_link(export: Export) -> str:
    name = markdown_text(export.base or "an unnamed base")
    return f"[{name}](https://huggingface.co/{export.base})" if export.base_is_public else name


def lengths_of(export: Export, run: RunFiles | None) -> tuple[int | None, int | None]:
    """Tokens that the base was made for, and that the model reads."""
    before = run.run.get("base_length") if run else None
    after = run.context.get("length") if run else None
    after = after if type(after) is int else export.config.get("max_position_embeddings")
    return (before if type(before) is int else None), (after if type(after) is int else None)


def is_trained(export: Export, run: RunFiles | None) -> bool:
    told = export.record.get("trained")
    if told is None and not (run and run.started):  # not recorded: dense weights are of a run
        return not export.quantization and not export.is_gguf
    return bool(told or (run and run.started))


def finite_scores(run: RunFiles) -> list[dict[str, Any]]:
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


def is_perplexity(score: Mapping[str, Any]) -> bool:
    return score["task"].startswith("perplexity")


def schedule_of(run: RunFiles) -> list[Any]:
    schedule = run.context.get("schedule")
    stages = schedule if isinstance(schedule, list) else []
    return [
        stage
        for stage in stages
        if isinstance(stage, list) and len(stage) == 3 and all(type(n) is int for n in stage[:2])
    ]


def guarded(source: str, make: Callable[..., Result | None], *arguments: Any) -> Result | None:
    return Section().guarded(source, make, *arguments)
