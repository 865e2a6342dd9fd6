"""The tokenizer of a model folder, as its tokenizer.json and tokenizer_config.json define it.

AutoTokenizer of transformers 5 rebuilds some tokenizers from their vocabulary and the rules of a
class (LlamaTokenizer drops one of several leading spaces) and ignores `add_bos_token`.
PreTrainedTokenizerFast loads tokenizer.json unchanged; its ids are still compared with the ids of
the `tokenizers` library.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from lljax.errors import ModelError, first_line

# Texts that tokenizers of different rules split differently.
PROBES = (
    "hello world",
    "Hello  world",
    " one leading space",
    "  two",
    "    x = 1",
    "\n\n\n",
    " \n \t\n",
    "a\n\nb\r\nc",
    "trailing  ",
    "def f(x):\n\treturn x[0] + 1  # it's\n",
    "3.14159 12345678 1,000",
    "e\u0301 \u00e9 \ufb01 \u00bd \u2126",  # accents, ligatures
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441",  # scripts
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f642\U0001f469\u200d\U0001f4bb",
    "\u2581x \u200b\u00a0y",  # emoji, spaces
    "I'LL don't CamelCase snake_case",
    "<b>&amp;</b> {{x}} \\n",
)
# The fields of tokenizer_config.json that are used here, and their types.
FIELDS = {
    "model_max_length": (int, float),
    "chat_template": (str, list),
    "added_tokens_decoder": (dict,),
    "add_bos_token": (bool,),
    "add_eos_token": (bool,),
    "bos_token": (str, dict),
    "eos_token": (str, dict),
    "unk_token": (str, dict),
    "pad_token": (str, dict),
}


def open_tokenizer(path: str, folder: Path, config: dict, end: int | None = None) -> Any:
    """The transformers fast tokenizer of a model folder.

    path: the name of the folder in errors. config: its tokenizer_config.json. end: the id of the
    token that ends a text, for a config that names no eos_token.

    Raises:
      ModelError: the folder has no tokenizer, it cannot be read, or transformers reads it as a
        different one.
    """
    with _one_line(path):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import

        for name, types in FIELDS.items():
            if config.get(name) is not None and not isinstance(config[name], types):
                needed = " or ".join(t.__name__ for t in types)
                raise ValueError(
                    f"tokenizer_config.json: {name} is {config[name]!r:.60}; {needed} is needed"
                )
        local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        if not (folder / "tokenizer.json").is_file():  # it may have a tokenizer.model
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            if not tokenizer.is_fast:
                raise ValueError(
                    f"{type(tokenizer).__name__} is written in Python and gives no "
                    "offsets: add a tokenizer.json to the folder"
                )
            return tokenizer
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **local)
        _compare(tokenizer, folder, config)
        _add_bos_and_eos(tokenizer, config)
        if tokenizer.eos_token is None and "eos_token" not in config and end is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        return tokenizer


@contextlib.contextmanager
def _one_line(path: str) -> Iterator[None]:
    """Turns any error of a damaged tokenizer into a ModelError. A Rust panic is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = first_line(error)
        raise ModelError(f"{path}: the tokenizer cannot be read ({reason})") from None


def _compare(tokenizer: Any, folder: Path, config: dict) -> None:
    """Refuses a tokenizer whose ids differ from the ids of tokenizer.json with the tokens that
    tokenizer_config.json adds to it.
    """
    right = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    right.no_truncation()
    right.no_padding()
    declared = {
        int(i): tokenizers.AddedToken(**fields)
        for i, fields in (config.get("added_tokens_decoder") or {}).items()
    }
    present = right.get_added_tokens_decoder()
    right.add_tokens(
        [
            token
            for i, token in sorted(declared.items(), key=lambda item: item[0])
            if repr(token) != repr(present.get(i))
        ]
    )
    for i, token in declared.items():
        if (given := tokenizer.convert_tokens_to_ids(token.content)) != i:
            raise ValueError(
                f"{token.content!r} has the id {i} in tokenizer_config.json and "
                f"{given} in tokenizer.json"
            )
    special = "x".join(token.content for token in right.get_added_tokens_decoder().values())
    for probe in (*PROBES, special):
        ids = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        wanted = right.encode(probe, add_special_tokens=False).ids
        if ids != wanted:
            raise ValueError(
                f"transformers makes {ids[:8]} of {probe[:40]!r}, and tokenizer.json {wanted[:8]}"
            )


def _add_bos_and_eos(tokenizer: Any, config: dict) -> None:
    """Adds bos and eos to a text according to `add_bos_token` and `add_eos_token`; if they are
    absent, the post-processor of tokenizer.json stays.
    """
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds = {
        "bos": bos is not None and ids[:1] == [bos],
        "eos": eos is not None and ids[-1:] == [eos],
    }
    wanted = {}
    for name in adds:
        value = config.get(f"add_{name}_token")
        wanted[name] = adds[name] if value is None else value
    if wanted == adds:
        return
    for name, value in wanted.items():
        if value and getattr(tokenizer, f"{name}_token") is None:
            raise ValueError(
                f"tokenizer_config.json: add_{name}_token is true, and there is no {name}_token"
            )
        setattr(tokenizer, f"add_{name}_token", value)
