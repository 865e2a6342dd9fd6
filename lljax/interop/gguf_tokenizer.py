"""The tokenizer in a GGUF file's metadata, built with the `tokenizers` library.

A GGUF names its pre-tokenizer and leaves the rule to the reader: the rules here are copied from the
models' tokenizer.json files.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lljax.errors import ModelError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
CONTROL, USER = 3, 4  # token_type of special tokens, and of plain ones kept whole
# {name in transformers: name in <name>_token_id}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
LONGEST = 256  # characters; SentencePiece makes tokens of 16, Gemma has some of 31


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pre-tokenizer of GGUF. whole_words: a word that is a token is taken without merging up to
    it. composes: accents are composed first (NFC). adds_bos: llama.cpp adds it unless the file says
    otherwise.
    """

    pre_tokenizer: pre_tokenizers.PreTokenizer
    whole_words: bool = False
    composes: bool = False
    adds_bos: bool = False


TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {  # by tokenizer.ggml.pre
    "default": Rule(BYTES),
    "gpt-2": Rule(BYTES),
    "smollm": Rule(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
    "llama-bpe": Rule(_split(WORDS % r"\p{N}{1,3}"), whole_words=True, adds_bos=True),
    "dbrx": Rule(_split(WORDS % r"\p{N}{1,3}")),
    "qwen2": Rule(_split(WORDS % r"\p{N}"), composes=True),
    "stablelm2": Rule(_split(WORDS % r"\p{N}")),
    "tekken": Rule(_split(TEKKEN), whole_words=True, adds_bos=True),
}


def build(path: str, fields: dict[str, Any], chat_template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer; fields: the metadata under "tokenizer.ggml.", without that prefix.

    Raises:
      ModelError: an unsupported kind of tokenizer or pre-tokenizer.
    """
    if fields.get("model") not in KINDS:
        raise ModelError(
            f"{path}: tokenizer.ggml.model {fields.get('model')!r} is none of {', '.join(KINDS)}"
        )
    kind, tokens = KINDS[fields["model"]], fields["tokens"]
    backend = kind.build(path, fields)
    types = fields.get("token_type") or [1] * len(tokens)
    for wanted, special in ((USER, False), (CONTROL, True)):
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=special)
                for token, of_type in zip(tokens, types, strict=False)
                if of_type == wanted
            ]
        )
    ids = _special_ids(path, fields, kind)
    special = {
        f"{name}_token": tokens[ids[theirs]]
        for name, theirs in SPECIAL.items()
        if ids[theirs] is not None
    }
    rule = RULES.get(fields.get("pre", "default"))
    default = "bos_token" in special and (kind.adds_bos or (rule is not None and rule.adds_bos))
    if fields.get("add_bos_token", default):
        if "bos_token" not in special:
            raise ModelError(
                f"{path}: tokenizer.ggml.add_bos_token is true, and there is no "
                "tokenizer.ggml.bos_token_id"
            )
        bos = special["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **special)


def _special_ids(path: str, fields: dict[str, Any], kind: "Kind") -> dict[str, int | None]:
    """The ids of special tokens by their names in GGUF.

    Raises:
      ModelError: an id is none of the vocabulary's.
    """
    ids = {
        name: fields.get(f"{name}_token_id", kind.special_ids.get(name))
        for name in SPECIAL.values()
    }
    count = len(fields["tokens"])
    for name, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < count):
            raise ModelError(
                f"{path}: tokenizer.ggml.{name}_token_id is {i!r:.40}; there are {count} tokens"
            )
    return ids


def _byte_level(path: str, fields: dict[str, Any]) -> tokenizers.Tokenizer:
    pre = fields.get("pre", "default")
    if pre not in RULES:
        raise ModelError(
            f"{path}: tokenizer.ggml.pre {pre!r} is none of {', '.join(RULES)}; use the "
            "HuggingFace folder of this model"
        )
    rule = RULES[pre]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(fields["tokens"])},
            [tuple(merge.split(" ", 1)) for merge in fields["merges"]],
            ignore_merges=rule.whole_words,
        )
    )
    if rule.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = rule.pre_tokenizer, decoders.ByteLevel()
    return backend


def _sentencepiece(path: str, fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """Llama 2's kind. The merges are not in the file: they are all pairs of tokens that make a
    token, the better scored tokens first.
    """
    tokens, scores = fields["tokens"], fields["scores"]
    index = {token: i for i, token in enumerate(tokens)}
    if long := sum(len(token) > LONGEST for token in tokens):
        logging.info(
            "%s: %d tokens of more than %d characters are not made from text", path, long, LONGEST
        )
    merges = []
    for i, token in enumerate(tokens):
        for k in range(1, len(token)) if len(token) <= LONGEST else ():
            left, right = token[:k], token[k:]
            if left in index and right in index:
                merges.append((-scores[i], index[left], index[right], left, right))
    backend = tokenizers.Tokenizer(
        models.BPE(
            index,
            [merge[3:] for merge in sorted(merges)],
            unk_token=tokens[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get("add_space_prefix", True)  # false in Gemma's files
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *[decoders.Strip(" ", 1, 0)] * prefix,
        ]
    )
    return backend


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tokenizer. special_ids, adds_bos: llama.cpp's defaults if the file says nothing
    (llama-vocab.cpp, init of LLAMA_VOCAB_TYPE_SPM).
    """

    build: Callable[[str, dict[str, Any]], tokenizers.Tokenizer]
    special_ids: dict[str, int]
    adds_bos: bool = False


KINDS = {  # by tokenizer.ggml.model
    "gpt2": Kind(_byte_level, {}),
    "llama": Kind(_sentencepiece, {"bos": 1, "eos": 2, "unknown": 0}, adds_bos=True),
}
