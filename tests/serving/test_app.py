"""The routes: what is refused and how, and what the server outlives."""

import copy
import json
import time

import pytest
from serving.cases import HERMES, ScriptedEngine, a_model, client_of, error_of

JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = HERMES
    return tokenizer


@pytest.fixture
def scripted(chatty):
    return ScriptedEngine(chatty, "def add")


@pytest.fixture
def model(scripted):
    return a_model("toy", scripted, scripted.tokenizer)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)


# ---------------------------------------------------------------- malformed bodies
def chat(**more):
    return "/v1/chat/completions", json.dumps({"messages": HELLO} | more).encode()


def text(**more):
    return "/v1/completions", json.dumps({"prompt": "a"} | more).encode()


def raw(body, path="/v1/chat/completions"):
    return path, body


def said(message):
    return chat(messages=[message])


DEEP = 50_000
HUGE = 10**30
MALFORMED = [
    *(raw(body) for body in (b"", b"{", b"[]", b"null", b'"a"', b"{'a': 1}", b"\x00", b"\xff\xfe")),
    raw(b'{"messages": [{"role": "user", "content": "\xff\xff"}]}'),
    raw(b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    raw(b'{"prompt": "\\udfff"}', "/v1/completions"),
    raw(b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}", "/v1/completions"),
    raw(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    raw(b'{"prompt": "a", "temperature": NaN}', "/v1/completions"),
    raw(b'{"prompt": "a", "temperature": Infinity}', "/v1/completions"),
    raw(b'{"prompt": "a", "temperature": 1e999}', "/v1/completions"),
    raw(b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", "/v1/completions"),
    *(chat(messages=value) for value in (None, [], "hello", 1, [1], [None], {}, [[]], [HELLO])),
    said({"role": "wizard", "content": "a"}),
    said({"role": "user"}),
    said({"role": "user", "content": {"text": "a"}}),
    said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}),
    said({"role": "assistant", "tool_calls": [{"function": {}}]}),
    said({"role": "user", "content": "word " * 100_000}),
    *(text(prompt=value) for value in (None, "", [], [""], 1, {}, [1, "a"], [[]], [[1], "a"])),
    *(
        text(prompt=value)
        for value in ([-1], [10**9], [HUGE], [1.5], [True], [["a"]], ["a"] * 2000)
    ),
    text(prompt="word " * 2000),
    text(prompt="a" * 3_000_000),
    text(max_tokens=-1),
    text(max_tokens=10**6),
    text(max_tokens=HUGE),
    text(max_tokens="many"),
    text(max_tokens=0),
    text(temperature=-1),
    text(temperature="hot"),
    text(top_p=2),
    text(top_k=-7),
    text(min_p=-0.1),
    text(seed=HUGE),
    text(n=0),
    text(n=100_000),
    text(stop=["x"] * 10_000),
    text(stop=["x" * 100_000]),
    text(stop=[1]),
    text(logprobs=1000),
    text(logprobs=True),
    text(stream="yes"),
    text(repetition_penalty=0),
    text(presence_penalty=1),
    text(colour="blue"),
    text(**{"x" * 100_000: 1}),
    text(response_format={"type": "xml"}),
    text(response_format="json"),
    text(model=1),
    text(model="unknown"),
    chat(tools=[{"type": "browser"}]),
    chat(tools="all"),
    chat(tool_choice="required"),
    chat(top_logprobs=3),
    chat(chat_template_kwargs={"messages": []}),
    chat(stream_options=[1]),
]


def test_malformed_bodies_are_refused_and_the_server_lives(model, scripted):
    assert len(MALFORMED) >= 60
    with client_of(model) as (client, service):
        for path, body in MALFORMED:
            response = client.post(path, content=body, headers=JSON)
            assert 400 <= response.status_code < 500, (path, body[:100], response.text[:300])
            error_of(response, response.status_code)
        assert not scripted.requests and not service.busy
        path, body = text(max_tokens=50)
        assert client.post(path, content=body, headers=JSON).json()["choices"][0]["text"]


def test_a_body_that_is_too_large_is_refused(model):
    with client_of(model, max_body=1000) as (client, _):
        for body in (b" " * 1001, b" " * 100_000_000):
            error = error_of(client.post("/v1/completions", content=body, headers=JSON), 413)
            assert "1000 bytes" in error["message"]
        assert client.get("/health").status_code == 200


def test_other_content_types_paths_and_methods_are_refused(model):
    with client_of(model) as (client, _):
        path, body = text()
        for kind in ({"Content-Type": "text/plain"}, {}):
            assert (
                "application/json"
                in error_of(client.post(path, content=body, headers=kind), 415)["message"]
            )
        error_of(client.get("/v2/nothing"), 404)
        error_of(client.get(path), 405)


def test_the_context_error_has_both_numbers(model):
    with client_of(model) as (client, _):
        error = error_of(
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 600}), 400
        )
        assert error["code"] == "context_length_exceeded"
        assert "512" in error["message"] and "601" in error["message"]


# ---------------------------------------------------------------- models and keys
def test_models_are_listed_and_an_unknown_one_is_404(model, scripted):
    other = a_model("other", scripted, scripted.tokenizer, root="a/b", parent="toy")
    with client_of(model, other) as (client, _):
        data = client.get("/v1/models").json()["data"]
        assert [entry["id"] for entry in data] == ["toy", "other"]
        assert client.get("/v1/models/other").json()["parent"] == "toy"
        error_of(client.get("/v1/models/none"), 404)
        error = error_of(client.post("/v1/completions", json={"prompt": "a", "model": "x"}), 404)
        assert error["code"] == "model_not_found" and "toy, other" in error["message"]
        error_of(client.post("/v1/completions", json={"prompt": "a"}), 400)  # which of the two?


