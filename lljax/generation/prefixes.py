"""The states of prompts' beginnings, kept across requests: a document that many ask about is read
once.
"""

import collections
import hashlib
from collections.abc import Hashable, Sequence

import jax
import numpy as np

from lljax.models.mixers.mixer import State

Key = bytes


class Prefixes:
    """What chunks of tokens left in the cache, each after the chunks before it; the least recently
    used go first.

    room: bytes of device memory that they take at most. size: that they take.
    """

    def __init__(self, room: int):
        self.room, self.size = room, 0
        self._entries: collections.OrderedDict[Key, tuple[State, ...]] = collections.OrderedDict()

    @staticmethod
    def keys(tokens: Sequence[int], chunk: int, about: Hashable) -> list[Key]:
        """The key of each whole chunk of `tokens`, of everything up to its end. about: what else
        their states depend on, such as the adapter.
        """
        digest, keys = hashlib.blake2b(repr(about).encode(), digest_size=16), []
        array = np.asarray(tokens, np.int32)
        for start in range(0, len(array) - chunk + 1, chunk):
            digest.update(array[start : start + chunk].tobytes())
            keys.append(digest.digest())
        return keys

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def find(self, key: Key) -> tuple[State, ...] | None:
        return self._entries.get(key)

    def touch(self, keys: Sequence[Key]) -> None:
        """Marks the chunks of a prompt as used, so that an end goes before what it follows."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def add(self, keys: Sequence[Key], states: tuple[State, ...]) -> None:
        """Keeps the last chunk of `keys`, the chunks of a prompt so far; of a prompt that is longer
        than the room, the beginning is kept.
        """
        before = [self._entries[key] for key in keys[:-1] if key in self._entries]
        if sum(map(_bytes, before)) + _bytes(states) > self.room:
            return
        self._entries[keys[-1]] = states
        self.size += _bytes(states)
        self.touch(keys)
        while self.size > self.room:
            _, old = self._entries.popitem(last=False)
            self.size -= _bytes(old)


def _bytes(states: tuple[State, ...]) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(states))
