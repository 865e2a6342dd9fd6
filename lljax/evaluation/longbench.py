"""LongBench (Bai et al. 2023, arXiv 2308.14508) and LongBench-E, from the files and prompts of its
authors.

The folder holds NAME.jsonl, or NAME_e.jsonl for LongBench-E, as in LongBench's data.zip. The
prompts and the number of new tokens are those of its config/dataset2prompt.json and
dataset2maxlen.json. Decoding is greedy there. samsum's generation ends at a line end there; here it
does not, and the first line is scored alike.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from lljax.errors import ConfigError, DataError
from lljax.evaluation import metrics
from lljax.evaluation.records import checked, read_json, read_rows, texts
from lljax.evaluation.sizes import Counter, cut_middle
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
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}  # of the prediction is scored, no more
NO_CHAT = FIRST_LINE | {"lcc", "repobench-p"}  # asked without a chat template
EVEN = (
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
)  # those of LongBench-E
FIELDS = {
    "input": str,
    "context": str,
    "answers": list,
    "length": int,
    "all_classes": None,
    "_id": str,
}
CONFIG = ("dataset2prompt.json", "dataset2maxlen.json")


def tasks(folder: Path | None, config: Path | None) -> dict[str, Task]:
    """longbench/NAME and longbench/NAME_e, for what is there of `folder`; all of them where none is
    named.

    config: the folder with LongBench's two JSON files; by default `folder` itself.
    """
    names = [*METRICS, *(f"{name}_e" for name in EVEN)]
    return {
        f"longbench/{name}": Task(
            f"longbench/{name}",
            functools.partial(_examples, name, folder, config or folder),
            mean(functools.partial(grade, name.removesuffix("_e"))),
        )
        for name in names
        if folder is None or not folder.is_dir() or (folder / f"{name}.jsonl").is_file()
    }


def grade(name: str, prediction: str, example: Example) -> float:
    """The best over the answers of the task's metric."""
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    more: Sequence = (example.classes,) if METRICS[name] is metrics.classification else ()
    return max(METRICS[name](prediction, answer, *more) for answer in example.answers)


def _examples(
    name: str,
    folder: Path | None,
    config: Path | None,
    tokenizer,
    length: int,
    samples: int | None,
    seed: int,
) -> Iterator[Example]:
    if folder is None:
        raise ConfigError("LongBench is read from its files: name their folder with --longbench")
    if not folder.is_dir():
        raise DataError(f"--longbench={folder}: there is no such folder")
    task, counter = name.removesuffix("_e"), Counter(tokenizer)
    prompts, lengths = (_config(config / file) for file in CONFIG)
    prompt = checked(prompts, str(config / CONFIG[0]), {task: str})[task]
    tokens = checked(lengths, str(config / CONFIG[1]), {task: int})[task]
    if length < 2 * tokens:
        raise TooShort(
            f"longbench/{name}: {tokens} tokens are written, too many for a length of {length}: ask for longer "
            "ones with --lengths"
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
            row["_id"],
            cut_middle(counter, text, length - tokens),
            answers,
            tokens,
            chat=task not in NO_CHAT,
            classes=classes,
            groups=(bucket(row["length"]),) if name.endswith("_e") else (),
        )


def bucket(words: int) -> str:
    """LongBench-E's group of a text of so many words (Chinese: characters)."""
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"


def _config(path: Path) -> dict:
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; it is in the folder config/ of LongBench's repository, which "
            "--longbench_config names"
        )
    return read_json(path)
