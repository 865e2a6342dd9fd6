"""A tokenizer as the metadata of a GGUF file, for llama.cpp.

llama.cpp has two algorithms for the models here: byte-level BPE ("gpt2"), whose pre-tokenizer it
knows by name, and SentencePiece's ("llama"), which merges by the scores of tokens.
"""

import json
import logging
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

import gguf
from gguf import GGUFValueType as Type

from lljax.data.template import turn_ends
from lljax.errors import ConfigError
from lljax.interop.base import Base
from lljax.interop.gguf import Reader
from lljax.interop.gguf_tokenizer import RULES, SPECIAL, build
from lljax.interop.open import end_tokens
from lljax.interop.tokenizer import PROBES

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPACE = "\u2581"  # in SentencePiece's tokens
WAY_OUT = "use --format=merged"
TURN_ENDS = ("eot", "eom")  # names of further ids that end a text, besides eos


class Entry(NamedTuple):
    """A value of the metadata with its type; of an array, the type of its items too."""

    value: Any
    type: Type
    item: Type | None = None


def entry(value: Any) -> Entry:
    """A value of Python in the type that llama.cpp's converter gives it."""
    types = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}
    if isinstance(value, list):
        items = types | {int: Type.INT32}
        return Entry(value, Type.ARRAY, items[type(value[0])])
    return Entry(value, types[type(value)])


def tokenizer_metadata(base: Base, V: int, chat_template: str | None) -> dict[str, Entry]:
    """The metadata of the base's tokenizer for a model with V embeddings.

    A base that is a GGUF file keeps its own. chat_template: takes the place of the base's.

    Raises:
      ConfigError: llama.cpp has no such tokenizer.
    """
    if base.folder is None:
        entries = _copied(Reader(base.location))
    else:
        tokenizer = base.tokenizer()
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        entries = _converted(base, tokenizer, V)
    if chat_template is not None:
        entries[TEMPLATE] = entry(chat_template)
    return entries


