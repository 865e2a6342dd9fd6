"""The engine and the server: requests at once, time to first token, decoding, compilations.

python scripts/bench/serving.py --model=models/smollm2.gguf --measure=concurrency
python scripts/bench/serving.py --model=models/smollm2.gguf --measure=decode --llama_python=PYTHON

concurrency: requests at once against one after the other, of the engine and over HTTP.
first_token: of a short request while a long prompt is read, and of a second question about a
    document.
decode: seconds of reading prompts and of a step, beside transformers and, with --llama_python (a
    Python that has llama-cpp-python), llama.cpp: all in float32, a process each, in turns.
compilations: programs that `lljax serve` compiles for requests of random lengths after one of each
    size. It serves tiny-512 with a longer context, since sizes do not depend on weights.

Every measurement but the last is repeated, and the fastest counts. Needs the `test` extra.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from lljax.errors import exit_cleanly

PROMPT, TOKENS, AT_ONCE = 512, 128, 6
DOCUMENT, QUESTION, ANSWER = 15_800, 40, 8  # a whole prompt of 16k with its answer
SHORTS = 5  # requests while a document is read
ROWS = (1, 8)
RANDOM = 100  # requests of random lengths
LONGEST = 2048  # tokens of a request to the server whose compilations are counted
TINY = Path("lljax/assets/tiny-512")
SERVE = Path(__file__).parents[1] / "serve.py"
COMPILED = "Finished XLA compilation of"  # with JAX_LOG_COMPILES


# ---------------------------------------------------------------- the engine
def engine_of(model: str, **settings: Any) -> Any:
    """An engine in float32 on `model`, as `lljax serve` makes it."""
    import jax.numpy as jnp

    from lljax.build import load_base
    from lljax.generation.engine import Engine
    from lljax.interop.open import open_base
    from lljax.models.by_layer import split_layers
    from lljax.models.families import spec_from_hf

    base = open_base(model)
    decoder = load_base(base, spec_from_hf(base.config), jnp.float32)
    return Engine(split_layers(decoder), **settings)


def random_prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, vocabulary, (count, length)).tolist()


def fastest(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of several calls."""
    return min(common.timed(call)[1] for _ in range(rounds))


# ---------------------------------------------------------------- concurrency
def concurrency(model: str, rounds: int) -> None:
    """Prints what requests at once take against one after the other."""
    from lljax.generation.completion import Request

    engine = engine_of(model, rows=AT_ONCE)
    prompts = random_prompts(engine.spec.V, AT_ONCE, PROMPT)

    def requests(tokens: int) -> list[Request]:
        return [Request(prompt, tokens) for prompt in prompts]

    def in_turn(tokens: int) -> None:
        for request in requests(tokens):
            engine.run([request])

    def at_once(tokens: int) -> None:
        engine.run(requests(tokens))

    rows = []
    for name, once, turn in (
        ("engine", at_once, in_turn),
        ("over HTTP", *_over_http(model, prompts)),
    ):
        for compiles in (turn, once):
            compiles(2 * AT_ONCE)  # tokens: more than there are turns until all are written
        seconds = [
            fastest(lambda c=c, n=n: c(n), rounds) for c in (turn, once) for n in (TOKENS, 1)
        ]
        rows.append((name, *seconds))
    _stop_servers()
    table = common.table(
        ("", "in turn, s", "at once, s", "ratio", "prompts, s", "written, ratio"),
        left=("",),
        title=f"{AT_ONCE} requests, {PROMPT} tokens read and {TOKENS} written each",
    )
    for name, turn, turn_read, once, once_read in rows:
        written = (turn - turn_read) / (once - once_read)
        cells = f"{turn:.2f}", f"{once:.2f}", f"{turn / once:.2f}", f"{once_read:.2f}"
        table.add_row(name, *cells, f"{written:.2f}")
    common.show(table)


_servers = contextlib.ExitStack()


def _stop_servers() -> None:
    _servers.close()


def _over_http(model: str, prompts: list[list[int]]) -> tuple[Callable, Callable]:
    """What asks a server for so many tokens after each prompt, at once and in turn."""
    port, _ = _servers.enter_context(server(model, "--prefix_cache=0", f"--slots={AT_ONCE}"))

    def ask(prompt: list[int], tokens: int) -> None:
        complete(port, prompt, tokens)

    def at_once(tokens: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: ask(prompt, tokens), prompts))

    def in_turn(tokens: int) -> None:
        for prompt in prompts:
            ask(prompt, tokens)

    return at_once, in_turn


