"""The thread that steps the engines, and how its pieces reach the event loop.

One thread steps all engines in turn: programs that use several devices must be started in the same
order on each of them.
"""

import asyncio
import collections
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from lljax.errors import ConfigError, first_line
from lljax.generation.completion import Growing, Piece, Request
from lljax.serving.errors import ApiError, stopping, wrong


class Call:
    """The completions of one call of the API, as they grow: iterates over (index, piece).

    Lives in the event loop.
    """

    def __init__(self, engine: Any, adapter: str | None):
        self.engine, self.adapter = engine, adapter
        self.growing: list[Growing] = []
        self.open: set[int] = set()  # indices that have not ended
        self._pieces: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

    def put(self, item: tuple[int, Piece] | Exception) -> None:
        self._pieces.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.growing)
        while left:
            item = await self._pieces.get()
            if isinstance(item, Exception):
                raise item
            if item[1].reason == "cancelled":  # by the server: a client that has gone hears nothing
                raise stopping()
            left -= item[1].reason is not None
            yield item


class Worker:
    """Steps engines in a thread. Everything but the thread itself is for the event loop.

    heard: called with every piece, in the event loop.
    failure: why the engines have stopped; None while they work.
    """

    def __init__(self, engines: Iterable[Any], heard: Callable[[Piece], None] = lambda piece: None):
        self.engines = list(engines)
        self.failure: BaseException | None = None
        self._heard = heard
        self._calls: set[Call] = set()
        self._awaited: set[asyncio.Future] = set()
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # ------------------------------------------------------------ the event loop
    @property
    def unfinished(self) -> int:
        """Completions that have not ended."""
        return sum(len(call.open) for call in self._calls)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its present step, and every call that has not ended."""
        self._stopped = True
        self._wake.set()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
        self._end_all(stopping())

    def submit(self, engine: Any, requests: Sequence[Request]) -> Call:
        """Begins to answer `requests`, all of one model.

        Raises:
          ApiError: the engine refuses a request, or has failed.
        """
        if self.failure:
            raise failed(self.failure)
        call = Call(engine, requests[0].adapter)
        try:
            for index, request in enumerate(requests):
                call.growing.append(engine.submit(request, self._listener(call, index)))
        except ConfigError as error:
            raise wrong(None, str(error)) from None
        finally:  # those before a refused one end, too
            call.open = set(range(len(call.growing)))
            if call.growing:
                self._calls.add(call)
            if len(call.growing) < len(requests):
                self.cancel(call)
            self._wake.set()
        return call

    def cancel(self, call: Call) -> None:
        """Frees what the completions of a call take, unless they have ended."""
        for index in call.open:
            call.engine.cancel(call.growing[index])
        self._wake.set()

    def cancel_all(self) -> None:
        for call in self._calls:
            self.cancel(call)

    async def idle(self, engine: Any, adapter: str | None) -> None:
        """Waits until nobody uses a model."""
        while any(call.engine is engine and call.adapter == adapter for call in self._calls):
            await asyncio.sleep(0.05)

    async def between_steps(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, which the thread calls between two steps.

        Raises:
          ApiError: the engines have failed.
        """
        if self.failure:
            raise failed(self.failure)
        done: asyncio.Future = asyncio.get_running_loop().create_future()
        self._awaited.add(done)
        done.add_done_callback(self._awaited.discard)

        def run() -> None:
            try:
                self._tell(_resolve, done, work(), None)
            except Exception as error:
                self._tell(_resolve, done, None, error)

        self._tasks.append(run)
        self._wake.set()
        return await done

    def _hear(self, call: Call, index: int, piece: Piece) -> None:
        self._heard(piece)
        call.put((index, piece))
        if piece.reason is not None:
            call.open.discard(index)
            if not call.open:
                self._calls.discard(call)

    def _end_all(self, error: ApiError) -> None:
        for call in self._calls:
            call.put(error)
        self._calls.clear()
        for done in list(self._awaited):
            _resolve(done, None, error)

    # ------------------------------------------------------------ the thread
    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            try:
                while self._tasks:
                    self._tasks.popleft()()
                more = [engine.step() for engine in list(self.engines)]
            except BaseException as error:  # device memory, or a fault of ours: nobody would know
                logging.exception("the engine has failed")
                self.failure = error
                self._tell(self._end_all, failed(error))
                return
            if not any(more):
                self._wake.wait()

    def _listener(self, call: Call, index: int) -> Callable[[Piece], None]:
        return lambda piece: self._tell(self._hear, call, index, piece)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function in the event loop."""
        assert self._loop is not None, "the worker has not started"
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would hear
            self._loop.call_soon_threadsafe(function, *arguments)


def failed(error: BaseException) -> ApiError:
    return ApiError(500, f"the engine has failed: {first_line(error)[:300]}", code="engine_failed")


def _resolve(done: asyncio.Future, result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error:
        done.set_exception(error)
    else:
        done.set_result(result)
