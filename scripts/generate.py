"""Continues a prompt, with a base, a base with an adapter, or with what a run trained.

python scripts/generate.py --workdir=runs/quickstart --prompt='def main():'
python scripts/generate.py --model=lljax/assets/tiny-512 --prompt='import os'
python scripts/generate.py --model=lljax/assets/tiny-512 --adapter=runs/quickstart/export/peft --prompt='import os'
python scripts/generate.py --workdir=runs/mine --chat --prompt='What does this contract say about notice?'
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lljax.command_line import take_gpu_memory
from lljax.data.template import adds_bos, with_template
from lljax.errors import ConfigError, exit_cleanly
from lljax.evaluation.candidates import of_base, of_run
from lljax.generation.generate import stream
from lljax.generation.sample import Sampling
from lljax.interop.base import end_tokens

CACHES = {"full": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a run, whose trained model answers")
    source.add_argument("--model", help="hub id, folder or GGUF file of a base")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter of --model, in PEFT's format")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt")
    text.add_argument("--prompt_file", type=Path)
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model")
    parser.add_argument("--tokens", type=int, default=128, help="at most this many are written")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the text; may be given again")
    parser.add_argument("--cache", choices=CACHES, default="full", help="of keys and values; full: as the model computes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    take_gpu_memory()
    with exit_cleanly():
        answer(arguments)


def answer(arguments) -> None:
    if arguments.workdir and arguments.adapter:
        raise ConfigError("--adapter and --workdir: a run has its own; use --model with --adapter")
    if arguments.prompt_file and not arguments.prompt_file.is_file():
        raise ConfigError(f"--prompt_file={arguments.prompt_file}: there is no such file")
    text = arguments.prompt if arguments.prompt is not None else arguments.prompt_file.read_text()
    found = of_run(arguments.workdir) if arguments.workdir else of_base(arguments.model, arguments.adapter)
    tokenizer = with_template(found.base.tokenizer())
    if arguments.chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    if adds_bos(tokenizer) and not arguments.chat:
        prompt = [tokenizer.bos_token_id, *prompt]
    if not prompt:
        raise ConfigError("the prompt is empty")
    stop = end_tokens(found.base, tokenizer)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty,
                        arguments.seed)
    written, whole, shown = [], "", 0
    for (token,) in stream(found.models[-1].load(), [np.asarray(prompt)], tokens=arguments.tokens, sampling=sampling,
                           dtype=found.dtype, cache_dtype=CACHES[arguments.cache], layout=found.layout):
        if int(token) in stop:
            break
        written.append(int(token))
        whole = tokenizer.decode(written)    # a character may need several tokens, so the whole is decoded each time
        ends = [at for at in map(whole.find, arguments.stop) if at >= 0]
        if ends:
            whole = whole[:min(ends)]
            break
        certain = len(whole) - unsure(whole, arguments.stop)
        if certain > shown:
            print(whole[shown:certain], end="", flush=True)
            shown = certain
    print(whole[shown:])
    print(f"({len(prompt)} + {len(written)} tokens)", file=sys.stderr)


def unsure(text: str, stops: list[str]) -> int:
    """How many characters at the end may change or go: those of an unfinished one, or that may begin a string that ends it."""
    if text.endswith("\N{REPLACEMENT CHARACTER}"):
        return len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


if __name__ == "__main__":
    main()