# ---------------------------------------------------------------- time to first token
def first_token(model: str, rounds: int) -> None:
    """Prints times to first token beside and after a document."""
    from lljax.generation.completion import Request
    from lljax.generation.engine import CHUNK

    del rounds  # a document takes long; there are several short requests
    engine = engine_of(model, rows=2, prefix_bytes=4 << 30)
    document, other = random_prompts(engine.spec.V, 2, DOCUMENT)
    questions = random_prompts(engine.spec.V, SHORTS + 2, QUESTION)
    engine.compile(DOCUMENT + QUESTION + ANSWER)
    engine.run([Request(question, ANSWER) for question in questions])  # what is left to compile

    def asked(prompt: list[int]) -> float:
        return common.timed(lambda: engine.run([Request(prompt, 1)]))[1]

    first, second = asked(document + questions[0]), asked(document + questions[1])
    waits = _beside(engine, other + questions[0], questions[2:])
    table = common.table(("", "s", "goal, s"), left=("",), title="Time to first token")
    table.add_row(f"a question about {DOCUMENT:,} tokens", f"{first:.2f}", "")
    table.add_row("another about the same", f"{second:.2f}", f"{first / 10:.2f}")
    for wait, chunk in waits:
        name = f"{QUESTION} tokens while a document is read, {CHUNK} of which take {chunk:.2f} s"
        table.add_row(name, f"{wait:.2f}", f"{2 * chunk:.2f}")
    common.show(table)


def _beside(
    engine: Any, document: list[int], questions: list[list[int]]
) -> list[tuple[float, float]]:
    """The times to first token of `questions`, asked one after the other while `document` is read,
    and the seconds of the chunk before each.
    """
    from lljax.generation.completion import Request
    from lljax.generation.engine import CHUNK

    chunks, waits, done = [], [], threading.Event()

    def step() -> None:
        while not done.is_set():
            before = engine.counts()
            _, seconds = common.timed(engine.step)
            if engine.counts().read - before.read == CHUNK:
                chunks.append(seconds)

    long = engine.submit(Request(document, 1))
    thread = threading.Thread(target=step)
    thread.start()
    random = np.random.default_rng(0)
    for question in questions:
        length = len(chunks) + 3
        while len(chunks) < length:
            time.sleep(0.005)
        chunk = chunks[-1]
        time.sleep(random.uniform(0, chunk))  # somewhere within the next
        heard, began = threading.Event(), time.monotonic()
        engine.submit(Request(question, 1), lambda _, heard=heard: heard.set())
        heard.wait()
        waits.append((time.monotonic() - began, chunk))
    assert long.reason is None, "the document was read before the last question came"
    engine.cancel(long)
    done.set()
    thread.join()
    engine.run([])
    return waits


# ---------------------------------------------------------------- decoding
def of_lljax(model: str, rounds: int) -> dict[int, list[float]]:
    from lljax.generation.completion import Request

    engine, taken = engine_of(model, rows=max(ROWS)), {}
    for rows in ROWS:
        prompts = random_prompts(engine.spec.V, rows, PROMPT)

        def run(tokens: int, prompts: list[list[int]] = prompts) -> None:
            engine.run([Request(prompt, tokens) for prompt in prompts])

        run(TOKENS + 1)  # compiles
        taken[rows] = _read_and_written(run, rounds)
    return taken


def of_transformers(model: str, rounds: int) -> dict[int, list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(model)
    source: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    net: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    net.eval()
    taken = {}
    for rows in ROWS:
        ids = torch.tensor(random_prompts(net.config.vocab_size, rows, PROMPT))

        @torch.no_grad()
        def run(tokens: int, ids: torch.Tensor = ids) -> None:
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
            net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)

        run(2)
        taken[rows] = _read_and_written(run, rounds)
    return taken


def _read_and_written(run: Callable[[int], None], rounds: int) -> list[float]:
    """Seconds until the first token of every row, and of TOKENS more. run: takes tokens."""
    read = fastest(lambda: run(1), rounds)
    return [read, fastest(lambda: run(TOKENS + 1), rounds) - read]


SYSTEMS = {"lljax": of_lljax, "transformers": of_transformers}


def decode(model: str, rounds: int, llama_python: str | None) -> None:
    """Measures the systems in turns and prints them with their ratios to the first."""
    taken = {
        system: common.in_process(
            __file__, f"--model={model}", f"--system={system}", f"--rounds={rounds}"
        )
        for system in SYSTEMS
    }
    if llama_python:
        with tempfile.TemporaryDirectory() as folder:
            wide = in_float32(Path(model), Path(folder) / "float32.gguf")
            taken["llama.cpp"] = _of_llama(llama_python, wide, rounds)
        taken[f"llama.cpp, {quantization(Path(model))}"] = _of_llama(llama_python, model, rounds)
    table = common.table(
        ("", "rows", "prompt tokens/s", "ms a step", "tokens/s", "lljax / it"),
        left=("",),
        title=f"{PROMPT} tokens read and {TOKENS} written in each row",
    )
    for rows, (system, of) in itertools.product(ROWS, taken.items()):
        (read, written), ours = of[str(rows)], taken["lljax"][str(rows)][1]
        cells = f"{rows * PROMPT / read:,.0f}", f"{written / TOKENS * 1e3:.1f}"
        table.add_row(
            system, str(rows), *cells, f"{rows * TOKENS / written:.1f}", f"{written / ours:.2f}"
        )
    common.show(table)


