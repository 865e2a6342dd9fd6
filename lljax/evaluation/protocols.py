"""The protocols by which perplexity is measured, by the name that --tasks takes.

perplexity: documents cut into windows side by side; every length predicts the same tokens, and the
  first of a window have little to be predicted from. perplexity/longlora: LongLoRA's eval.py (arXiv
  2309.12307), a window every 256 tokens of the documents end to end, and the mean over all of it.
  perplexity/new_tokens: the last 256 tokens of such windows alone, the same tokens at every length,
  so that each has nearly the whole length before it. (LongLoRA keeps its tokens in 16 bits, which
  is too few for the vocabularies of today, and e as 2.71828.)
"""

STRIDE = 256  # tokens from one window to the next
PROTOCOLS = {  # what a table says of them, after how many were read
    "perplexity": "documents, every length predicts the same tokens",
    "perplexity/longlora": f"windows, {STRIDE} tokens apart, the mean over the whole of each",
    "perplexity/new_tokens": f"windows, the last {STRIDE} tokens of each, the same at every length",
}
