"""Statistics of a run's documents for the report, and remarks before training."""

from collections.abc import Iterable
from typing import Any

from lljax.data.kinds import DOCUMENTS, RowKind
from lljax.data.tokens import Documents
from lljax.errors import counted, printable

FEW = 0.02  # a share of trained tokens below this is remarked
SHOWN = 10  # files whose unread keys are logged


def statistics(
    documents: Documents, overlong: str, lengths: Iterable[int], *, kind: RowKind = DOCUMENTS
) -> dict[str, Any]:
    """data_statistics.json: `TokenStore.statistics` and `Documents.counts` of "train" and "valid",
    with `RowKind.statistics` of the kind of rows.

    "train" also has "at": for each of `lengths`, the counts of the pieces in rows of that length.

    Raises:
      ConfigError: the kind of rows does not serve `overlong`.
    """
    result: dict[str, Any] = {
        part: store.statistics() | kind.statistics(store) | documents.counts[part]
        for part, store in (("train", documents.train), ("valid", documents.valid))
    }
    result["train"]["at"] = [
        {"length": length} | kind.pieces(documents.train, length, overlong).counts()
        for length in sorted(set(lengths))
    ]
    return result


def remarks(result: dict[str, Any], overlong: str, *, kind: RowKind = DOCUMENTS) -> list[str]:
    """Remarks on unused documents, tokens and keys, from the result of `statistics`."""
    train, lines = result["train"], []
    for at in train["at"]:
        of = f"of {train['documents']:,} {kind.noun}"
        if at["dropped"]:
            lines.append(
                f"{at['dropped']:,} {of} are longer than {at['length']:,} tokens "
                f"(data.overlong={overlong!r}): they are left out; {_way_out(kind, overlong)}"
            )
        if at.get("truncated"):
            lines.append(
                f"{at['truncated']:,} {of} are longer than {at['length']:,} tokens "
                "(data.overlong='truncate'): the middle of their prompts is left out"
            )
        if at.get("unmatched"):
            lines.append(
                f"{at['unmatched']:,} {of} have no mismatched answer in rows of {at['length']:,} "
                "tokens, for want of room or of other prompts nearby: they do not count in the KL"
            )
        if at["untrained"] and overlong == "truncate":
            lines.append(
                f"{at['untrained']:,} {of} have no trained token within the first "
                f"{at['length']:,} (data.overlong='truncate'): they are left out; use "
                "'split', or longer rows"
            )
        if overlong == "split" and 2 * at["tokens"] < train["tokens"]:
            lines.append(
                f"{1 - at['tokens'] / train['tokens']:.0%} of the tokens are in pieces of "
                f"{at['length']:,} that hold no trained one: they are left out, and "
                "replies do not see them; use longer rows"
            )
    share = train["trained_tokens"] / max(train["tokens"], 1)
    if share < FEW and "everything" in kind.loss_on:
        lines.append(
            f"only {share:.2%} of the tokens are trained: the rest are prompts, which "
            "data.loss_on='everything' trains too"
        )
    return lines + [line for part in result.values() for line in unread_keys(part["unread"])]


def _way_out(kind: RowKind, overlong: str) -> str:
    """What would train rows that are left out for their length."""
    if "split" in kind.overlong:
        return "'split' trains them in pieces"
    longer = "use longer rows" if kind.targets else "raise the length of prompts"
    return longer if overlong == "truncate" else f"'truncate' cuts their prompts, or {longer}"


def unread_keys(unread: dict[str, dict[str, int]]) -> list[str]:
    """A line for each of the first SHOWN files with keys that no parser reads."""
    having = {file: keys for file, keys in unread.items() if keys}
    lines = [
        f"{printable(file)}: keys that nothing reads: "
        + ", ".join(f"{key} ({counted(rows, 'row')})" for key, rows in sorted(keys.items()))
        for file, keys in list(having.items())[:SHOWN]
    ]
    more = len(having) - SHOWN
    return lines + (
        [f"{counted(more, 'further file')} with keys that nothing reads"] if more > 0 else []
    )
