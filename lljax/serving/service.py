"""What the server is made of, and the limits that every request meets."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import hmac
import math
from collections.abc import Callable
from typing import Any, Protocol

from starlette.requests import Request

from lljax.errors import LljaxError, first_line
from lljax.serving.errors import ApiError, stopping, wrong
from lljax.serving.metrics import Metrics
from lljax.serving.models import Models, Served
from lljax.serving.worker import Worker

PREPARING = 2  # threads that read bodies and tokenize prompts
LONGEST_WAIT = 60  # seconds that a client is told to wait before it tries again


@dataclasses.dataclass(frozen=True)
class Limits:
    """api_key: that clients must send; None for all clients.
    max_body: bytes. slots: completions that an engine serves at once. queue: completions that may
    wait besides. timeout: seconds from a request to the end of its answer.
    allow_loading: whether clients may load and unload adapters.
    """

    api_key: str | None = None
    max_body: int = 32 << 20
    slots: int = 8
    queue: int = 64
    timeout: float = 3600.0
    allow_loading: bool = False


class Adapters(Protocol):
    """Where adapters come from: lljax.serving.opening.Library."""

    def read_adapter(self, name: str, path: str) -> Callable[[], Served]:
        """Reads an adapter from disk, in a thread of its own; returns what puts it on the engine
        of its base, to be called between two steps of the engines.
        """
        ...

    def remove_adapter(self, model: Served) -> None:
        """Frees what an adapter takes; called between two steps of the engines."""
        ...


class Service:
    """Everything that the routes share. Lives in the event loop.

    adapters: of clients; None if there are none to load.
    stopping: new requests are refused, and running ones end.
    """

    def __init__(self, models: Models, limits: Limits, adapters: Adapters | None = None):
        self.models, self.limits, self.metrics = models, limits, Metrics()
        self.worker = Worker(models.engines, self.metrics.heard)
        self.stopping = False
        self.preparing = 0  # requests that are read, before they reach the engine
        self._adapters = adapters
        self._loading = asyncio.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(PREPARING, "prepare")

    @property
    def busy(self) -> bool:
        return bool(self.preparing or self.worker.unfinished)

    def start(self) -> None:
        self.worker.start()

    async def stop(self) -> None:
        self.stopping = True
        await self.worker.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs what would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    # ------------------------------------------------------------ limits
    def check_key(self, request: Request) -> None:
        """Raises ApiError if the request lacks the key of the server."""
        if self.limits.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode(), self.limits.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_room(self) -> None:
        """Raises ApiError if the server is stopping or its queue is full.

        A call of many prompts is let in as long as anything is: it could never be answered
        otherwise.
        """
        if self.stopping:
            raise stopping()
        if self.worker.unfinished < self.limits.slots + self.limits.queue:
            return
        wait = min(max(1, math.ceil(self.metrics.whole.mean)), LONGEST_WAIT)
        raise ApiError(
            429,
            f"{self.limits.queue} completions are waiting already: try again in {wait} s",
            code="queue_full",
            headers={"Retry-After": str(wait)},
        )

    # ------------------------------------------------------------ adapters
    def check_loading(self) -> None:
        if not self.limits.allow_loading or self._adapters is None:
            raise ApiError(403, "start the server with --allow_loading to change its adapters")

    async def load_adapter(self, name: str, path: str) -> None:
        """Adds a model.

        Raises:
          ApiError: the name is taken, or the adapter cannot be used.
        """
        async with self._loading:
            if name in self.models.names:
                raise wrong("lora_name", f"{name!r} is the name of a model already")
            assert self._adapters is not None
            try:
                attach = await asyncio.to_thread(self._adapters.read_adapter, name, path)
                model = await self.worker.between_steps(attach)
            except (LljaxError, ValueError, OSError) as error:
                raise wrong("lora_path", first_line(error)) from None
            self.models.add(dataclasses.replace(model, loaded=True))

    async def unload_adapter(self, name: str) -> None:
        """Removes a model that was loaded, once the requests that use it have ended."""
        async with self._loading:
            model = self.models.get(name)
            if not model.loaded:
                raise wrong("lora_name", f"{name!r} was not loaded while the server runs")
            assert self._adapters is not None
            self.models.remove(name)
            await self.worker.idle(model.engine, model.adapter)
            remove = functools.partial(self._adapters.remove_adapter, model)
            await self.worker.between_steps(remove)