def _of_llama(python: str, model: Any, rounds: int) -> dict[str, list[float]]:
    script = Path(__file__).with_name("serving_llama.py")
    flags = {
        "model": model,
        "rows": ",".join(map(str, ROWS)),
        "prompt": PROMPT,
        "tokens": TOKENS,
        "threads": os.cpu_count(),
        "rounds": rounds,
    }
    command = [python, script, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quantization(path: Path) -> str:
    """The type of most tensors of a GGUF file."""
    import gguf

    return statistics.mode(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)


def in_float32(path: Path, wide: Path) -> Path:
    """Writes a GGUF file with the values of `path` in float32 to `wide`."""
    import gguf

    reader, architecture = gguf.GGUFReader(path), "general.architecture"
    field = reader.fields[architecture]
    writer = gguf.GGUFWriter(wide, field.contents())
    left_out = (architecture, "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name not in left_out and not name.startswith("GGUF."):
            kind, *of = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=of[-1] if of else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wide


# ---------------------------------------------------------------- compilations
def compilations() -> None:
    """Prints what a server compiles for requests of random lengths."""
    random = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(str(longer_tiny(Path(folder))), f"--longest={LONGEST}") as (port, compiled),
    ):

        def ask(length: int, tokens: int) -> None:
            complete(
                port,
                random.integers(0, 4096, length).tolist(),
                min(tokens, LONGEST - length),
            )

        rows = [("start", 0, compiled())]
        for length in sizes():  # the longest of a cache moves on to the next
            ask(length, 16)
        rows.append(("one of each size", len(sizes()), compiled()))
        lengths = random.integers(1, LONGEST - 32, RANDOM).tolist()
        for length in lengths:
            ask(length, int(random.integers(1, 32)))
        rows.append(("random lengths, one at a time", RANDOM, compiled()))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for length in sizes():
                list(pool.map(lambda _, length=length: ask(length, 24), range(8)))
            rows.append(("8 of each size at once", 8 * len(sizes()), compiled()))
            list(pool.map(lambda length: ask(length, 24), lengths))
        rows.append(("random lengths, 8 at once", RANDOM, compiled()))
    table = common.table(("", "requests", "compiled"), left=("",), title="Compilations of a server")
    for (name, count, after), (*_, before) in zip(rows, [rows[0], *rows], strict=False):
        table.add_row(name, str(count), str(after - before if count else after))
    common.show(table)


def sizes() -> list[int]:
    """A prompt length of each size: of the last piece of a prompt, and of a cache."""
    caches = [512 << n for n in range((LONGEST // 512).bit_length())]
    return [slots - 512 + last for slots in caches for last in (20, 100, 504)]


def longer_tiny(folder: Path) -> Path:
    """tiny-512 with a longer context, in a folder."""
    path = folder / "tiny"
    shutil.copytree(TINY, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"max_position_embeddings": 2 * LONGEST}
    (path / "config.json").write_text(json.dumps(config))
    return path


# ---------------------------------------------------------------- HTTP
@contextlib.contextmanager
def server(model: str, *flags: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """Runs `lljax serve`; yields its address, and what counts the programs it has compiled."""
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"JAX_LOG_COMPILES": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is found there was compiled too
        process = subprocess.Popen(
            [sys.executable, SERVE, f"--model={model}", "--port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )

        def compiled() -> int:
            log.seek(0)
            return log.read().count(COMPILED)

        assert process.stdout is not None
        try:
            line = next((x for x in process.stdout if x.startswith("Serving ")), None)
            if line is None:
                log.seek(0)
                sys.exit(f"lljax serve has ended\n{log.read()[-2000:]}")
            yield line.split()[-1], compiled
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def complete(url: str, prompt: list[int], tokens: int) -> None:
    """Asks the server at `url` for exactly so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        written = json.load(answer)["usage"]["completion_tokens"]
    assert written == tokens, f"{written} tokens were written in place of {tokens}"


MEASURES = ("concurrency", "first_token", "decode", "compilations")


def read_arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="models/smollm2.gguf", help="a GGUF file or a folder")
    parser.add_argument("--measure", choices=MEASURES, help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--llama_python", help="a Python with llama-cpp-python; for `decode`")
    parser.add_argument(
        "--system", choices=tuple(SYSTEMS), help="`decode` of one, in this process, as JSON"
    )
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    model, rounds = arguments.model, arguments.rounds
    with exit_cleanly():
        if arguments.system:
            print(json.dumps(SYSTEMS[arguments.system](model, rounds)))
            return
        calls = {
            "concurrency": functools.partial(concurrency, model, rounds),
            "first_token": functools.partial(first_token, model, rounds),
            "decode": functools.partial(decode, model, rounds, arguments.llama_python),
            "compilations": compilations,
        }
        for name in [arguments.measure] if arguments.measure else MEASURES:
            calls[name]()


if __name__ == "__main__":
    main()
