"""What the tests of groups and prompts share."""

import copy
import json

import numpy as np

from lljax.config import default_config
from lljax.data.kinds import KINDS
from lljax.data.tokens import prepare


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(folder, tokenizer, rows, kind: str, **fields):
    """The documents of `rows`, tokenized in `folder`."""
    data = default_config().data
    data.train = (write(folder / "rows.jsonl", rows),)
    for name, value in fields.items():
        data[name] = value
    return prepare(
        data,
        copy.deepcopy(tokenizer),
        len(tokenizer),
        folder / "run" / "data",
        tokenizer_fingerprint="t",
        kind=KINDS[kind],
    )


def answers(encoded, tokenizer) -> dict[int, str]:
    """The text of the trunk (0) and of each answer of an encoded group, trained text in []."""
    tokens, mask, branches = encoded[:3]
    texts = {}
    for branch in np.unique(branches):
        inside = branches == branch
        texts[int(branch)] = spans(tokens[inside], mask[inside], tokenizer)
    return texts


def spans(tokens, mask, tokenizer) -> str:
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    texts = []
    for part, trained in zip(np.split(tokens, edges), np.split(mask, edges), strict=True):
        text = tokenizer.decode(part)
        texts.append(f"[{text}]" if len(trained) and trained[0] else text)
    return "".join(texts)