def _copied(reader: gguf.GGUFReader) -> dict[str, Entry]:
    return {
        key: Entry(field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.")
    }


def _converted(base: Base, tokenizer: Any, V: int) -> dict[str, Entry]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise ConfigError(
            f"--format=gguf: {base.path}: llama.cpp has no tokenizer of the kind "
            f"{state['model']['type']} for this model: {WAY_OUT}"
        )
    vocabulary = _vocabulary(base, tokenizer, V)
    special = {
        f"{theirs}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name, theirs in SPECIAL.items()
    }
    fields = {name: i for name, i in special.items() if i is not None and i < V}
    fields |= _ends(base, tokenizer)
    fields |= _added(tokenizer)
    kind = _sentencepiece if state["model"].get("byte_fallback") else _byte_level
    candidates = [vocabulary | more | fields for more in kind(base, tokenizer, state, vocabulary)]
    differing = {
        i: _differing(base, tokenizer, fields, vocabulary) for i, fields in enumerate(candidates)
    }
    best = min(differing, key=lambda i: len(differing[i]))
    if wrong := differing[best]:
        logging.warning(
            "%s: llama.cpp's tokenizer makes other tokens of some texts, such as %.40r: of %d of "
            "%d that were tried",
            base.path,
            wrong[0],
            len(wrong),
            len(_texts(vocabulary)),
        )
    entries = {PREFIX + name: entry(value) for name, value in candidates[best].items()}
    return entries | _templates(tokenizer.chat_template)


# ---------------------------------------------------------------- the vocabulary
def _vocabulary(base: Base, tokenizer: Any, V: int) -> dict[str, Any]:
    """tokens and token_type, of V tokens."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    if beyond := {i: token for i, token in by_id.items() if i >= V}:
        if made := [token for i, token in beyond.items() if i not in added]:
            raise ConfigError(
                f"--format=gguf: {base.path}: texts may hold {len(made)} tokens beyond the model's "
                f"{V} embeddings, such as {made[0]!r:.40}: its tokenizer is another model's"
            )
        logging.warning(
            "%s: %d tokens beyond the model's %d embeddings are left out, such as %.40r",
            base.path,
            len(beyond),
            V,
            next(iter(beyond.values())),
        )
    tokens, types = [], []
    for i in range(V):
        token, type = by_id.get(i), gguf.TokenType.NORMAL
        if token is None:
            token, type = f"[PAD{i}]", gguf.TokenType.UNUSED
        elif i == tokenizer.unk_token_id:
            type = gguf.TokenType.UNKNOWN
        elif i in added and added[i].special:
            type = gguf.TokenType.CONTROL
        elif i in added:
            token, type = token.replace(SPACE, " "), gguf.TokenType.USER_DEFINED
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            type = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(int(type))
    if stripping := sum(token.lstrip or token.rstrip for token in added.values()):
        logging.warning(
            "%s: %d special tokens take the spaces beside them, which llama.cpp leaves",
            base.path,
            stripping,
        )
    return {"tokens": tokens, "token_type": types}


def _ends(base: Base, tokenizer: Any) -> dict[str, int]:
    """The ids of tokens that end a text besides eos, the ends of turns first."""
    ends = end_tokens(base, tokenizer) - {tokenizer.eos_token_id}
    turns = set(turn_ends(tokenizer))
    ids = sorted(ends, key=lambda i: (i not in turns, i))
    names = [*([] if tokenizer.eos_token_id is not None else ["eos"]), *TURN_ENDS]
    if left := ids[len(names) :]:
        logging.warning(
            "%s: a GGUF file names at most 3 tokens that end a text; not named are %s",
            base.path,
            ", ".join(tokenizer.convert_ids_to_tokens(i) or f"id {i}" for i in left),
        )
    return {f"{name}_token_id": i for name, i in zip(names, ids, strict=False)}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets bos and eos."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "add_bos_token": bos is not None and ids[:1] == [bos],
        "add_eos_token": eos is not None and ids[-1:] == [eos],
    }


# ---------------------------------------------------------------- the algorithm
def _byte_level(
    base: Base, tokenizer: Any, state: dict, vocabulary: dict
) -> Iterable[dict[str, Any]]:
    composes = _composes(state.get("normalizer"))
    name = None
    if composes is not None and tokenizer.backend_tokenizer.pre_tokenizer is not None:
        name = pre_tokenizer_name(tokenizer, bool(state["model"].get("ignore_merges")), composes)
    if name is None:
        raise ConfigError(
            f"--format=gguf: {base.path}: its tokenizer.json splits texts in a way that lljax "
            f"knows no name of llama.cpp for (known are {', '.join(RULES)}): {WAY_OUT}, and "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if composes:
        logging.warning(
            "%s: llama.cpp does not compose accents (NFC) as this tokenizer does: compose such "
            "texts first",
            base.path,
        )
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]
    ]
    more = {"merges": merges} if merges else {}
    return [{"model": "gpt2", "pre": name} | more]


def _composes(normalizer: dict | None) -> bool | None:
    """Whether a normalizer is NFC alone; None if it is another than that or nothing."""
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        inner = normalizer["normalizers"]
        return False if not inner else _composes(inner[0]) if len(inner) == 1 else None
    return True if normalizer["type"] == "NFC" else None


def pre_tokenizer_name(tokenizer: Any, whole_words: bool, composes: bool) -> str | None:
    """The name of the rule (`RULES`) that splits texts as the tokenizer does; None if none does.

    Names are not in tokenizer.json, and regular expressions have many spellings: the pieces of
    texts with characters of all kinds are compared. whole_words, composes: see `Rule`; llama.cpp
    composes nothing, and a rule that composes otherwise is the second choice.
    """
    texts = _splitting_texts()
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = [split(text) for text in texts]
    # "default" is another rule in llama.cpp, which our reader takes for gpt-2.
    rules = [(name, rule) for name, rule in RULES.items() if name != "default"]
    for name, rule in sorted(rules, key=lambda item: item[1].composes != composes):
        rule_split = rule.pre_tokenizer.pre_tokenize_str
        if rule.whole_words == whole_words and all(
            rule_split(text) == wanted for text, wanted in zip(texts, pieces, strict=True)
        ):
            return name
    return None


def _splitting_texts() -> list[str]:
    """Texts that rules split differently: every ASCII character and a sample of all others, between
    letters, digits and spaces.
    """
    others = (chr(code) for code in range(0x80, 0x1FFFF, 61))
    characters = [chr(code) for code in range(0x80)]
    characters += [c for c in others if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    texts = [f"a{c}b 1{c}2 {c} {c}{c}A{c}{c}Bc{c}\n{c}3" for c in characters]
    digits = " ".join("1234567890"[:n] for n in range(1, 11))
    words = (
        "I'll I'LL don't DON'T CamelCase HTTPServer snake_case x'Re a\u00b2\u00bd e\u0301A\u0301"
    )
    spaces = [
        before + " " * n + after for n in range(4) for before in "a\n1." for after in "a\n\t1"
    ]
    return [*PROBES, *texts, digits, words, *spaces, "//\n/\n\n\r\n ", "\t\t\n \n  \r\n\r"]


def _sentencepiece(
    base: Base, tokenizer: Any, state: dict, vocabulary: dict
) -> Iterable[dict[str, Any]]:
    """tokenizer.json has ranks of merges in place of scores: a token's score is the rank of the
    first merge that makes it, negated.
    """
    ranks: dict[str, int] = {}
    merges = state["model"]["merges"]
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair.split(" ", 1) if isinstance(pair, str) else pair), rank)
    scores = [
        0.0 if type == gguf.TokenType.BYTE else -float(ranks.get(token, len(merges) + i))
        for i, (token, type) in enumerate(
            zip(vocabulary["tokens"], vocabulary["token_type"], strict=True)
        )
    ]
    fields = {"model": "llama", "pre": "default", "scores": scores}
    return [fields | {"add_space_prefix": prefix} for prefix in (True, False)]


# ---------------------------------------------------------------- the check
def _texts(vocabulary: dict[str, Any]) -> list[str]:
    """Texts to compare: probes, and all special tokens."""
    special = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    types = zip(vocabulary["tokens"], vocabulary["token_type"], strict=True)
    return [*PROBES, "x".join(token for token, type in types if type in special)]


def _differing(base: Base, tokenizer: Any, fields: dict, vocabulary: dict) -> list[str]:
    """The texts of which a tokenizer that is read from these fields makes other tokens."""
    read = build(base.path, fields, None)
    return [
        text
        for text in _texts(vocabulary)
        if read(text, add_special_tokens=False, verbose=False)["input_ids"]
        != tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def _templates(template: Any) -> dict[str, Entry]:
    """The chat template, or several by name."""
    if not isinstance(template, dict):
        return {} if template is None else {TEMPLATE: entry(template)}
    others = sorted(name for name in template if name != "default")
    entries = {f"{TEMPLATE}.{name}": entry(template[name]) for name in others}
    if others:
        entries[f"{TEMPLATE}s"] = entry(others)
    return entries | ({TEMPLATE: entry(template["default"])} if "default" in template else {})
