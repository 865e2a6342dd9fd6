"""llama.cpp's part of gguf_export.py; needs llama-cpp-python and numpy, and nothing of lljax.

python scripts/bench/gguf_llama.py --model=m.gguf --job=job.json --out=out.npz [--lora=lora.gguf]

The job: `tokens`, of which the logits are written, from position `first` on; `greedy`, how many
tokens to write after `prompt`; `texts`, whose tokens are written.
"""

import argparse
import ctypes
import json

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def open_model(path: str) -> ctypes.c_void_p:
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False  # repacked Q4_1 has crashed llama-cpp-python 0.3.36
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot read it")
    return model


class Context:
    """A context of one sequence, with a cache in float32."""

    def __init__(self, model: ctypes.c_void_p, length: int, lora: str | None):
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = length, 512, 512
        parameters.n_threads = parameters.n_threads_batch = 2
        parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
        parameters.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch, self.position = llama_cpp.llama_batch_init(512, 0, 1), 0
        if lora:
            adapter = llama_cpp.llama_adapter_lora_init(model, lora.encode())
            if not adapter:
                raise SystemExit(f"{lora}: llama.cpp cannot read it")
            adapters, scales = (
                (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter),
                (ctypes.c_float * 1)(1.0),
            )
            llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales)

    def logits(self, tokens: list[int], first: int) -> np.ndarray:
        """The logits [T, V] of the next T tokens, from position `first` on."""
        parts = []
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, self.position + i
                self.batch.logits[i] = self.position + i >= first
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            if code := llama_cpp.llama_decode(self.context, self.batch):
                raise SystemExit(f"llama_decode: {code}")
            asked = (i for i in range(len(part)) if self.position + i >= first)
            rows = (llama_cpp.llama_get_logits_ith(self.context, i) for i in asked)
            parts += [np.ctypeslib.as_array(x, (self.vocabulary,)).copy() for x in rows]
            self.position += len(part)
        return np.stack(parts)


def tokenize(model: ctypes.c_void_p, text: str) -> list[int]:
    vocabulary, data = llama_cpp.llama_model_get_vocab(model), text.encode()
    room = len(data) + 16
    tokens = (ctypes.c_int32 * room)()
    n = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, room, True, True)
    return list(tokens[:n])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "job", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lora")
    arguments = parser.parse_args()
    with open(arguments.job) as file:
        job = json.load(file)
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    model, found = open_model(arguments.model), {}
    if tokens := job.get("tokens"):
        context = Context(model, len(tokens), arguments.lora)
        found["logits"] = context.logits(tokens, job["first"])
    if count := job.get("greedy"):
        context = Context(model, len(job["prompt"]) + count, arguments.lora)
        written, new = [], job["prompt"]
        while len(written) < count:
            last = context.position + len(new) - 1
            new = [int(context.logits(new, last)[-1].argmax())]
            written += new
        found["greedy"] = np.array(written)
    if texts := job.get("texts"):
        ids = [tokenize(model, text) for text in texts]
        found["lengths"], found["ids"] = np.array([len(x) for x in ids]), np.concatenate(ids)
    np.savez(arguments.out, **found)


if __name__ == "__main__":
    main()
