"""ASGI middleware: API keys, pages of other origins, and metrics for Prometheus."""

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from urllib.parse import urlsplit

from etils import epath
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.request import Update
from flexolmo_jax.serving.scheduler import Job
from flexolmo_jax.serving.schema import ApiError

_OPEN = ("/health",)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_CLIENT_GONE = 499  # as nginx has it


class KeyRequired:
    """An application that answers only those who send one of the keys; `/health` answers all."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        """Wraps an application; keeps no key, only digests."""
        self._app, self._digests = app, [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 where the key is missing or wrong."""
        if scope["type"] != "http" or scope["path"] in _OPEN or self._is_known(Request(scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong; send one that this server knows as the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)

    def _is_known(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, each in constant time.
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def read_keys(file: epath.PathLike | None, variable: str | None, name: str) -> list[str]:
    """API keys of a file, one a line, and that of an environment variable; none where neither is given.

    Args:
      file: text; empty lines and those that begin with "#" are passed over.
      variable: what the environment variable holds, or None.
      name: of the variable, for errors.

    Raises:
      UserError: the file cannot be read or has no key, or what stands there cannot be sent as one.
    """
    keys = []
    if file is not None:
        label = f"--api_key_file={file}"
        try:
            lines = [line.strip() for line in epath.Path(file).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a text"
            raise UserError(f"{label}: cannot be read ({reason}); give a text file with one key a line") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"{label}: has no key; write one a line")
        for number, line in enumerate(lines, start=1):
            if line in keys and not _can_be_sent(line):
                raise UserError(f"{label}: line {number} is no key; use visible ASCII characters without spaces")
    if variable is not None:
        if not _can_be_sent(variable):
            raise UserError(f"{name}: is no key; use visible ASCII characters without spaces, or unset it")
        keys.append(variable)
    return keys


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """An application that pages of these origins may ask, "*" being all."""
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["Retry-After"]
    )


def check_origins(origins: Sequence[str]) -> None:
    """Raises UserError where one is no origin, which no page could ever have."""
    for origin in origins:
        if origin != "*" and not _is_origin(origin):
            raise UserError(
                f"--cors_origin={origin}: is no origin; give scheme, host and port, such as http://localhost:3000, or *"
            )


def _is_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:  # of an IPv6 address without its end
        return False
    return bool(parts.scheme and parts.netloc) and origin == f"{parts.scheme}://{parts.netloc}".lower()


def _can_be_sent(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of its own."""

    def __init__(self, load: Callable[[], Mapping[str, int]]):
        """`load` tells how many requests are "running" and "waiting"."""
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "flexolmo_requests", "HTTP requests by path and status.", ["path", "status"], registry=own
        )
        self._prompt_tokens = Counter("flexolmo_prompt_tokens", "Tokens of prompts that were read.", registry=own)
        self._generated_tokens = Counter("flexolmo_generated_tokens", "Tokens that were written.", registry=own)
        for name in ("running", "waiting"):
            gauge = Gauge(f"flexolmo_sequences_{name}", f"Sequences {name} now.", registry=own)
            gauge.set_function(lambda name=name: load()[name])
        self._first_token = Histogram(
            "flexolmo_time_to_first_token_seconds",
            "From the arrival of a request to the first token of each of its sequences.",
            registry=own,
            buckets=_SECONDS,
        )
        self._duration = Histogram(
            "flexolmo_sequence_duration_seconds",
            "From the arrival of a request to the end of each of its sequences.",
            registry=own,
            buckets=_SECONDS,
        )

    def text(self) -> bytes:
        """All of them, in the text format of Prometheus."""
        return generate_latest(self._registry)

    def answered(self, path: str, status: int) -> None:
        """Counts an HTTP request."""
        known = path if path in _PATHS else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
        self._requests.labels(known, str(status)).inc()

    async def watched(self, job: Job) -> AsyncIterator[tuple[int, Update]]:
        """What a job tells, counted on its way."""
        start, read, begun = time.perf_counter(), set(), set()
        async for index, update in job:
            now = time.perf_counter() - start
            if index not in read:
                read.add(index)
                self._prompt_tokens.inc(len(job.requests[index].token_ids))
            if index not in begun and update.token_ids:
                begun.add(index)
                self._first_token.observe(now)
            self._generated_tokens.inc(len(update.token_ids))
            if update.continuation is not None:
                self._duration.observe(now)
            yield index, update


class Metered:
    """An application whose answers are counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        """Wraps an application."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, and counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_GONE

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._metrics.answered(scope["path"], status)
