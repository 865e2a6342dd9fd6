"""Heads that are tables of their own, though config.json ties the head to the embedding."""

import logging

import numpy as np

from lljax.models.spec import is_tied

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096  # of the tables that are compared at a time


class OwnHead:
    """A tied base as an untied one: its head is the table of the file, or else a copy of the
    embedding.

    For adapters that train the head or the embedding alone. The interface of `base`
    (lljax.interop.folder.FolderBase), with a config that says so.
    """

    def __init__(self, base):
        self._base = base
        self._copied = HEAD not in base.names()
        self.config = base.config | {"tie_word_embeddings": False}

    def __getattr__(self, attribute):
        return getattr(self._base, attribute)

    def _name(self, name: str) -> str:
        return EMBED if name == HEAD and self._copied else name

    def names(self) -> list[str]:
        return [*self._base.names(), *([HEAD] if self._copied else [])]

    def shape(self, name):
        return self._base.shape(self._name(name))

    def dtype(self, name):
        return self._base.dtype(self._name(name))

    def read(self, name):
        return self._base.read(self._name(name))

    def stored(self, name, form):
        return self._base.stored(self._name(name), form)

    def checksum(self, name, before=0):
        return self._base.checksum(self._name(name), before)


def untie_if_they_differ(base) -> None:
    """Unties the config of a base whose file has a head unlike its embedding, as transformers 5
    does (`PreTrainedModel.tie_weights`).
    """
    if not is_tied(base.config) or not {EMBED, HEAD} <= set(base.names()) or _equal(base):
        return
    logging.warning(
        "%s: config.json ties the head to the embedding and the file has a head of its own, which is used",
        base.path,
    )
    base.config = base.config | {"tie_word_embeddings": False}


def _equal(base) -> bool:
    if base.shape(EMBED) != base.shape(HEAD):
        return False
    embed, head = base.read(EMBED), base.read(HEAD)
    return all(
        np.array_equal(embed[i : i + ROWS], head[i : i + ROWS]) for i in range(0, len(embed), ROWS)
    )
