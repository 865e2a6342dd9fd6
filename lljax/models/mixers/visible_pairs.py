"""How many pairs of a query and a key attention computes."""

from lljax.attention.pattern import AttentionPattern


def visible_pairs(
    pattern: AttentionPattern, T: int, window: int | None = None, chunked: bool = False
) -> float:
    """Pairs of a query and a visible key in a row of T tokens of one document, for an average head.

    Causal attention counts half of T x T, as MaxText does. window, chunked: those
    fields of LayerSpec.
    """
    if pattern.group:
        G = min(pattern.group, T)
        return T * (G + 1) / 2
    if chunked and window is not None and window < T:
        chunks, rest = divmod(T, window)
        return chunks * visible_pairs(pattern, window) + (
            visible_pairs(pattern, rest) if rest else 0
        )
    W = min(w for w in (window, pattern.window or None, T) if w)
    anchors = min(pattern.anchors, T - W)
    return W * (W + 1) / 2 + (T - W) * W + (T - W) * anchors
