"""What tests of the server share: a real engine on the tiny model, an engine that writes what it is
told, and clients.
"""

import asyncio
import contextlib
import signal
import threading
import time
from types import SimpleNamespace

from starlette.testclient import TestClient

from lljax.generation.completion import Growing
from lljax.generation.engine import Counts, Engine
from lljax.interop.open import open_base
from lljax.models.families import spec_from_hf
from lljax.serving.app import build_app
from lljax.serving.models import Models, served
from lljax.serving.server import DrainingServer, address, listen
from lljax.serving.service import Limits, Service

LONGEST = 512
# Writes roles, contents, calls and tools, in Hermes' form.
HERMES = (
    "{% for tool in tools or [] %}<tool_call>{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}\n{% endfor %}"
    "{% if shout %}LOUD {% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_engine(tiny, rows=4):
    """An engine on the tiny model, and the model."""
    from lljax.build import load_base

    base = open_base(tiny)
    decoder = load_base(base, spec_from_hf(base.config), "float32")
    return Engine(decoder, base.tokenizer(), rows=rows, chunk=64, prefix_bytes=1 << 20), decoder


class ScriptedEngine:
    """Writes `text` for every request, a token a step for each of `rows`; waits while `gate` is
    shut.
    """

    def __init__(self, tokenizer, text="", rows=2):
        self.tokenizer, self.text, self.rows = tokenizer, text, rows
        self.spec = SimpleNamespace(V=len(tokenizer))
        self.waiting, self.active, self.inbox = [], [], []
        self.gate = threading.Event()
        self.gate.set()
        self.requests = []
        self.fault = None

    def submit(self, request, heard=None):
        growing = Growing(request, self.tokenizer, heard)
        self.requests.append(request)
        self.waiting.append(growing)
        return growing

    def cancel(self, growing):
        self.inbox.append(growing)

    def counts(self):
        waiting = len(self.waiting) + len(self.inbox)
        return Counts(waiting, 0, len(self.active), read=0, reused=0, written=0, kept=0)

    def step(self):
        if self.fault:
            raise self.fault
        while self.inbox:
            growing = self.inbox.pop()
            for rows in (self.waiting, self.active):
                if growing in rows:
                    rows.remove(growing)
            if growing.reason is None:
                growing.end("cancelled")
        while self.waiting and len(self.active) < self.rows:
            self.active.append(self.waiting.pop(0))
        if self.gate.wait(0.01):
            for growing in self.active:
                if growing.reason is None:
                    self.write(growing)
        self.active = [growing for growing in self.active if growing.reason is None]
        return bool(self.waiting or self.active or self.inbox)

    def write(self, growing):
        tokens = self.tokenizer(self.text)["input_ids"]
        if len(growing.tokens) < len(tokens):
            growing.add(tokens[len(growing.tokens)], None)
        else:
            growing.end("stop")


def a_model(name, engine, tokenizer, **more):
    ends = frozenset({tokenizer.eos_token_id})
    return served(name, engine, tokenizer, ends=ends, **{"longest": LONGEST} | more)


@contextlib.contextmanager
def running(*models, **limits):
    """(address, service, server) of a server in a thread."""
    service = Service(Models(*models), Limits(**limits))
    sock = listen("127.0.0.1", 0)
    server = DrainingServer(service, drain=10)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    url = address(sock)
    thread.start()
    until(lambda: server.started)
    try:
        yield url, service, server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


@contextlib.contextmanager
def client_of(*models, adapters=None, **limits):
    """(client, service) of models."""
    service = Service(Models(*models), Limits(**limits), adapters)
    with TestClient(build_app(service)) as client:
        yield client, service


def error_of(response, status):
    """The error object of an answer with this status."""
    assert response.status_code == status, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 1000
    return error
