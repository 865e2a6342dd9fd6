"""A head that is a table of its own, although config.json ties it to the embedding."""

import logging

import numpy as np

from lljax.interop.base import Base, BaseView
from lljax.models.families import is_tied
from lljax.models.quantize import Form, Quantized

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096  # rows of the tables that are compared at a time


class OwnHead(BaseView):
    """A tied base as an untied one: its head is the table of the file, or else a copy of the
    embedding.

    For adapters that train the head or the embedding alone.
    """

    def __init__(self, base: Base):
        super().__init__(base)
        self._copied = HEAD not in base.names()
        self.config = base.config | {"tie_word_embeddings": False}

    def _name(self, name: str) -> str:
        return EMBED if name == HEAD and self._copied else name

    def names(self) -> list[str]:
        return [*self._base.names(), *([HEAD] if self._copied else [])]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(self._name(name))

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(self._name(name))

    def read(self, name: str) -> np.ndarray:
        return self._base.read(self._name(name))

    def stored(self, name: str, form: Form) -> Quantized | None:
        return self._base.stored(self._name(name), form)

    def checksum(self, name: str, before: int = 0) -> int:
        return self._base.checksum(self._name(name), before)


def untie_if_they_differ(base: Base) -> None:
    """Unties the config of a base whose file has a head unlike its embedding, as transformers 5
    does (`PreTrainedModel.tie_weights`).
    """
    if not is_tied(base.config) or not {EMBED, HEAD} <= set(base.names()) or _equal(base):
        return
    logging.warning(
        "%s: config.json ties the head to the embedding, and the file has another head, which is "
        "used",
        base.path,
    )
    base.config = base.config | {"tie_word_embeddings": False}


def _equal(base: Base) -> bool:
    if base.shape(EMBED) != base.shape(HEAD):
        return False
    embed, head = base.read(EMBED), base.read(HEAD)
    return all(
        np.array_equal(embed[i : i + ROWS], head[i : i + ROWS]) for i in range(0, len(embed), ROWS)
    )
