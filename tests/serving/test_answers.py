"""What the server answers is what `generate` answers."""

import concurrent.futures
import json

import numpy as np
import pytest
from serving.cases import client_of

from lljax.data.prompt_tokens import text_tokens
from lljax.generation.generate import generate
from lljax.generation.sample import Sampling

PROMPT = "def add(first"


@pytest.fixture(scope="module")
def expected(engine_and_decoder):
    """The completions of `generate` for `n` copies of a prompt."""
    engine, decoder = engine_and_decoder

    def completions(prompt=PROMPT, n=1, tokens=12, **sampling):
        ids = np.asarray(text_tokens(engine.tokenizer, prompt))
        return generate(
            decoder,
            [ids] * n,
            tokens=tokens,
            sampling=Sampling(**sampling),
            stop=frozenset({engine.tokenizer.eos_token_id}),
            tokenizer=engine.tokenizer,
            rows=4,
        )

    return completions


@pytest.fixture
def client(base):
    with client_of(base) as (client, _):
        yield client


def complete(client, **body):
    response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12} | body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_greedy(client, base, expected):
    body, (answer,) = complete(client, temperature=0), expected()
    assert body["choices"] == [
        {"index": 0, "text": answer.text, "logprobs": None, "finish_reason": answer.reason}
    ]
    read, written = len(text_tokens(base.tokenizer, PROMPT)), len(answer.tokens)
    assert body["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_tokens_that_were_known_are_told(client):
    prompt = list(range(130))
    usages = [complete(client, prompt=prompt, n=n)["usage"] for n in (1, 2)]
    known = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert known == [0, 128] and usages[1]["prompt_tokens"] == 130  # two chunks, one prompt


def test_choices_are_sampled_as_generate_samples_copies(client, expected):
    sampling = {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "top_k": 100, "seed": 7}
    body = complete(client, n=3, repetition_penalty=1.1, **sampling)
    answers = expected(n=3, repetition=1.1, **sampling)
    assert [choice["text"] for choice in body["choices"]] == [answer.text for answer in answers]
    assert len({answer.text for answer in answers}) > 1


def test_each_prompt_of_a_batch_is_answered_as_if_it_were_alone(client, expected):
    prompts = [PROMPT, "class", PROMPT]
    body = complete(client, prompt=prompts, temperature=1.2, seed=3, max_tokens=6)
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        (alone,) = expected(prompt, tokens=6, temperature=1.2, seed=3)
        assert choice["text"] == alone.text


def test_requests_at_the_same_time_are_answered_as_if_each_were_alone(client, expected):
    """Other sampling, other lengths, and more of them than slots."""
    requests = [
        {"prompt": PROMPT[: 4 + n], "max_tokens": 4 + n, "temperature": n % 3 * 0.7, "seed": n}
        for n in range(10)
    ]
    with concurrent.futures.ThreadPoolExecutor(10) as threads:
        bodies = list(threads.map(lambda request: complete(client, **request), requests))
    for request, body in zip(requests, bodies, strict=True):
        sampling = {name: request[name] for name in ("temperature", "seed")}
        (alone,) = expected(request["prompt"], tokens=request["max_tokens"], **sampling)
        assert body["choices"][0]["text"] == alone.text


def test_token_ids_are_the_text(client, base):
    ids = text_tokens(base.tokenizer, PROMPT)
    texts = {
        json.dumps(complete(client, prompt=prompt, temperature=0)["choices"])
        for prompt in (PROMPT, ids, [ids], [PROMPT])
    }
    assert len(texts) == 1


def test_without_a_seed_answers_differ_and_with_one_they_are_equal(client):
    ask = lambda **body: complete(client, temperature=2, **body)["choices"][0]["text"]
    assert len({ask() for _ in range(3)}) > 1
    assert len({ask(seed=5) for _ in range(3)}) == 1


def test_a_stream_is_the_whole_in_pieces(client):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1, "seed": 1, "n": 2, "logprobs": 1}
    whole = complete(client, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/completions", json=body | options))
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["id"] == last["id"] for chunk in chunks)
    for choice in whole["choices"]:
        deltas = [
            delta
            for chunk in chunks
            for delta in chunk["choices"]
            if delta["index"] == choice["index"]
        ]
        assert len(deltas) > 5
        assert "".join(delta["text"] for delta in deltas) == choice["text"]
        assert deltas[-1]["finish_reason"] == choice["finish_reason"]
        scored = [p for d in deltas if d["logprobs"] for p in d["logprobs"]["token_logprobs"]]
        assert scored == choice["logprobs"]["token_logprobs"]


def test_stop_strings_and_stop_tokens_end_the_text(client, base):
    text = complete(client, temperature=0)["choices"][0]["text"]
    stop = text[3:6]
    cut = complete(client, temperature=0, stop=[stop])["choices"][0]
    assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"
    first = complete(client, temperature=0, logprobs=0, max_tokens=1)["choices"][0]
    token = base.tokenizer(first["logprobs"]["tokens"][0])["input_ids"]
    if len(token) == 1:
        ended = complete(client, temperature=0, stop_token_ids=token)["choices"][0]
        assert ended["text"] == "" and ended["finish_reason"] == "stop"


def test_logprobs_are_the_models(client):
    logprobs = complete(client, temperature=0, logprobs=3)["choices"][0]["logprobs"]
    n = len(logprobs["tokens"])
    assert n == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 12
    for chosen, likely in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == max(likely.values()) and len(likely) == 3  # greedy: the most likely
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_echo_repeats_the_prompt(client):
    text = complete(client, temperature=0)["choices"][0]["text"]
    assert complete(client, temperature=0, echo=True)["choices"][0]["text"] == PROMPT + text
    only = complete(client, echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == PROMPT and only["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(client, base, engine_and_decoder, max_tokens):
    """The request of lm-eval's local-completions."""
    _, decoder = engine_and_decoder
    ids = text_tokens(base.tokenizer, PROMPT)
    body = complete(client, prompt=ids, echo=True, logprobs=1, temperature=0, max_tokens=max_tokens)
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + max_tokens
    assert logprobs["token_logprobs"][0] is None and logprobs["text_offset"][0] == 0
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])


def test_a_chat_without_a_template_is_refused(client):
    response = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"


def test_a_response_format_is_kept(client):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "bc"]}}}
    choices = complete(client, n=4, temperature=2, response_format=form)["choices"]
    assert {json.loads(choice["text"]) for choice in choices} <= {"a", "bc"}
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
