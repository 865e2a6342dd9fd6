"""The tokens of a prompt."""

import copy

import tokenizers

from lljax.generation.prompt import text_tokens


def test_a_prompt_begins_with_one_bos_as_training_text_does(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.eos_token
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    ids = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert (
        text_tokens(tokenizer, "hi")
        == text_tokens(tokenizer, f"{bos}hi")
        == [tokenizer.bos_token_id, *ids]
    )
