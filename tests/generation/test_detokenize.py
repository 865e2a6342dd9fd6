"""Told a token at a time, the text is the one that the tokenizer decodes at once, and decoding
stays cheap.
"""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lljax.generation.detokenize import LONGEST, Detokenizer

TEXT = "def f(x):\n    return x  # naïve 日本語 🤗👩‍👧 …  two spaces , and ▁\n"


@pytest.fixture(scope="module")
def sentencepiece():
    """In the way of Llama 2: words with their space before them, bytes, and a first space that
    decoding drops.
    """
    words = ["<s>", "</s>", "<tool>", "▁", "▁hello", "▁world", "s", ",", "▁▁", "lo"]
    vocabulary = {
        word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    made.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def told(tokenizer, tokens, *stop_strings, **how):
    made = Detokenizer(tokenizer, stop_strings, **how)
    return "".join([*map(made.add, tokens), made.finish()])


def test_bytes_of_a_character_and_every_border_between_tokens(tokenizer):
    rng = random.Random(0)
    for _ in range(30):
        text = "".join(rng.choices(TEXT, k=40))
        tokens = tokenizer(text)["input_ids"]
        assert told(tokenizer, tokens) == tokenizer.decode(tokens) == text
        # which may be within a character
        assert told(tokenizer, tokens[:-1]) == tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("skip", [False, True])
def test_a_leading_space_is_dropped_once_and_a_special_token_takes_none_with_it(
    sentencepiece, skip
):
    rng = random.Random(0)
    byte = lambda value: sentencepiece.convert_tokens_to_ids(f"<0x{value:02X}>")
    pieces = [[token] for token in range(10)] + [
        [*map(byte, character.encode())] for character in ("日", "é", "🤗")
    ]
    for _ in range(200):
        tokens = [token for piece in rng.choices(pieces, k=12) for token in piece]
        assert told(sentencepiece, tokens, skip_special_tokens=skip) == sentencepiece.decode(
            tokens, skip_special_tokens=skip
        )
    assert told(sentencepiece, [0, 4, 1, 5], skip_special_tokens=True) == "hello world"


def test_a_character_shows_when_it_is_whole_and_what_is_none_does_not_hold_up_the_rest(
    sentencepiece,
):
    byte = lambda value: sentencepiece.convert_tokens_to_ids(f"<0x{value:02X}>")
    made = Detokenizer(sentencepiece)
    assert [made.add(byte(value)) for value in "日本".encode()] == ["", "", "日", "", "", "本"]
    assert [made.add(token) for token in (byte(0xE6), 4)] == [
        "",
        "\ufffd hello",
    ] and made.finish() == ""
    broken = [made.add(byte(0xFF)) for _ in range(3 * LONGEST)]
    assert "".join(broken) == "\ufffd" * 3 * LONGEST and sum(map(bool, broken)) == 3


@pytest.mark.parametrize(
    "stop,shown",
    [
        (("world",), "hello "),
        (("lo w",), "hel"),
        (("d,", "o world"), "hell"),
        (("",), None),
        (("worldly", "x"), None),
        (("hello",), ""),
    ],
)
def test_a_stop_string_ends_the_text_across_the_borders_of_tokens(tokenizer, stop, shown):
    text = "hello world, and"
    for tokens in (
        tokenizer(text)["input_ids"],
        [token for c in text for token in tokenizer(c)["input_ids"]],
    ):
        made, pieces = Detokenizer(tokenizer, stop), []
        for token in tokens:
            pieces.append(made.add(token))
            # nothing is shown that must be taken back
            assert (shown or text).startswith("".join(pieces))
        assert "".join(pieces) + made.finish() == (
            text if shown is None else shown
        ) and made.ended == (shown is not None)
        assert made.add(tokens[0]) == "" or shown is None


def test_a_stop_string_is_found_in_what_was_never_completed(sentencepiece):
    made = Detokenizer(sentencepiece, ("\ufffd\ufffd",))
    shown = [
        made.add(sentencepiece.convert_tokens_to_ids(piece))
        for piece in ("▁hello", "<0xE6>", "<0x97>")
    ]
    assert "".join(shown) + made.finish() == "hello" and made.ended


def test_decoding_is_linear_in_the_number_of_tokens(tokenizer):
    decoded = []

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def decode(self, tokens, **how):
            decoded.append(len(tokens))
            return tokenizer.decode(tokens, **how)

    tokens = tokenizer(TEXT * 20)["input_ids"]
    assert told(Counting(), tokens, "never there") == TEXT * 20 and sum(decoded) < 10 * len(tokens)
