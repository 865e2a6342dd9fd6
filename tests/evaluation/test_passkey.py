import numpy as np
import pytest

from lljax.errors import ConfigError
from lljax.evaluation import passkey
from lljax.evaluation.fitting import TokenCounter

GARBAGE = " ".join(
    ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."]
    * 5000
)


@pytest.mark.parametrize("length", [300, 2000, 32_000])
def test_the_text_is_longloras_to_the_letter(length, tiny_512):
    made = list(passkey.tasks()["passkey/longlora"].examples(tiny_512, length, None, 0))
    assert len(made) == 10
    for seed, example in enumerate(made):
        garbage = int(3.75 * length // 1024 * 1024)
        np.random.seed(seed)
        before = np.random.randint(0, garbage)
        key = np.random.randint(1, 50_000)
        assert example.text == (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.\n"
            f"{GARBAGE[:before]}\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
            f"{GARBAGE[: garbage - before]}\nWhat is the pass key? The pass key is"
        )
        assert example.answers == (str(key),)


def test_longlora_wants_every_token_and_landmark_the_first_number(tiny_512):
    tasks = passkey.tasks()
    exact, landmark = (
        next(tasks[f"passkey/{name}"].examples(tiny_512, 512, 1, 3))
        for name in ("longlora", "landmark")
    )
    key = exact.answers[0]
    assert exact.prompt == landmark.prompt and landmark.tokens == 10
    continued = tiny_512(f"{exact.text} {key}")["input_ids"]
    written = tiny_512.decode(continued[-exact.tokens :])
    assert (
        written == f" {key}"
        and len(continued) == len(tiny_512(exact.text)["input_ids"]) + exact.tokens
    )
    assert tasks["passkey/longlora"].score([written, f" {key}.", "", key[:-1]], [exact] * 4) == 25
    assert tasks["passkey/landmark"].score(
        [f" {key}.", f" not 5 but {key}", ""], [landmark] * 3
    ) == pytest.approx(100 / 3)
    assert len(list(tasks["passkey/landmark"].examples(tiny_512, 512, None, 0))) == 50


@pytest.mark.parametrize("length", [128, 512, 4096])
def test_in_tokens_the_text_fills_the_length_and_the_key_lies_anywhere(length, tiny_512):
    counter, task = TokenCounter(tiny_512), passkey.tasks()["passkey/tokens"]
    made = list(task.examples(tiny_512, length, 20, 0))
    places = []
    for example in made:
        assert 0.94 * length <= counter(example.text) + example.tokens <= length
        assert example.prompt.count(example.answers[0]) == 2
        places.append(example.prompt.index("The pass key") / len(example.prompt))
    assert max(places) - min(places) > 0.3
    assert (
        task.score([f" {example.answers[0]}" for example in made], made) == 100
        and task.score([""] * 20, made) == 0
    )


def test_a_length_without_room_is_refused(tiny_512):
    for name, length in (("longlora", 200), ("landmark", 200), ("tokens", 64)):
        with pytest.raises(ConfigError, match="--lengths"):
            list(passkey.tasks()[f"passkey/{name}"].examples(tiny_512, length, 1, 0))
