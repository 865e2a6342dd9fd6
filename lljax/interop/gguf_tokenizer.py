"""The tokenizer in a GGUF file's metadata, built with the `tokenizers` library.

A GGUF names its pre-tokenizer and leaves the rule to the reader: the rules here are those of the
models' own tokenizer.json files.
"""

import logging

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lljax.errors import ModelError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
CONTROL, USER = 3, 4  # token_type of special tokens, and of plain ones kept whole
# ours, and that of <name>_token_id
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What llama.cpp takes where the file does not say (llama-vocab.cpp, init of LLAMA_VOCAB_TYPE_SPM).
DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {}}
LONGEST = 256  # characters; SentencePiece makes tokens of 16, Gemma has some of 31


def _split(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {  # by tokenizer.ggml.pre
    "default": BYTES,
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": _split(WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(WORDS % r"\p{N}"),
}


def build(path: str, fields: dict, chat_template: str | None) -> PreTrainedTokenizerFast:
    """fields: the metadata under "tokenizer.ggml.", without that prefix.

    Raises:
      ModelError: a kind of tokenizer, or a pre-tokenizer, that is not supported.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if fields.get("model") not in builders:
        raise ModelError(
            f"{path}: tokenizer.ggml.model {fields.get('model')!r} is none of {', '.join(builders)}"
        )
    tokens = fields["tokens"]
    backend = builders[fields["model"]](path, fields)
    kinds = fields.get("token_type") or [1] * len(tokens)
    for kind, special in ((USER, False), (CONTROL, True)):
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=special)
                for token, this in zip(tokens, kinds)
                if this == kind
            ]
        )
    ids = {
        name: fields.get(f"{name}_token_id", DEFAULTS[fields["model"]].get(name))
        for name in NAMES.values()
    }
    for name, i in ids.items():
        if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
            raise ModelError(
                f"{path}: tokenizer.ggml.{name}_token_id is {i!r:.40}; there are {len(tokens)} tokens"
            )
    named = {
        f"{ours}_token": tokens[ids[theirs]]
        for ours, theirs in NAMES.items()
        if ids[theirs] is not None
    }
    # Without the flag llama.cpp adds it to these two kinds.
    default = "bos_token" in named and (
        fields["model"] == "llama" or fields.get("pre") == "llama-bpe"
    )
    if fields.get("add_bos_token", default):
        if "bos_token" not in named:
            raise ModelError(
                f"{path}: tokenizer.ggml.add_bos_token is true, and there is no tokenizer.ggml.bos_token_id"
            )
        bos = named["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **named)


def _byte_level(path: str, fields: dict) -> tokenizers.Tokenizer:
    pre = fields.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer.ggml.pre {pre!r} is none of {', '.join(PRE_TOKENIZERS)}; use the HuggingFace "
            "folder of this model"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    # Llama 3 takes a word that is a token as it is, without merging up to it; Qwen composes accents
    # first.
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(fields["tokens"])},
            merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[pre], decoders.ByteLevel()
    return backend


def _sentencepiece(path: str, fields: dict) -> tokenizers.Tokenizer:
    """Llama 2's kind. The merges are not in the file: every way to put a token together from two
    others, the better scored tokens first.
    """
    tokens, scores = fields["tokens"], fields["scores"]
    index = {token: i for i, token in enumerate(tokens)}
    if long := sum(len(token) > LONGEST for token in tokens):
        logging.info(
            "%s: %d tokens of more than %d characters are made of no text", path, long, LONGEST
        )
    merges = [
        (-scores[i], index[token[:k]], index[token[k:]], token[:k], token[k:])
        for i, token in enumerate(tokens)
        if len(token) <= LONGEST
        for k in range(1, len(token))
        if token[:k] in index and token[k:] in index
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            index,
            [merge[3:] for merge in sorted(merges)],
            unk_token=tokens[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get("add_space_prefix", True)  # not in Gemma's
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
