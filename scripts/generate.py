"""Continues a prompt, with the base or with what a run trained.

python scripts/generate.py --workdir=runs/quickstart --prompt='def main():'
python scripts/generate.py --model=lljax/assets/tiny-512 --prompt='import os'
python scripts/generate.py --workdir=runs/mine --chat --prompt='What does this contract say about notice?'
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lljax.build import load_base
from lljax.data.template import adds_bos, with_template
from lljax.errors import ConfigError, exit_cleanly
from lljax.generation.generate import stream
from lljax.generation.sample import Sampling
from lljax.interop.base import end_tokens, open_base
from lljax.models import spec
from lljax.restore import restore_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a run, whose trained model answers")
    source.add_argument("--model", help="hub id, folder or GGUF file of a base")
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
    parser.add_argument("--cache", choices=("full", "int8"), default="full", help="int8: keys and values in eight bits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with exit_cleanly():
        answer(arguments)


def answer(arguments) -> None:
    if arguments.workdir:
        config, model, base = restore_run(arguments.workdir)
        dtype = jnp.dtype(config.model.dtype)
    else:
        base, dtype = open_base(arguments.model), jnp.float32
        model = load_base(base, spec.from_hf(base.config), dtype)
    if arguments.prompt_file and not arguments.prompt_file.is_file():
        raise ConfigError(f"--prompt_file={arguments.prompt_file}: there is no such file")
    text = arguments.prompt if arguments.prompt is not None else arguments.prompt_file.read_text()
    tokenizer = with_template(base.tokenizer())
    if arguments.chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    if adds_bos(tokenizer) and not arguments.chat:
        prompt = [tokenizer.bos_token_id, *prompt]
    if not prompt:
        raise ConfigError("the prompt is empty")
    stop = end_tokens(base, tokenizer)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty,
                        arguments.seed)
    written, shown = [], ""
    for (token,) in stream(model, [np.asarray(prompt)], tokens=arguments.tokens, sampling=sampling, dtype=dtype,
                           cache_dtype=jnp.int8 if arguments.cache == "int8" else None):
        if int(token) in stop:
            break
        written.append(int(token))
        whole = tokenizer.decode(written)    # a character may need several tokens, so the whole is decoded each time
        ends = [at for at in map(whole.find, arguments.stop) if at >= 0]
        whole = whole[:min(ends)] if ends else whole
        if ends or not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            print(whole[len(shown):], end="", flush=True)
            shown = whole
        if ends:
            break
    print()
    print(f"({len(prompt)} + {len(written)} tokens)", file=sys.stderr)


if __name__ == "__main__":
    main()
