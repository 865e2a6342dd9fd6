"""What four bits cost: dense, rounded to nearest, AWQ and GPTQ, calibrated on short and on long
rows, beside llm-compressor on the same rows.

python scripts/bench/compress.py --model=runs/quickstart/export/merged \\
    --data=data/stdlib.jsonl --held_out=data/held_out.jsonl --lengths=512,4096 --group=64 \\
    --peer_python=PYTHON --out=runs/compression

Every export is made in a process of its own, timed with its compilation. llm-compressor needs an
environment of its own, see compress_peer.py; it sees the documents of a packed row as one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from lljax.cli import evaluate as evaluate_command
from lljax.cli import export as export_command
from lljax.config import default_config
from lljax.interop.open import open_base
from lljax.run.calibration import calibration_rows

PEER = Path(__file__).with_name("compress_peer.py")
DENSE = "dense"


def main() -> None:
    flags = arguments()
    if flags.variant:
        return print(json.dumps(export(flags)))
    lengths = [int(length) for length in flags.lengths.split(",")]
    flags.out.mkdir(parents=True, exist_ok=True)
    costs: dict[str, dict[str, float]] = {}
    for name, how in variants(flags, lengths):
        if not (flags.out / name / "cost.json").is_file():
            print(f"{name} ...", flush=True)
            cost = peer(flags, name, how) if name.startswith("peer") else ours(flags, name, how)
            (flags.out / name / "cost.json").write_text(json.dumps(cost))
        costs[name] = json.loads((flags.out / name / "cost.json").read_text())
    evaluate_command.main(
        [
            f"--model={flags.model}",
            f"--exports={','.join(str(flags.out / name) for name in costs)}",
            f"--held_out={flags.held_out}",
            f"--tasks={flags.tasks}",
            f"--lengths={flags.lengths}",
            f"--samples={flags.samples}",
            f"--documents={flags.documents}",
            f"--out={flags.out / 'evaluation'}",
        ]
    )
    scores = json.loads((flags.out / "evaluation" / "evaluation.json").read_text())["scores"]
    common.show(table(costs, scores))


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", required=True, help="a dense folder in HF format")
    parser.add_argument("--data", required=True, help="JSONL of documents to calibrate on")
    parser.add_argument("--held_out", help="JSONL of documents for perplexity")
    parser.add_argument("--lengths", default="512,4096", help="short and long, of rows and tasks")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="of all calibration rows")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="choices of calibration rows for GPTQ")
    parser.add_argument("--tasks", default="perplexity,needle,ruler/niah_single_1")
    parser.add_argument("--samples", type=int, default=3, help="of a task, see lljax evaluate")
    parser.add_argument("--documents", type=int, default=32, help="for perplexity")
    parser.add_argument("--peer_python", help="of an environment with llmcompressor")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def variants(flags: argparse.Namespace, lengths: list[int]) -> Iterator[tuple[str, dict]]:
    """(name of a folder, {method, length, seed}) of every export."""
    short, long = min(lengths), max(lengths)
    yield "rtn", {"method": "rtn", "length": long, "seed": 0}
    yield "awq", {"method": "awq", "length": long, "seed": 0}
    for length in (long, short):
        for seed in range(flags.seeds):
            yield f"gptq-{length}-{seed}", {"method": "gptq", "length": length, "seed": seed}
    if flags.peer_python:
        for method in ("rtn", "awq", "gptq"):
            yield f"peer-{method}", {"method": method, "length": long, "seed": 0}


def ours(flags: argparse.Namespace, name: str, how: dict[str, Any]) -> dict[str, float]:
    return common.in_process(
        __file__,
        f"--model={flags.model}",
        f"--data={flags.data}",
        f"--group={flags.group}",
        f"--tokens={flags.tokens}",
        f"--out={flags.out / name}",
        f"--variant={json.dumps(how)}",
    )


def export(flags: argparse.Namespace) -> dict[str, float]:
    """One export; its seconds and the peak memory of this process."""
    how = json.loads(flags.variant)
    words = [
        f"--model={flags.model}",
        "--format=w4a16",
        f"--group={flags.group}",
        f"--method={how['method']}",
        f"--out={flags.out}",
    ]
    if how["method"] != "rtn":
        words += [
            f"--data={flags.data}",
            f"--length={how['length']}",
            f"--rows={flags.tokens // how['length']}",
            f"--seed={how['seed']}",
        ]
    _, seconds = common.timed(export_command.main, words)
    return {"seconds": seconds, "peak": common.resident("VmHWM")}


def peer(flags: argparse.Namespace, name: str, how: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        rows = calibration_rows(
            default_config(),
            open_base(flags.model),
            Path(folder) / "tokens",
            files=(flags.data,),
            length=how["length"],
            rows=flags.tokens // how["length"],
            seed=how["seed"],
        )
        np.save(f"{folder}/rows.npy", rows.tokens)
        words = [
            f"--model={flags.model}",
            f"--rows={folder}/rows.npy",
            f"--method={how['method']}",
            f"--group={flags.group}",
            f"--out={flags.out / name}",
        ]
        done = subprocess.run([flags.peer_python, PEER, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    cost = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": cost["seconds"], "peak": cost["peak_rss"]}


def table(costs: dict[str, dict[str, float]], scores: list[dict[str, Any]]) -> Any:
    """A row for each method; seeds are averaged, with their standard deviation."""
    columns = list(dict.fromkeys((score["task"], score["length"]) for score in scores))
    by_model: dict[str, dict] = {}
    for score in scores:
        name = score["model"].split(" (")[0]
        name = DENSE if name == "base" else name
        by_model.setdefault(name, {})[score["task"], score["length"]] = score["score"]
    groups: dict[str, list[str]] = {}
    for name in by_model:
        seeded = name.startswith("gptq-")
        groups.setdefault(name.rpartition("-")[0] if seeded else name, []).append(name)
    shown = common.table(
        ("model", *(f"{task} {length:,}" for task, length in columns), "seconds", "peak GB"),
        left=("model",),
    )
    for group, names in groups.items():
        cost = [costs[name] for name in names if name in costs]
        shown.add_row(
            group,
            *(mean([by_model[name].get(column) for name in names]) for column in columns),
            mean([each["seconds"] for each in cost], 0),
            mean([each["peak"] / common.GB for each in cost]),
        )
    return shown


def mean(values: list[float | None], digits: int = 2) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
