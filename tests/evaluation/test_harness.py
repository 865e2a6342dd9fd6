import types

import numpy as np
import pytest
from serving.cases import a_model, running, tiny_engine

from lljax.errors import ConfigError
from lljax.evaluation.likelihood import log_likelihoods
from lljax.generation.generate import generate

pytest.importorskip("lm_eval")

TEXT = "def add(first, second):\n    return first + second\n" * 2 + "pass"


@pytest.fixture(scope="module")
def lm(tiny):
    from lljax.evaluation.harness import LljaxLM

    return LljaxLM(path=tiny, batch_size=2, max_length=24)


def requests(*args):
    return [types.SimpleNamespace(args=each) for each in args]


def test_log_likelihoods_are_direct_ones(lm):
    ids = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = lm.loglikelihood(requests((TEXT, " class"), ("", TEXT[:12])), disable_tqdm=True)
    more = lm.tokenizer(TEXT + " class")["input_ids"][len(ids) :]
    first = lm.tokenizer(TEXT[:12])["input_ids"]
    assert len(ids) + len(more) > 25  # so that the beginning is cut
    assert found == log_likelihoods(
        lm.model, [([*ids, *more][-25 : -len(more)], more), ([0], first)], rows=2
    )
    with pytest.raises(ConfigError, match="leaves no room for context"):
        lm.loglikelihood(requests(("a", TEXT)), disable_tqdm=True)


def test_a_rolling_likelihood_predicts_every_token_once(lm):
    ids = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert 24 < len(ids) < 48
    (total,) = lm.loglikelihood_rolling(requests((TEXT,)))
    rest = len(ids) - 24
    by_hand = log_likelihoods(lm.model, [([0], ids[:24]), (ids[-25:-rest], ids[-rest:])])
    assert total == pytest.approx(sum(value for value, _ in by_hand), rel=1e-5)


def test_generation_stops_at_stop_strings_and_limits(lm):
    greedy = {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    whole, other = lm.generate_until(requests((TEXT, greedy), ("class", greedy)))
    ids = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"][-16:]
    assert (
        whole
        == generate(lm.model, [np.asarray(ids)], tokens=8, tokenizer=lm.tokenizer, stop=lm.stop)[
            0
        ].text
    )
    string = other[2:4]
    cut, again = lm.generate_until(requests(("class", greedy | {"until": string}), (TEXT, greedy)))
    assert cut == other[: other.index(string)] and again == whole
    with pytest.raises(ConfigError, match="num_beams is not supported"):
        lm.generate_until(requests(("class", {"num_beams": 4})))


def test_exactly_one_model_is_named(tiny):
    from lljax.evaluation.harness import LljaxLM

    with pytest.raises(ConfigError, match="either path=BASE"):
        LljaxLM()
    with pytest.raises(ConfigError, match="takes a number"):
        LljaxLM(path=tiny, batch_size="auto")


@pytest.mark.slow
def test_clients_of_the_server_get_the_same_numbers(tiny):
    """lm_eval's local-completions and local-chat-completions."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from lljax.evaluation.harness import LljaxLM

    def asked(kind, *args):
        return [Instance(kind, {}, each, i) for i, each in enumerate(args)]

    lm, (engine, _) = LljaxLM(path=tiny, batch_size=2, max_length=200), tiny_engine(tiny)
    settings = {"until": ["f"], "max_gen_toks": 12, "do_sample": False}
    pairs = asked("loglikelihood", (TEXT, " class"), ("class", " Thing:\n"), ("", "def add"))
    texts = asked("generate_until", (TEXT, settings), ("class", settings))
    rolling = asked("loglikelihood_rolling", (TEXT,))
    chats = [lm.apply_chat_template([{"role": "user", "content": TEXT}])]
    with running(a_model("base", engine, lm.tokenizer, longest=201)) as (url, _, _):
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model="base", tokenizer=tiny, max_length=200
        )
        found, whole = client.loglikelihood(pairs), client.loglikelihood_rolling(rolling)
        answers = client.generate_until(texts)
        chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="base")
        messages = chat.apply_chat_template([{"role": "user", "content": TEXT}])
        replies = chat.generate_until(asked("generate_until", (messages, settings)))
    expected = lm.loglikelihood(pairs)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], 1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert whole == pytest.approx(lm.loglikelihood_rolling(rolling), 1e-4)
    assert answers == lm.generate_until(texts)
    assert replies == lm.generate_until(asked("generate_until", (chats[0], settings)))
