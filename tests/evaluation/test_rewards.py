"""Built-in rewards. repetition, overlong and format: the values of TRL 1.x's functions."""

import pytest

from lljax.evaluation.rewards import REWARDS, answer_of, text_of


def rewards(name, completions=None, ids=None, options=None, **columns):
    count = len(completions or ids or ())
    completions, ids = completions or [""] * count, ids or [[1]] * count
    function = REWARDS[name].function
    return function(
        prompts=["p"] * count,
        completions=completions,
        completion_ids=ids,
        **columns,
        **(options or {}),
    )


def said(text):
    return [{"role": "assistant", "content": text}]


def test_a_completion_is_a_text_or_the_messages_of_the_assistant():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert text_of("x") == text_of(said("x")) == text_of([{"content": "x"}]) == "x"
    assert text_of([*said("x"), {"role": "tool", "content": "y"}, *said(None), *said(parts)]) == (
        "x\n\nab"
    )


def test_the_answer_follows_the_reasoning():
    assert answer_of("<think>5 or 7</think>\n 7 ") == "7"
    assert answer_of("5 or 7</think> 7") == "7"  # <think> was in the prompt
    assert answer_of(" 7") == "7" and answer_of(" <think> 7") == ""
    guesses = said("<think>5 7 9</think> 5")
    assert rewards("contains", [guesses] * 2, answers=[["7"], ["5"]]) == [0.0, 1.0]
    assert rewards("exact", [guesses] * 2, answer=["7", "5"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    "text,reward",
    [
        ("Paris", 1),
        (" the  PARIS.\n", 1),
        ('"Paris"', 1),
        ("City of Light", 1),
        ("Paris, France", 0),
        ("", 0),
        ("Par is", 0),
    ],
)
def test_exact_ignores_case_space_edges_and_article(text, reward):
    assert rewards("exact", [text, said(text)], answers=[["Paris", "city of light"]] * 2) == (
        [reward] * 2
    )


def test_exact_keeps_numbers_apart():
    texts = ["-5", "1.5", "5%", "5.", "$5"]
    assert rewards("exact", texts, solution=["5"] * 5) == [0, 0, 0, 1, 1]
    assert rewards("exact", ["15"], answer=["1.5"]) == [0]


def test_an_answer_without_text_is_none():
    assert rewards("contains", ["x", ""], answers=[[""], ["", " "]]) == [None, None]
    assert rewards("exact", ["x"], answers=[["", "x"]]) == [1.0]


def test_contains_is_the_share_of_the_answers():
    answers = [["AB", "cd"], ["ab", "cd"], "ab", [], None]
    assert rewards("contains", ["x ab"] * 5, answers=answers) == [0.5, 0.5, 1, None, None]


def test_rows_of_several_data_sets_name_their_answers_differently():
    columns = {"answers": [["5"], None, None, None], "answer": [None, 5, None, None]}
    columns["solution"] = ["no", None, "5", None]
    assert rewards("exact", ["5"] * 4, **columns) == [1, 1, 1, None]


def test_f1_and_rouge_take_the_closest_answer():
    answers = [["no", "the red house"], "red"]
    texts = ["A red house", said("red car")]
    assert rewards("f1", texts, answers=answers) == [1, pytest.approx(2 / 3)]
    answers = [["b", "the red house"], "red"]
    assert rewards("rouge", texts, answers=answers) == pytest.approx([2 / 3, 2 / 3])


def test_regex_searches_the_whole_completion_or_matches_all_of_it():
    texts, patterns = ["<think>a</think> 12 ", "x12", "12"], [r"\d+", r"\d+", r"\d{3}"]
    assert rewards("regex", texts, pattern=patterns) == [1, 1, 0]
    assert rewards("regex", [" 12\n", "x12", "12"], pattern=patterns, options={"full": True}) == (
        [1, 0, 0]
    )
    assert rewards("regex", texts[:1], pattern=["think"]) == [1]
    assert rewards("regex", ["a", "a"], pattern=[None, "a"]) == [None, 1]
    for bad in ("(", 5):
        with pytest.raises(ValueError, match="^column pattern: .* is no regular expression"):
            rewards("regex", ["a"], pattern=[bad])


def test_format_is_reasoning_and_then_an_answer():
    texts = ["<think>\na\n</think>\nb", "<think>a\nb", "x<think>a</think>", "<think></think>"]
    nested = "<think>a<think>b</think>c"
    assert rewards("format", [*map(said, texts), nested]) == [1, 0, 0, 1, 0]


def test_overlong_falls_from_0_to_minus_1_within_the_cache():
    ids = [[1] * n for n in (0, 80, 81, 90, 100, 101)]
    options = {"max_tokens": 100, "cache": 20}
    assert rewards("overlong", ids=ids, options=options) == [0, 0, -0.05, -0.5, -1, -1]
    hard = {"max_tokens": 100, "cache": 0}
    assert rewards("overlong", ids=ids, options=hard) == [0, 0, 0, 0, 0, -1]
    for wrong in ({"max_tokens": 10, "cache": 11}, {"max_tokens": 10, "cache": -1}):
        with pytest.raises(ValueError, match="0 <= cache <= max_tokens"):
            rewards("overlong", ids=ids, options=wrong)


def test_repetition_is_the_share_of_repeated_n_grams():
    ids = [[1, 2, 3, 1, 2, 3, 1, 2], [5] * 5, [1, 2], [1, 2, 3, 4], []]
    assert rewards("repetition", ids=ids) == pytest.approx([-0.5, -2 / 3, 0, 0, 0])
    options = {"ngram_size": 2, "max_penalty": -0.5}
    assert rewards("repetition", ids=ids, options=options) == pytest.approx(
        [-0.5 * 4 / 7, -0.375, 0, 0, 0]
    )
    for wrong in ({"ngram_size": 0}, {"max_penalty": 0.5}):
        with pytest.raises(ValueError, match=f"^option {next(iter(wrong))}="):
            rewards("repetition", ids=ids, options=wrong)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_takes_any_column_and_an_empty_batch(name):
    columns = {column: [] for column in REWARDS[name].columns[-1:]} | {"other": []}
    options = {"max_tokens": 4, "cache": 2} if name == "overlong" else {}
    assert rewards(name, options=options, **columns) == []
