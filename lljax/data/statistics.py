"""What the documents of a run come to: numbers for the report, and what to say before it trains."""

from lljax.data.packing import Pieces
from lljax.data.tokens import Documents
from lljax.errors import printable

FEW = 0.02  # a share of trained tokens below this is worth a word
SHOWN = 10  # files whose unread keys are logged


def statistics(documents: Documents, overlong: str, lengths) -> dict:
    """data_statistics.json: `TokenStore.statistics` and `Documents.counts` of "train" and "valid".

    "train" has `at` too: `Pieces.counts`, what of it is trained in rows of each of `lengths`.
    """
    found = {
        part: store.statistics() | documents.counts[part]
        for part, store in (("train", documents.train), ("valid", documents.valid))
    }
    found["train"]["at"] = [
        {"length": length} | Pieces(documents.train, length, overlong).counts()
        for length in sorted(set(lengths))
    ]
    return found


def remarks(found: dict, overlong: str) -> list[str]:
    """Lines on what of the documents is not used, from `statistics`."""
    train, lines = found["train"], []
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
    return lines + [line for part in found.values() for line in unread_keys(part["unread"])]


def unread_keys(unread: dict[str, dict[str, int]]) -> list[str]:
    """A line for each of the first files with keys that no reader knows."""
    having = {file: keys for file, keys in unread.items() if keys}
    lines = [
        f"{printable(file)}: keys that nothing reads: "
        + ", ".join(f"{key} ({rows:,} rows)" for key, rows in sorted(keys.items()))
        for file, keys in list(having.items())[:SHOWN]
    ]
    more = len(having) - SHOWN
    return lines + ([f"{more:,} further files have keys that nothing reads"] if more > 0 else [])
