"""Perplexity by length, and what a model finds in long texts: a base, the base with its RoPE
stretched, and what was trained.

python scripts/evaluate.py --workdir=runs/quickstart --lengths=512,1k,2k,4k
python scripts/evaluate.py --workdir=runs/quickstart --tasks=perplexity,passkey,needle,ruler
--lengths=1k,4k --samples=5 python scripts/evaluate.py --model=Qwen/Qwen3-8B --adapter=my/adapter
--tasks=ruler --lengths=4k,32k --out=runs/ruler --chat

--tasks are perplexity, perplexity/longlora, perplexity/new_tokens, passkey, needle, ruler,
longbench, longbench_e, longbench2, zeroscrolls, zeroscrolls_test, or single ones such as ruler/vt.
Predictions are kept, and the same command goes on from them. Tables and report show what earlier
commands found of the same models as well.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track
from rich.table import Table

from lljax.cli.console import console
from lljax.config import default_config
from lljax.data.template import with_template
from lljax.data.tokens import FIELDS, TokenStore, prepare
from lljax.errors import ConfigError, Stopped, exit_cleanly, printable
from lljax.evaluation import perplexity, registry, results, zeroscrolls
from lljax.evaluation.batched_generation import EvalModel, EvalSettings, score_tasks, too_short
from lljax.evaluation.predictions import Predictions
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.scores import Score
from lljax.evaluation.tables import tables
from lljax.evaluation.task import Example, Sources, TooShort, refuse_beyond
from lljax.hardware.compiler_flags import take_gpu_memory
from lljax.interop.open import end_tokens, tokenizer_fingerprint
from lljax.report.page import write_report
from lljax.run.open import Candidates, of_base, of_run
from lljax.run.restore import read_config

CONSOLE = console()


def evaluate(arguments) -> None:
    if arguments.workdir and arguments.adapter:
        raise ConfigError("--adapter and --workdir: a run has its own; use --model with --adapter")
    if not arguments.workdir and not arguments.out:
        raise ConfigError(
            "--model without --out: name a folder for tables and predictions with --out"
        )
    sources = Sources(
        **{field: getattr(arguments, field) for field in Sources.__dataclass_fields__}
    )
    names = [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise ConfigError(f"--tasks={arguments.tasks}: it names no task; perplexity is one")
    protocols = [name for name in PROTOCOLS if name in names]
    tasks = registry.find([name for name in names if name not in PROTOCOLS], sources)
    candidates = (
        of_run(arguments.workdir)
        if arguments.workdir
        else of_base(arguments.model, arguments.adapter)
    )
    lengths = read_lengths(arguments.lengths) or doublings(
        candidates.extended.rope.original_length, candidates.extended.max_length
    )
    refuse_beyond(lengths[-1], candidates.extended.max_length, "--lengths")
    out = arguments.out or arguments.workdir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"--out={out}: it is no folder") from None
    tokenizer = candidates.base.tokenizer()
    texts = read_held_out(
        arguments,
        protocols,
        lengths,
        held_out(arguments, candidates, tokenizer, out) if protocols else None,
    )
    settings = EvalSettings(
        with_template(tokenizer),
        arguments.samples,
        arguments.seed,
        arguments.chat,
        end_tokens(candidates.base, tokenizer),
        arguments.rows,
        "int8" if arguments.cache == "int8" else None,
    )
    reasons = too_short(progress(tasks, "first examples") if tasks else (), lengths, settings)
    for reason in dict.fromkeys(reasons.values()):
        say(f"– {reason}")
    # no perplexity depends on it
    how = ", chat" * arguments.chat + ", int8 cache" * (arguments.cache == "int8")
    scores, keys = [], {}
    with Predictions(out / "predictions.jsonl") as made:
        for candidate in candidates.models:
            model, name = candidate.load(), candidate.name + how
            key = keys[candidate.name] = keys[name] = candidates.key(
                candidate, model, settings.tokenizer
            )
            where = {"dtype": candidates.dtype, "layout": candidates.layout}
            scores += perplexities(model, candidate.name, key, texts, made, **where)
            evaluated = EvalModel(model, name, key + how, **where)
            found = [*score_tasks(evaluated, tasks, lengths, settings, made, progress=progress)]
            submit(out, name, key + how, found, arguments.samples, made)
            scores += found
            del model  # before the next is read
    scores = results.write(out, scores, keys)
    for table in tables(scores):
        show(table)
    say(f"Report: {write_report(out)}")


def held_out(arguments, candidates: Candidates, tokenizer, out: Path) -> TokenStore:
    """The tokens of --held_out, or else those that the run holds out."""
    if not arguments.held_out and not arguments.workdir:
        raise ConfigError(
            "perplexity of a --model needs documents: name JSONL files with --held_out"
        )
    data = read_config(arguments.workdir).data if arguments.workdir else default_config().data
    if arguments.held_out:
        with data.unlocked():
            data.update(
                {
                    "train": tuple(arguments.held_out.split(",")),
                    "valid": (),
                    "valid_fraction": 0.0,
                    "loss_on": "everything",
                }
            )
    fields = {"train": "--held_out"} if arguments.held_out else FIELDS
    found = prepare(
        data,
        tokenizer,
        candidates.base.config["vocab_size"],
        (out if arguments.held_out else arguments.workdir) / "data",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        progress=progress,
        fields=fields,
    )
    return found.train if arguments.held_out else found.valid


def read_held_out(arguments, protocols, lengths, store) -> dict:
    """What each protocol reads at each length; nothing where the length is too short for it."""
    texts = {}
    for protocol in protocols:
        for length in lengths:
            try:
                texts[protocol, length] = perplexity.read(
                    protocol, store, length, max(lengths), arguments.documents
                )
            except TooShort as error:
                say(f"– {error}")
                texts[protocol, length] = ()
    return texts


def perplexities(
    model, name: str, key: str, texts: dict, made: Predictions, **where
) -> Iterator[Score]:
    """What `read_held_out` gave, measured, or found again: in `made` a perplexity is the answer to
    all that was read.
    """
    digest = lambda pieces: hashlib.sha256(pieces.tobytes()).hexdigest()
    same = {}  # by protocol a digest of what it predicts at every length
    for (protocol, _), pieces in texts.items():
        if len(pieces) and (predicted := perplexity.predicted(protocol, pieces)) is not None:
            same[protocol] = digest(predicted)[:12]
    for (protocol, length), pieces in (
        progress(texts.items(), f"{name}: perplexity") if texts else ()
    ):
        value = math.nan
        if len(pieces):
            read = Example(str(len(pieces)), digest(pieces), (), 0)
            value = parsed(made.find(key, protocol, length, read))
            if math.isnan(value):
                value = perplexity.measure(protocol, model, pieces, length, **where)
                made.add(key, protocol, length, read, repr(value))
        yield Score(name, protocol, length, value, len(pieces), texts=same.get(protocol, ""))


def parsed(text: str | None) -> float:
    """The number that a prediction is; NaN where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def submit(
    out: Path, name: str, key: str, scores: list[Score], samples: int | None, made: Predictions
) -> None:
    """The leaderboard's file of each length at which all examples of all ten tasks of ZeroSCROLLS
    were answered.
    """
    for length in dict.fromkeys(score.length for score in scores):
        asked = {
            score.task.removeprefix("zeroscrolls_test/"): score
            for score in scores
            if score.length == length
            and score.task.startswith("zeroscrolls_test/")
            and score.samples
        }
        # not all were asked for, or one does not fit the length
        if asked.keys() != zeroscrolls.TASKS.keys():
            continue
        path = out / f"zeroscrolls-{results.file_name(name)}-{length}.csv"
        if samples is not None and any(score.samples >= samples for score in asked.values()):
            say(
                f"– {path.name} is not written: the leaderboard takes all examples, and --samples={samples} may leave some out"
            )
        else:
            zeroscrolls.write_submission(
                path, {short: made.of(key, score.task, length) for short, score in asked.items()}
            )


