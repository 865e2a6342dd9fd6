"""Statistics of a run's documents for the report, and remarks before training."""

from collections.abc import Iterable
from typing import Any

from lljax.data.packing import Pieces
from lljax.data.tokens import Documents
from lljax.errors import counted, printable

FEW = 0.02  # a share of trained tokens below this is remarked
SHOWN = 10  # files whose unread keys are logged


def statistics(documents: Documents, overlong: str, lengths: Iterable[int]) -> dict[str, Any]:
    """data_statistics.json: `TokenStore.statistics` and `Documents.counts` of "train" and "valid".

    "train" also has "at": for each of `lengths`, the `Pieces.counts` in rows of that length.
    """
    result: dict[str, Any] = {
        part: store.statistics() | documents.counts[part]
        for part, store in (("train", documents.train), ("valid", documents.valid))
    }
    result["train"]["at"] = [
        {"length": length} | Pieces(documents.train, length, overlong).counts()
        for length in sorted(set(lengths))
    ]
    return result


def remarks(result: dict[str, Any], overlong: str) -> list[str]:
    """Remarks on unused documents, tokens and keys, from the result of `statistics`."""
    train, lines = result["train"], []
    for at in train["at"]:
        of = f"of {train['documents']:,} documents"
        if at["dropped"]:
            lines.append(
                f"{at['dropped']:,} {of} are longer than {at['length']:,} tokens "
                "(data.overlong='drop'): they are left out; 'split' trains them in pieces"
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
    if (share := train["trained_tokens"] / max(train["tokens"], 1)) < FEW:
        lines.append(
            f"only {share:.2%} of the tokens are trained: the rest are prompts, which "
            "data.loss_on='everything' trains too"
        )
    return lines + [line for part in result.values() for line in unread_keys(part["unread"])]


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
