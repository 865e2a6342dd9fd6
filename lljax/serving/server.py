"""Runs the application on a socket, and ends it gracefully on SIGTERM and Ctrl-C."""

import socket
import time
from types import FrameType

import uvicorn

from lljax.errors import ConfigError, LljaxError, first_line
from lljax.serving.app import build_app
from lljax.serving.service import Service

KEEP_ALIVE = 75  # seconds that an idle connection stays open
LAST_BYTES = 5  # seconds to send the rest of the answers once the engines are idle


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is read.

    Raises:
      ConfigError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host={host} --port={port}: cannot listen there ({first_line(error)}): "
            "use another, or --port=0 for any that is free"
        ) from None


def address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, sock: socket.socket, drain: float) -> None:
    """Answers requests until a signal; then lets running requests end, for at most `drain` seconds.

    Raises:
      LljaxError: the engines have failed.
    """
    DrainingServer(service, drain).run([sock])
    if service.worker.failure:
        raise LljaxError(f"the engine has failed: {first_line(service.worker.failure)}")


class DrainingServer(uvicorn.Server):
    """On a signal, goes on answering 503 to new requests until the running ones have ended."""

    def __init__(self, service: Service, drain: float):
        config = uvicorn.Config(
            build_app(service),
            lifespan="on",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)
        self._service, self._drain = service, drain
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.stopping:  # a second signal: at once
            self.should_exit = self.force_exit = True
        self._service.stopping = True

    async def on_tick(self, counter: int) -> bool:
        service, now = self._service, time.monotonic()
        if service.worker.failure:
            service.stopping = self.should_exit = True
        if service.stopping and self._until is None:
            self._until = now + self._drain
        if self._until is not None and (not service.busy or now > self._until):
            service.worker.cancel_all()
            self.should_exit = True
        return await super().on_tick(counter)
