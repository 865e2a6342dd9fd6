"""Evaluate by length: perplexity, retrieval and benchmarks of a base, the base with its RoPE
stretched, and the trained model.

lljax evaluate --workdir=runs/quickstart --lengths=512,1k,2k,4k
lljax evaluate --workdir=runs/quickstart --tasks=perplexity,passkey,needle,ruler --lengths=1k,4k \\
    --samples=5
lljax evaluate --workdir=runs/quickstart --exports=runs/quickstart/export/w4a16 --lengths=512,4k
lljax evaluate --model=Qwen/Qwen3-8B --adapter=my/adapter --tasks=ruler --lengths=4k,32k \\
    --out=runs/ruler --chat

--tasks are perplexity, perplexity/longlora, perplexity/new_tokens, passkey, needle, keychain,
ruler, longbench, longbench_e, longbench2, zeroscrolls, zeroscrolls_test, or single ones such as
ruler/vt. Predictions are kept, and the same command resumes from them. Tables and report also show
earlier results for the same models.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import add_model, check_model, model_flag, parser, positive, whole
from lljax.errors import ConfigError, Stopped, exit_cleanly

FILES = (  # fields of lljax.evaluation.task.Sources
    ("haystack", "a text to hide needles in, for Python's own reference"),
    ("squad", "file of ruler/qa_1: SQuAD 2.0, dev"),
    ("hotpotqa", "file of ruler/qa_2: HotpotQA, dev"),
    ("longbench", "folder of LongBench's files"),
    ("longbench_config", "folder of LongBench's prompts, if it is another"),
    ("longbench2", "file of LongBench v2"),
    ("zeroscrolls", "folder of ZeroSCROLLS"),
)


def main(argv: Sequence[str]) -> None:
    """Measures the models, prints the tables, and writes them, predictions and the report."""
    arguments = _parser().parse_args(argv)
    with exit_cleanly():
        check(arguments)
        try:
            # Imported here: --help and wrong flags need no jax.
            from lljax.cli.measure import evaluate
            from lljax.hardware.compiler_flags import take_gpu_memory
            from lljax.parallel.processes import processes_on_host

            take_gpu_memory(processes_on_host)
            with model_flag():
                evaluate(arguments)
        except KeyboardInterrupt:
            raise Stopped("the same command resumes from the predictions so far") from None
        except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise ConfigError(f"{error.filename}: {(error.strerror or '').lower()}") from None


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags that exclude each other, and without a folder for results."""
    check_model(arguments)
    if not arguments.workdir and not arguments.out:
        raise ConfigError(
            "--model without --out: name a folder for tables and predictions with --out"
        )


def _parser() -> argparse.ArgumentParser:
    command = parser("evaluate", __doc__)
    add_model(command, "a run")
    command.add_argument(
        "--exports",
        default="",
        help="folders of exported checkpoints to measure beside it, comma-separated",
    )
    command.add_argument("--tasks", default="perplexity", help="comma-separated, see above")
    command.add_argument(
        "--lengths",
        default="",
        help="comma-separated tokens (4k is 4,096); by default the base's context, doubled up to "
        "the new one",
    )
    command.add_argument(
        "--samples",
        type=positive,
        help="examples of a task and length; by default as its authors use",
    )
    command.add_argument("--seed", type=whole, default=0, help="of the generated examples")
    command.add_argument(
        "--held_out",
        default="",
        help="JSONL files for perplexity; by default the held-out documents of the run",
    )
    command.add_argument(
        "--documents",
        type=positive,
        default=32,
        help="documents or windows for perplexity, at most",
    )
    command.add_argument(
        "--out",
        type=Path,
        help="folder for tables, predictions and report; by default the run's",
    )
    command.add_argument("--chat", action="store_true", help="ask through the chat template")
    command.add_argument("--rows", type=positive, default=4, help="examples answered side by side")
    command.add_argument(
        "--cache",
        choices=("full", "int8"),
        default="full",
        help="int8: keys and values in eight bits",
    )
    for field, help in FILES:
        command.add_argument(f"--{field}", type=Path, help=help)
    return command
