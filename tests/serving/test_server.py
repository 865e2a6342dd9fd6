"""A real server, and the official client of OpenAI."""

import copy
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serving.cases import HERMES, ScriptedEngine, a_model, running, until

from lljax.errors import ConfigError
from lljax.serving.server import listen

openai = pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def scripted(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = HERMES
    return ScriptedEngine(tokenizer, "def add(first, second)")


@pytest.fixture(scope="module")
def models(engine_and_decoder, scripted):
    engine, _ = engine_and_decoder
    base = a_model("base", engine, engine.tokenizer, longest=200)
    return base, a_model("toy", scripted, scripted.tokenizer)


@pytest.fixture(scope="module")
def server(models):
    with running(*models, api_key="sesame", slots=4, queue=2) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="sesame", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "toy"]
    assert client.models.retrieve("toy").owned_by == "lljax"


def test_a_chat(client, scripted):
    answer = client.chat.completions.create(
        model="toy", messages=HELLO, max_completion_tokens=50, user="me", store=False
    )
    assert answer.choices[0].message.content == scripted.text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_as_a_stream(client, scripted):
    stream = client.chat.completions.create(
        model="toy", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == scripted.text
    assert chunks[-1].choices[0].finish_reason == "stop" and last.usage.completion_tokens > 3


def test_a_completion_with_logprobs_and_the_parameters_of_vllm(client):
    answer = client.completions.create(
        model="base",
        prompt=["def", "class"],
        max_tokens=5,
        temperature=0.7,
        seed=1,
        logprobs=2,
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.token_logprobs) == 5


def test_a_call_of_a_tool(client, scripted):
    before, scripted.text = scripted.text, '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    try:
        answer = client.chat.completions.create(
            model="toy",
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    finally:
        scripted.text = before
    assert answer.choices[0].message.tool_calls[0].function.name == "f"


def test_errors_are_the_clients_exceptions(client, server, scripted):
    ask = lambda **more: client.completions.create(
        **{"model": "base", "prompt": "a", "max_tokens": 2} | more
    )
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(model="unknown")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 200") as error:
        ask(max_tokens=1000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(temperature=-1)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    scripted.gate.clear()
    try:
        with pytest.raises(openai.APITimeoutError):
            ask(model="toy", timeout=0.3)
        waiting = [ask(model="toy", stream=True) for _ in range(6)]
        with pytest.raises(openai.RateLimitError) as refused:
            ask()
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for stream in waiting:
            stream.close()
        until(lambda: not server[1].busy)
    finally:
        scripted.gate.set()


def test_a_dropped_stream_frees_its_slot(client, server, models):
    engine = models[0].engine
    stream = client.completions.create(
        model="base",
        prompt="a",
        max_tokens=190,
        stream=True,
        temperature=1,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    until(lambda: not server[1].busy)
    counts = engine.counts()
    assert counts.writing == counts.reading == counts.waiting == 0


def test_a_slow_client_and_a_broken_one_stop_nobody(client, server):
    port = int(server[0].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        with socket.create_connection(("127.0.0.1", port)) as broken:
            broken.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
            assert b"400" in broken.recv(1000)
        assert client.models.list().data


@pytest.mark.parametrize("chunked", [False, True])
def test_a_hundred_megabytes_are_refused_in_an_answer(server, client, chunked):
    """The client reads the reason, although it is still sending when the limit is passed."""
    connection = http.client.HTTPConnection(server[0].removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sesame"}
    blocks = (b" " * 1_000_000 for _ in range(100))
    if not chunked:
        headers["Content-Length"] = "100000000"
    connection.request("POST", "/v1/completions", blocks, headers, encode_chunked=chunked)
    response = connection.getresponse()
    assert response.status == 413 and b"--max_body" in response.read()
    assert client.models.list().data


def test_running_answers_end_before_the_server_does(scripted):
    engine = ScriptedEngine(scripted.tokenizer, "def add(first, second)")
    engine.gate.clear()
    with (
        running(a_model("toy", engine, engine.tokenizer)) as (url, _, server),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        ask = lambda: client.completions.create(model="toy", prompt="a", stream=True)
        stream = ask()
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as refused:
            ask()
        assert refused.value.status_code == 503
        engine.gate.set()
        assert "".join(chunk.choices[0].text for chunk in stream) == engine.text


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port={port}: cannot listen"):
            listen("127.0.0.1", port)


@pytest.mark.slow
def test_a_process_drains_on_sigterm():
    """The command itself, on tiny-512: an answer is complete although SIGTERM comes meanwhile."""
    flags = ["--model=lljax/assets/tiny-512", "--port=0"]
    command = [sys.executable, "scripts/serve.py", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"http://\S+", line).group()
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            stream = client.completions.create(
                model="base",
                prompt="def main():",
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url)
    finally:
        process.kill()
