"""The protocols of perplexity, by the name that --tasks takes.

perplexity: documents cut into adjacent windows. Every length predicts the same tokens; the first
  tokens of a window have little context.
perplexity/longlora: LongLoRA's eval.py (arXiv 2309.12307): a window every 256 tokens of the
  concatenated documents, and the mean over whole windows. (LongLoRA keeps tokens in 16 bits, too
  few for today's vocabularies, and e as 2.71828.)
perplexity/new_tokens: the last 256 tokens of such windows alone: the same tokens at every length,
  each with nearly the whole length as context.
"""

STRIDE = 256  # tokens from one window to the next
PROTOCOLS = {  # in captions, after the number of documents or windows
    "perplexity": "documents, every length predicts the same tokens",
    "perplexity/longlora": f"windows, {STRIDE} tokens apart, the mean over the whole of each",
    "perplexity/new_tokens": f"windows, the last {STRIDE} tokens of each, the same at every length",
}
