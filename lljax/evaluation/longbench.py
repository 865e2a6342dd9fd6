"""LongBench (Bai et al. 2023, arXiv 2308.14508) and LongBench-E, from the authors' files.

The folder holds NAME.jsonl, or NAME_e.jsonl for LongBench-E, as in LongBench's data.zip. Prompts
and numbers of new tokens come from its config/dataset2prompt.json and dataset2maxlen.json. Decoding
is greedy, as in LongBench. There, samsum's generation stops at a line end; here it does not, and
the first line is scored, which gives the same score.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lljax.errors import ConfigError, DataError
from lljax.evaluation import metrics
from lljax.evaluation.benchmark_files import checked, read_json, read_rows, texts
from lljax.evaluation.fitting import TokenCounter, cut_middle
from lljax.evaluation.task import Example, Task, TooShort, mean

METRICS = {
    "narrativeqa": metrics.qa_f1,
    "qasper": metrics.qa_f1,
    "multifieldqa_en": metrics.qa_f1,
    "multifieldqa_zh": metrics.qa_f1_zh,
    "hotpotqa": metrics.qa_f1,
    "2wikimqa": metrics.qa_f1,
    "musique": metrics.qa_f1,
    "dureader": metrics.rouge_l_zh,
    "gov_report": metrics.rouge_l,
    "qmsum": metrics.rouge_l,
    "multi_news": metrics.rouge_l,
    "vcsum": metrics.rouge_l_zh,
    "trec": metrics.classification,
    "triviaqa": metrics.qa_f1,
    "samsum": metrics.rouge_l,
    "lsht": metrics.classification,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "passage_retrieval_zh": metrics.retrieval,
    "lcc": metrics.code_similarity,
    "repobench-p": metrics.code_similarity,
}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}  # only the first line is scored
NO_CHAT = FIRST_LINE | {"lcc", "repobench-p"}  # prompted without a chat template
EVEN = (  # the tasks of LongBench-E
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
FIELDS = {
    "input": str,
    "context": str,
    "answers": list,
    "length": int,
    "all_classes": None,
    "_id": str,
}
CONFIG = ("dataset2prompt.json", "dataset2maxlen.json")


@dataclasses.dataclass(frozen=True)
class Files:
    """folder: of the data. config: of LongBench's two JSON files of prompts and lengths."""

    folder: Path | None
    config: Path | None


def tasks(folder: Path | None, config: Path | None) -> dict[str, Task]:
    """longbench/NAME and longbench/NAME_e, for the files in `folder`; all of them if it is None.

    config: the folder with LongBench's two JSON files; by default `folder` itself.
    """
    files = Files(folder, config or folder)
    names = [*METRICS, *(f"{name}_e" for name in EVEN)]
    return {
        f"longbench/{name}": Task(
            f"longbench/{name}",
            functools.partial(_examples, name, files),
            mean(functools.partial(grade, name.removesuffix("_e"))),
        )
        for name in names
        if folder is None or not folder.is_dir() or (folder / f"{name}.jsonl").is_file()
    }


def grade(name: str, prediction: str, example: Example) -> float:
    """The task's metric, the best over the answers."""
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    more: Sequence = (example.classes,) if METRICS[name] is metrics.classification else ()
    return max(METRICS[name](prediction, answer, *more) for answer in example.answers)


def _examples(
    name: str, files: Files, tokenizer: Any, length: int, samples: int | None, seed: int
) -> Iterator[Example]:
    folder, config = files.folder, files.config
    if folder is None or config is None:
        raise ConfigError("LongBench is read from its files: name their folder with --longbench")
    if not folder.is_dir():
        raise DataError(f"--longbench={folder}: there is no such folder")
    task, counter = name.removesuffix("_e"), TokenCounter(tokenizer)
    prompts, lengths = (_config(config / file) for file in CONFIG)
    prompt = checked(prompts, str(config / CONFIG[0]), {task: str})[task]
    tokens = checked(lengths, str(config / CONFIG[1]), {task: int})[task]
    if length < 2 * tokens:
        raise TooShort(
            f"longbench/{name}: {tokens} new tokens are too many for a length of {length}: use "
            "longer --lengths"
        )
    path = folder / f"{name}.jsonl"
    for i, row in enumerate(read_rows(path, FIELDS)[:samples], 1):
        where = f"{path}: row {i}"
        classes = (
            texts(row["all_classes"], where, "all_classes")
            if METRICS[task] is metrics.classification
            else ()
        )
        try:
            text = prompt.format(**row)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{config / CONFIG[0]}: the prompt of {task} does not fit the rows ({error!r})"
            ) from None
        answers = texts(row["answers"], where, "answers")
        if METRICS[task] is metrics.retrieval and not all(map(metrics.PARAGRAPH.search, answers)):
            raise DataError(f"{where}: 'answers' name no paragraph, such as 'Paragraph 3'")
        yield Example(
            id=row["_id"],
            prompt=cut_middle(counter, text, length - tokens),
            answers=answers,
            tokens=tokens,
            chat=task not in NO_CHAT,
            classes=classes,
            groups=(bucket(row["length"]),) if name.endswith("_e") else (),
        )


def bucket(words: int) -> str:
    """LongBench-E's group of a text of `words` words (Chinese: characters)."""
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"


def _config(path: Path) -> dict:
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; it is in the folder config/ of LongBench's "
            "repository: name that folder with --longbench_config"
        )
    return read_json(path)
