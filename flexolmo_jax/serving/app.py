"""The routes: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.request import Continuation, Update
from flexolmo_jax.serving.middleware import KeyRequired, Metered, Metrics, allow_origins
from flexolmo_jax.serving.parsing import Completion, Served, parse, parse_chat
from flexolmo_jax.serving.reply import ChatReply, CompletionReply, Reply
from flexolmo_jax.serving.scheduler import Job, Scheduler
from flexolmo_jax.serving.schema import ApiError

BODY_LIMIT = 16 * 2**20  # bytes


_Told = AsyncIterator[tuple[int, Update]]


def make_app(served: Served, scheduler: Scheduler, keys: Sequence[str] = (), origins: Sequence[str] = ()) -> ASGIApp:
    """The application, for any ASGI server that runs it on one event loop.

    Args:
      served: the model.
      scheduler: what runs requests.
      keys: one of them must come with each request but those for `/health`; none: all may ask.
      origins: pages of these may ask, "*" being all.
    """
    started, metrics = int(time.time()), Metrics(lambda: scheduler.load)

    def model(name: str) -> dict[str, Any]:
        described = {"experts": served.roster, "max_length": served.max_length}
        return {"id": name, "object": "model", "created": started, "owned_by": "flexolmo"} | described

    async def answer(request: Request, read: Callable[[bytes, Served], Completion], kind: type[Reply]) -> Response:
        completion = read(await _body(request), served)
        job = scheduler.submit(completion.requests, completion.stream)
        told, reply = metrics.watched(job), kind(completion, served)
        if completion.stream:
            return _JobStream(job, _events(told, reply, completion.include_usage))
        return JSONResponse(reply.whole(await _unless_gone(request, job, told)))

    async def completions(request: Request) -> Response:
        return await answer(request, parse, CompletionReply)

    async def chat_completions(request: Request) -> Response:
        return await answer(request, parse_chat, ChatReply)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model(name) for name in served.names]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in served.names:
            raise ApiError(404, f"model {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(model(name))

    async def health(request: Request) -> Response:
        status = {"status": "shutting down" if scheduler.closed else "ok"} | scheduler.load
        return JSONResponse(status, 503 if scheduler.closed else 200)

    async def tell_metrics(request: Request) -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
        Route("/metrics", tell_metrics),
    ]
    handlers = {
        ApiError: _answer_api_error,
        HTTPException: _answer_http_exception,
        UserError: _answer_user_error,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_exception,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app = Metered(KeyRequired(app, keys) if keys else app, metrics)
    # Outermost: pages may read errors too, and ask without a key what they may ask.
    return allow_origins(app, origins) if origins else app


class _JobStream(StreamingResponse):
    """A stream of events that gives up its job when it ends, be it because the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[str]):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(told: _Told, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk whenever there is something new, the end of each choice, then what was asked for."""
    ended = {}
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        async for index, update in told:
            if update.continuation is not None:
                ended[index] = update.continuation
            chunk = reply.chunk(index, update)
            if chunk is not None:
                yield _event(chunk)
        if include_usage:
            yield _event(reply.usage_chunk([ended[index] for index in sorted(ended)]))
    except ApiError as error:
        yield _event(error.body)
    else:
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _unless_gone(request: Request, job: Job, told: _Told) -> list[Continuation]:
    """What becomes of each request of a job; the job is given up when the client goes away."""

    async def collect() -> list[Continuation]:
        ended = {index: update.continuation async for index, update in told if update.continuation is not None}
        return [ended[index] for index in sorted(ended)]

    async def client_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.create_task(collect())
    tasks = [answer, asyncio.create_task(client_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        for task in tasks:
            task.cancel()
        job.cancel()


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT:
            raise ApiError(413, f"the body is longer than {BODY_LIMIT} bytes; send fewer prompts at once")
    return bytes(body)


async def _answer_api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_http_exception(request: Request, error: HTTPException) -> Response:
    """An address or a method that does not exist."""
    known = "POST /v1/completions, POST /v1/chat/completions and GET /v1/models"
    message = f"{request.method} {request.url.path}: {error.detail}; there is {known}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _answer_user_error(request: Request, error: UserError) -> Response:
    return await _answer_api_error(request, ApiError(400, str(error)))


async def _answer_nobody(request: Request, error: ClientDisconnect) -> None:
    """The client has gone."""


async def _answer_exception(request: Request, error: Exception) -> Response:
    return await _answer_api_error(request, ApiError(500, "the server failed on this request; its log says why"))