def say(text: str) -> None:
    CONSOLE.print(printable(text), highlight=False, markup=False)


def show(made: dict) -> None:
    table = Table(*made["columns"], caption=made["caption"])
    for row in made["rows"]:
        table.add_row(*row)
    CONSOLE.print(table)


def progress(items, title: str):
    if not CONSOLE.is_terminal:
        say(title)
        return items
    return track(items, title, console=CONSOLE, transient=True)


def read_lengths(text: str) -> list[int]:
    """From "512,4k": [512, 4096]."""
    try:
        lengths = {
            int(each[:-1]) * 1024 if each.endswith("k") else int(each)
            for each in text.lower().split(",")
            if each
        }
    except ValueError:
        lengths = {0}
    if any(length < 1 for length in lengths):
        raise ConfigError(
            f"--lengths={text:.60}: comma-separated numbers of tokens, such as 512,4k"
        )
    return sorted(lengths)


def doublings(first: int, last: int) -> list[int]:
    """`first`, twice, four times ... it, up to and with `last`."""
    lengths = [min(first, last)]
    while lengths[-1] < last:
        lengths.append(min(2 * lengths[-1], last))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a run")
    source.add_argument("--model", help="hub id, folder or GGUF file of a base")
    parser.add_argument(
        "--adapter", type=Path, help="folder of an adapter of --model, in PEFT's format"
    )
    parser.add_argument("--tasks", default="perplexity", help="comma-separated, see above")
    parser.add_argument(
        "--lengths",
        default="",
        help="comma-separated tokens (4k is 4,096); by default the base's context, "
        "twice it ... up to the new one",
    )
    parser.add_argument(
        "--samples", type=int, help="examples of a task and length; by default those of its authors"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the examples that are made up")
    parser.add_argument(
        "--held_out",
        default="",
        help="JSONL files for perplexity; by default what the run holds out",
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=32,
        help="documents, or windows, that perplexity reads, at most",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for tables, predictions and report; by default that of the run",
    )
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("--rows", type=int, default=4, help="examples answered side by side")
    parser.add_argument(
        "--cache",
        choices=("full", "int8"),
        default="full",
        help="int8: keys and values in eight bits",
    )
    for field, help in (
        ("haystack", "a text to hide needles in, for Python's own reference"),
        ("squad", "file of ruler/qa_1: SQuAD 2.0, dev"),
        ("hotpotqa", "file of ruler/qa_2: HotpotQA, dev"),
        ("longbench", "folder of LongBench's files"),
        ("longbench_config", "folder of LongBench's prompts, where it is another"),
        ("longbench2", "file of LongBench v2"),
        ("zeroscrolls", "folder of ZeroSCROLLS"),
    ):
        parser.add_argument(f"--{field}", type=Path, help=help)
    arguments = parser.parse_args()
    take_gpu_memory()
    with exit_cleanly():
        for field in ("samples", "documents", "rows"):
            if getattr(arguments, field) is not None and getattr(arguments, field) < 1:
                raise ConfigError(f"--{field}={getattr(arguments, field)}: a number of at least 1")
        try:
            evaluate(arguments)
        except KeyboardInterrupt:
            raise Stopped("the same command goes on from what was answered") from None
        except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise ConfigError(f"{error.filename}: {error.strerror.lower()}") from None


if __name__ == "__main__":
    main()
