"""The routes of the server."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lljax.errors import first_line
from lljax.serving import metrics
from lljax.serving.answers import Answer
from lljax.serving.body import parse_body, read_body
from lljax.serving.errors import ApiError
from lljax.serving.fields import CHAT, COMPLETION, LOADING, UNLOADING, Field, read_fields
from lljax.serving.jobs import Job, chat_job, text_job
from lljax.serving.models import Models, Served
from lljax.serving.service import Service
from lljax.serving.worker import Call

DONE = b"data: [DONE]\n\n"
GONE = 499  # nginx's status of a client that has left

Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of the two ways to ask for completions."""

    chat: bool
    fields: dict[str, Field]
    job: Callable[[dict[str, Any], Served], Job]


CHATS = Kind(chat=True, fields=CHAT, job=chat_job)
TEXTS = Kind(chat=False, fields=COMPLETION, job=text_job)


def build_app(service: Service) -> Starlette:
    """The application; its engines are stepped between its start-up and shut-down."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        service.start()
        yield
        await service.stop()

    def route(path: str, handler: Handler, method: str = "POST", guarded: bool = True) -> Route:
        return Route(path, _endpoint(service, path, handler, guarded), methods=[method])

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.requests["other", error.status_code] += 1
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return _refusal(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    return Starlette(
        routes=[
            route("/health", health, "GET", guarded=False),
            route("/metrics", show_metrics, "GET", guarded=False),
            route("/v1/models", list_models, "GET"),
            route("/v1/models/{name:path}", show_model, "GET"),
            route("/v1/chat/completions", chat_completions),
            route("/v1/completions", completions),
            route("/v1/load_lora_adapter", load_adapter),
            route("/v1/unload_lora_adapter", unload_adapter),
        ],
        exception_handlers={HTTPException: unknown},
        lifespan=lifespan,
    )


def _endpoint(service: Service, path: str, handler: Handler, guarded: bool):
    """A handler whose errors are OpenAI's objects. guarded: by the API key."""

    async def endpoint(request: Request) -> Response:
        try:
            if guarded:
                service.check_key(request)
            response = await handler(service, request)
        except ApiError as error:
            response = _refusal(error)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception:
            logging.exception("%s", path)
            response = _refusal(ApiError(500, "the server has failed on this request: see its log"))
        service.metrics.requests[path, response.status_code] += 1
        return response

    return endpoint


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


# ---------------------------------------------------------------- state
async def health(service: Service, request: Request) -> Response:
    if service.worker.failure:
        return JSONResponse({"status": "failed"}, 503)
    if service.stopping:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "ok"})


async def show_metrics(service: Service, request: Request) -> Response:
    limits = service.limits
    text = service.metrics.text(service.worker.engines, limits.slots, limits.queue)
    return Response(text, headers={"Content-Type": metrics.TYPE})


async def list_models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model.body() for model in service.models]})


async def show_model(service: Service, request: Request) -> Response:
    return JSONResponse(service.models.get(request.path_params["name"]).body())


# ---------------------------------------------------------------- completions
async def chat_completions(service: Service, request: Request) -> Response:
    return await _complete(service, request, CHATS)


async def completions(service: Service, request: Request) -> Response:
    return await _complete(service, request, TEXTS)


async def _complete(service: Service, request: Request, kind: Kind) -> Response:
    started = time.monotonic()
    service.check_room()
    service.preparing += 1
    try:
        body = await read_body(request, service.limits.max_body)
        job = await service.in_thread(_prepare, body, kind, service.models)
        service.check_room()
        call = service.worker.submit(job.served.engine, job.requests)
    finally:
        service.preparing -= 1
    served = job.served.name
    service.metrics.prompt_tokens[served] += sum(len(prompt.ids) for prompt in job.prompts)
    reply = Reply(service, call, Answer(job, kind.chat), started)
    if job.values["stream"]:
        wanted = job.values["stream_options"].get("include_usage", False)
        return EventStream(reply.events(wanted), reply.close)
    try:
        return JSONResponse(await _unless_gone(reply.whole(), request.receive))
    finally:
        reply.close()


def _prepare(body: bytes, kind: Kind, models: Models) -> Job:
    values = read_fields(parse_body(body), kind.fields)
    return kind.job(values, models.get(values["model"]))


class Reply:
    """One answer while it grows, whole or as a stream."""

    def __init__(self, service: Service, call: Call, answer: Answer, started: float):
        self._service, self._call, self._answer = service, call, answer
        self._choices = answer.choices()
        self._started = started
        seconds = service.limits.timeout
        late = ApiError(504, f"the answer took more than {seconds:g} seconds", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(seconds, call.put, late)

    async def chunks(self) -> AsyncIterator[dict]:
        """The chunks of all choices, as they come."""
        begun: set[int] = set()
        async for index, piece in self._call:
            choice = self._choices[index]
            if not begun:
                self._service.metrics.first_token.add(time.monotonic() - self._started)
            if index not in begun:
                begun.add(index)
                for chunk in choice.begin(self._call.growing[index]):
                    yield chunk
            for chunk in choice.add(piece):
                yield chunk
        self._service.metrics.whole.add(time.monotonic() - self._started)

    async def whole(self) -> dict[str, Any]:
        async for _ in self.chunks():
            pass
        return self._answer.whole(self._choices, self._call.growing)

    async def events(self, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events. usage: whether the last tells the counts of tokens."""
        try:
            async for chunk in self.chunks():
                yield _event(self._answer.chunk([chunk]))
            if usage:
                counts = self._answer.usage(self._choices, self._call.growing)
                yield _event(self._answer.chunk([], counts))
        except ApiError as error:  # the status has been sent
            yield _event(error.body())
        except Exception as error:  # a fault of ours; else the client sees a broken connection
            logging.exception("an answer has failed")
            yield _event(ApiError(500, f"the answer has failed: {first_line(error)[:300]}").body())
        yield DONE

    def close(self) -> None:
        """Frees what the answer takes, if it has not ended."""
        self._timer.cancel()
        self._service.worker.cancel(self._call)


class EventStream(StreamingResponse):
    """A stream of events. close: called at its end, also if the client leaves before it begins."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.headers["content-type"] = "text/event-stream"
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self.stream_response(send), receive)
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._close()


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result of `work`, which is cancelled if the client leaves.

    Raises:
      ClientDisconnect: it has left.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


# ---------------------------------------------------------------- adapters
async def load_adapter(service: Service, request: Request) -> Response:
    service.check_loading()
    values = await _read(service, request, LOADING)
    await service.load_adapter(values["lora_name"], values["lora_path"])
    return PlainTextResponse(f"Success: LoRA adapter '{values['lora_name']}' added successfully.")


async def unload_adapter(service: Service, request: Request) -> Response:
    service.check_loading()
    values = await _read(service, request, UNLOADING)
    await service.unload_adapter(values["lora_name"])
    return PlainTextResponse(f"Success: LoRA adapter '{values['lora_name']}' removed successfully.")


async def _read(service: Service, request: Request, fields: dict[str, Field]) -> dict[str, Any]:
    body = await read_body(request, service.limits.max_body)
    return read_fields(parse_body(body), fields)
