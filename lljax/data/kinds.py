"""What the rows of a file may be: documents, pairs of answers, judged answers, prompts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lljax.data.formats import Document, document
from lljax.data.groups import GroupPieces, encode_group, group_statistics
from lljax.data.packing import Pieces
from lljax.data.preferences import Group, judged, pairs
from lljax.data.prompts import OVERLONG, Prompt, PromptPieces, encode_prompt, parse_prompt
from lljax.data.template import encode
from lljax.data.token_store import Encoded, TokenStore
from lljax.errors import DataError

Row = Document | Group | Prompt


class Source(Protocol):
    """A random-access source for grain. Its repr names it in the state of an iterator."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def counts(self) -> dict[str, int]: ...


def _encode_document(row: Any, tokenizer: Any, loss_on: str) -> Encoded:
    return Encoded(*encode(row, tokenizer, loss_on))


def _nothing(store: TokenStore) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class RowKind:
    """A row of KINDS.

    parse: (decoded row, "file:line") -> the row; raises ValueError with the reason.
    encode: (row, tokenizer, loss_on) -> its tokens; raises ValueError with the reason.
    pieces: (store, T, overlong) -> the pieces that rows of T tokens are made of.
    noun: its rows, in messages.
    overlong: the values of data.overlong that it serves; the first is for evaluations.
    loss_on: the values of data.loss_on that it serves.
    extra: the values of `Encoded` that it has beside tokens and mask.
    targets: tokens of it are trained, so that its pieces are packed into rows.
    statistics: store -> what it adds to data_statistics.json.
    """

    name: str
    parse: Callable[[Any, str], Row]
    encode: Callable[[Any, Any, str], Encoded]
    pieces: Callable[[TokenStore, int, str], Source]
    noun: str
    overlong: tuple[str, ...]
    loss_on: tuple[str, ...] = ("assistant",)
    extra: Sequence[str] = ()
    targets: bool = True
    statistics: Callable[[TokenStore], dict[str, Any]] = _nothing

    def check_loss_on(self, loss_on: str) -> None:
        """Raises DataError if the kind does not serve this value of data.loss_on."""
        if loss_on not in self.loss_on:
            raise DataError(
                f"data.loss_on={loss_on!r} is for documents; {self.name} have no trained tokens "
                f"but in answers: use {self.loss_on[0]!r}"
            )


DOCUMENTS = RowKind(
    name="documents",
    parse=document,
    encode=_encode_document,
    pieces=Pieces,
    noun="documents",
    overlong=("split", "truncate", "drop"),
    loss_on=("assistant", "everything"),
)
PAIRS = RowKind(
    name="pairs",
    parse=pairs,
    encode=encode_group,
    pieces=GroupPieces,
    noun="pairs",
    overlong=OVERLONG,
    extra=("branches",),
    statistics=group_statistics,
)
JUDGED = dataclasses.replace(
    PAIRS,
    name="judged",
    parse=judged,
    pieces=functools.partial(GroupPieces, mismatched=True),
    noun="judged rows",
)
PROMPTS = RowKind(
    name="prompts",
    parse=parse_prompt,
    encode=encode_prompt,
    pieces=PromptPieces,
    noun="prompts",
    overlong=OVERLONG,
    extra=("row",),
    targets=False,
)
KINDS = {kind.name: kind for kind in (DOCUMENTS, PAIRS, JUDGED, PROMPTS)}
