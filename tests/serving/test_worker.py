"""The thread that steps, seen from an event loop."""

import asyncio

import pytest
from serving.cases import ScriptedEngine

from lljax.errors import ConfigError
from lljax.generation.completion import Request
from lljax.serving.errors import ApiError
from lljax.serving.worker import Worker

REQUEST = Request(prompt=[1], tokens=50)


def with_worker(engine, work):
    async def run():
        worker = Worker([engine])
        worker.start()
        try:
            return await asyncio.wait_for(work(worker), 20)
        finally:
            await worker.stop()

    return asyncio.run(run())


@pytest.fixture
def engine(tokenizer):
    return ScriptedEngine(tokenizer, "def add(first, second)")


def test_every_piece_arrives_in_order(engine):
    async def work(worker):
        call = worker.submit(engine, [REQUEST, REQUEST])
        assert worker.unfinished == 2
        texts = ["", ""]
        async for index, piece in call:
            texts[index] += piece.text
        assert texts == [engine.text] * 2 and worker.unfinished == 0

    with_worker(engine, work)


def test_a_cancelled_call_frees_its_slots(engine):
    async def work(worker):
        engine.gate.clear()
        call = worker.submit(engine, [REQUEST] * 3)
        worker.cancel(call)
        while worker.unfinished:
            await asyncio.sleep(0.01)
        assert not engine.active and not engine.waiting

    with_worker(engine, work)


def test_when_one_request_is_refused_those_before_it_end(engine):
    submit, seen = engine.submit, []

    def second_is_refused(request, heard):
        if seen:
            raise ConfigError("too long")
        seen.append(request)
        return submit(request, heard)

    engine.submit = second_is_refused

    async def work(worker):
        with pytest.raises(ApiError, match="too long"):
            worker.submit(engine, [REQUEST] * 2)
        while worker.unfinished:
            await asyncio.sleep(0.01)

    with_worker(engine, work)


def test_work_between_steps_is_done_while_requests_run(engine):
    async def work(worker):
        call = worker.submit(engine, [REQUEST])
        assert await worker.between_steps(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await worker.between_steps(lambda: 1 // 0)
        assert [piece async for _, piece in call][-1].reason == "stop"

    with_worker(engine, work)


def test_a_worker_that_stops_ends_every_call(engine):
    async def work(worker):
        engine.gate.clear()
        call = worker.submit(engine, [REQUEST])
        await worker.stop()
        with pytest.raises(ApiError, match="stopping"):
            [piece async for _, piece in call]

    with_worker(engine, work)


def test_a_failure_ends_every_call(engine):
    async def work(worker):
        engine.gate.clear()
        call = worker.submit(engine, [REQUEST])
        engine.fault = RuntimeError("broken")
        with pytest.raises(ApiError, match="broken"):
            [piece async for _, piece in call]
        with pytest.raises(ApiError, match="broken"):
            worker.submit(engine, [REQUEST])
        with pytest.raises(ApiError, match="broken"):
            await worker.between_steps(lambda: 7)

    with_worker(engine, work)