def test_the_api_is_for_those_who_have_the_key(model):
    with client_of(model, api_key="sesame") as (client, _):
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer Sesame"},
            {"Authorization": "Basic sesame"},
            {"Authorization": "Bearer sésame".encode()},
        ):
            assert error_of(client.get("/v1/models", headers=headers), 401)
        right = {"Authorization": "Bearer sesame"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


# ---------------------------------------------------------------- the queue
def test_a_full_queue_is_429_and_says_when_to_try_again(model, scripted):
    import threading

    scripted.gate.clear()
    with client_of(model, slots=2, queue=1) as (client, service):
        ask = lambda: client.post("/v1/completions", json={"prompt": "a"}).status_code
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(ask())) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: service.worker.unfinished == 3)
        response = client.post("/v1/completions", json={"prompt": "a"})
        error_of(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        until(lambda: "lljax_requests_waiting 1" in client.get("/metrics").text)
        scripted.gate.set()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 3 and ask() == 200 and not service.busy


def test_an_answer_that_takes_too_long_is_504_and_frees_its_slot(model, scripted):
    scripted.gate.clear()
    with client_of(model, timeout=0.2) as (client, service):
        error_of(client.post("/v1/completions", json={"prompt": "a"}), 504)
        until(lambda: not service.busy)
        body = client.post("/v1/completions", json={"prompt": "a", "stream": True}).text
        assert json.loads(body.split("\n")[0].removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: not scripted.active)


def test_a_server_that_stops_refuses_and_tells_those_who_wait(model, scripted):
    import threading

    scripted.gate.clear()
    with client_of(model) as (client, service):
        statuses = []
        ask = lambda: statuses.append(client.post("/v1/completions", json={"prompt": "a"}))
        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: service.worker.unfinished)
        service.stopping = True
        response = client.post("/v1/completions", json={"prompt": "a"})
        assert error_of(response, 503) and response.headers["retry-after"]
        assert client.get("/health").status_code == 503
        client.portal.call(service.worker.cancel_all)
        thread.join()
        error_of(statuses[0], 503)


def test_when_the_engine_fails_everyone_is_told(model, scripted):
    with client_of(model) as (client, service):
        scripted.fault = MemoryError("out of device memory")
        for _ in range(2):
            error = error_of(client.post("/v1/completions", json={"prompt": "a"}), 500)
            assert "out of device memory" in error["message"]
        assert client.get("/health").status_code == 503


# ---------------------------------------------------------------- tools
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_call_is_returned_whole_and_as_a_stream(model, scripted):
    scripted.text = "I add. " + CALL
    with client_of(model) as (client, _):
        body = {"messages": HELLO, "tools": [TOOL]}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I add. "
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
        stream = client.post("/v1/chat/completions", json=body | {"stream": True}).text
        events = [event.removeprefix("data: ") for event in stream.split("\n\n") if event]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert "".join(each["delta"].get("content", "") for each in deltas) == "I add. "
        (called,) = [
            each["delta"]["tool_calls"] for each in deltas if "tool_calls" in each["delta"]
        ]
        assert called[0]["function"] == call["function"] and called[0]["index"] == 0
        assert deltas[-1]["finish_reason"] == "tool_calls"
        plain = client.post("/v1/chat/completions", json={"messages": HELLO}).json()["choices"][0]
        assert CALL in plain["message"]["content"] and plain["finish_reason"] == "stop"


# ---------------------------------------------------------------- adapters
def test_adapters_are_loaded_and_unloaded_only_if_allowed(model, scripted, tokenizer):
    class Adapters:
        removed = []

        def read_adapter(self, name, path):
            if path == "nowhere":
                raise ValueError("there is no such folder")
            return lambda: a_model(name, scripted, scripted.tokenizer, root=path)

        def remove_adapter(self, model):
            self.removed.append(model.name)

    add = {"lora_name": "new", "lora_path": "here"}
    with client_of(model, adapters=Adapters()) as (client, _):
        error_of(client.post("/v1/load_lora_adapter", json=add), 403)
    with client_of(model, adapters=Adapters(), allow_loading=True) as (client, _):
        for path, body in (
            ("load", {"lora_name": "new", "lora_path": "nowhere"}),
            ("load", {"lora_name": "toy", "lora_path": "here"}),
            ("load", {"lora_name": "new"}),
            ("load", {"lora_name": 1, "lora_path": "here"}),
            ("load", {"lora_name": "", "lora_path": "here"}),
            ("load", {"lora_name": "two\nlines", "lora_path": "here"}),
            ("unload", {"lora_name": "toy"}),
        ):
            error_of(client.post(f"/v1/{path}_lora_adapter", json=body), 400)
        error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "x"}), 404)
        assert client.post("/v1/load_lora_adapter", json=add).status_code == 200
        ask = {"prompt": "a", "model": "new"}
        assert client.post("/v1/completions", json=ask).json()["model"] == "new"
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
        error_of(client.post("/v1/completions", json=ask), 404)
        assert Adapters.removed == ["new"]
