"""The models of an engine: a base and its adapters, and which of them share a batch."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lljax.generation.programs import Program, Weights, program_of
from lljax.models.by_row import CannotMix, mix
from lljax.models.decoder import Decoder
from lljax.models.spec import DecoderSpec
from lljax.parallel.sharding import Layout

Name = str | None  # of an adapter; None for the base


@dataclasses.dataclass
class _Group:
    """Models whose requests share a batch. mixed: of all of them; None until a batch needs it."""

    names: list[Name]
    mixed: tuple[Program, Weights] | None = None


class Variants:
    """dtype: of the computation. layout: of the mesh; None for one device."""

    def __init__(self, dtype: Any, layout: Layout | None):
        self._dtype, self._layout = dtype, layout
        self._decoders: dict[Name, Decoder] = {}
        self._programs: dict[Name, tuple[Program, Weights]] = {}
        self._groups: dict[int, _Group] = {}
        self._numbers = itertools.count()
        # A name may come to mean other weights, and what is kept of prompts is of the old ones.
        self._versions: collections.Counter[Name] = collections.Counter()

    def __contains__(self, name: Name) -> bool:
        return name in self._decoders

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(name for name in self._decoders if name is not None)

    def version(self, name: Name) -> int:
        """How many models have had this name."""
        return self._versions[name]

    def spec(self, name: Name) -> DecoderSpec:
        return self._decoders[name].spec

    def one(self, name: Name) -> tuple[Program, Weights]:
        """The program and the weights of a model."""
        return self._programs[name]

    def group(self, name: Name) -> int:
        """A number that models have in common whose requests share a batch."""
        return next(number for number, group in self._groups.items() if name in group.names)

    def of_rows(
        self, names: Sequence[Name]
    ) -> tuple[Program, Weights, Int[np.ndarray, " B"] | None]:
        """What computes a row with each of these models, all of one group: the program, its
        weights, and the number of each row's model; None if it is one model.
        """
        if len(set(names)) == 1:
            return *self._programs[names[0]], None
        group = self._groups[self.group(names[0])]
        if group.mixed is None:
            group.mixed = self._mixed(group.names)
        return *group.mixed, np.asarray([group.names.index(name) for name in names], np.int32)

    def batches(self, rows: int) -> list[list[Name]]:
        """The models of `rows` rows, once for each program that may compute them."""
        mixed = [group.names for group in self._groups.values() if len(group.names) > 1]
        kinds = [[name] for name in self._decoders] + (mixed if rows > 1 else [])
        return [list(itertools.islice(itertools.cycle(names), rows)) for names in kinds]

    def add(self, name: Name, model: Decoder) -> None:
        self._decoders[name] = model
        self._programs[name] = program_of(model, self._dtype, self._layout)
        self._versions[name] += 1
        for group in self._groups.values():
            try:
                group.mixed = self._mixed([*group.names, name])
            except CannotMix:
                continue
            group.names.append(name)
            return
        self._groups[next(self._numbers)] = _Group([name])

    def remove(self, name: Name) -> None:
        del self._decoders[name], self._programs[name]
        number = self.group(name)
        group = self._groups[number]
        group.names.remove(name)
        group.mixed = None
        if not group.names:
            del self._groups[number]

    def _mixed(self, names: Sequence[Name]) -> tuple[Program, Weights]:
        """The program of these models. Their number is rounded up to a power of two, so that one
        more adapter does not compile every program anew.
        """
        if self._layout is not None:
            raise CannotMix("a mixed model is not sharded")
        models = [self._decoders[name] for name in names]
        models += models[:1] * ((1 << (len(models) - 1).bit_length()) - len(models))
        specs = tuple(model.spec for model in models)
        return program_of(mix(models, self._dtype), self._dtype, None, specs)
