"""llama.cpp's part of serving.py; needs llama-cpp-python and numpy, and nothing of lljax.

python scripts/bench/serving_llama.py --model=smollm2-f32.gguf --rows=8

Prints JSON: for each value of --rows the seconds in which prompts of --prompt tokens are read, and
in which --tokens more are written to each, greedily.
"""

import argparse
import ctypes
import json
import time

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


class Rows:
    """Sequences of a context that are decoded together."""

    def __init__(self, model: ctypes.c_void_p, rows: int, length: int, threads: int):
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = rows * length, rows
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def read(self, tokens: list[int], rows: list[int], positions: list[int], ask: list[int]):
        """Reads tokens of these rows and positions; returns the next token after those in `ask`."""
        batch, self.batch.n_tokens = self.batch, len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, positions[i], i in ask
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, rows[i]
        if code := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode: {code}")
        logits = (llama_cpp.llama_get_logits_ith(self.context, i) for i in ask)
        return [int(np.ctypeslib.as_array(x, (self.vocabulary,)).argmax()) for x in logits]

    def free(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


def seconds(rows: Rows, prompts: np.ndarray, tokens: int) -> tuple[float, float]:
    """Of reading `prompts` [rows, length], and of writing `tokens` after the first of each row."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(rows.context), True)
    began, drawn, numbers = time.perf_counter(), [], list(range(len(prompts)))
    length = prompts.shape[1]
    for row, prompt in enumerate(prompts.tolist()):
        for start in range(0, length, 512):
            part = prompt[start : start + 512]
            places = list(range(start, start + len(part)))
            last = rows.read(part, [row] * len(part), places, [len(part) - 1])
        drawn += last
    read = time.perf_counter()
    for position in range(length, length + tokens):
        drawn = rows.read(drawn, numbers, [position] * len(drawn), numbers)
    return read - began, time.perf_counter() - read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    arguments = parser.parse_args()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False  # repacked Q4_1 has crashed llama-cpp-python 0.3.36
    model = llama_cpp.llama_model_load_from_file(arguments.model.encode(), parameters)
    if not model:
        raise SystemExit(f"{arguments.model}: llama.cpp cannot read it")
    taken = {}
    for count in map(int, arguments.rows.split(",")):
        rows = Rows(model, count, arguments.prompt + arguments.tokens + 1, arguments.threads)
        random = np.random.default_rng(0)
        prompts = random.integers(0, rows.vocabulary, (count, arguments.prompt))
        rounds = [seconds(rows, prompts, arguments.tokens) for _ in range(arguments.rounds)]
        taken[count] = [min(values) for values in zip(*rounds, strict=True)]
        rows.free()
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
