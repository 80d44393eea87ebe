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

from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.inference.request import Update
from flexolmo_jax.serving.scheduler import Job
from flexolmo_jax.serving.schema import ApiError

_OPEN = ("/health",)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_CLIENT_GONE = 499  # as nginx has it


class KeyRequired:
    """Middleware that requires one of the keys, except for `/health`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        """Wraps an application; stores digests of the keys."""
        self._app, self._digests = app, [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Responds 401 if the key is missing or wrong."""
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
        digest = _digest(key.strip())
        # All are compared, each in constant time.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def read_keys(file: epath.PathLike | None, variable: str | None, name: str) -> list[str]:
    """API keys from a file, one per line, and from an environment variable.

    Args:
      file: a text file, or None; empty lines and lines that begin with "#" are skipped.
      variable: the value of the environment variable, or None.
      name: the name of the variable, for errors.

    Raises:
      UserError: the file cannot be read, has no key, or has one that cannot be sent in a header.
    """
    keys = []
    if file is not None:
        try:
            lines = [line.strip() for line in epath.Path(file).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a text"
            raise UserError(f"{file}: cannot be read ({reason}); give a text file with one key a line") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"{file}: has no key; write one a line")
        for number, line in enumerate(lines, start=1):
            if line in keys and not _can_be_sent(line):
                raise UserError(f"{file}: line {number} is no key; use visible ASCII characters without spaces")
    if variable is not None:
        if not _can_be_sent(variable):
            raise UserError(f"{name}: is no key; use visible ASCII characters without spaces, or unset it")
        keys.append(variable)
    return keys


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """An application that pages of these origins may use; "*": of any origin."""
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["Retry-After"]
    )


def check_origins(origins: Sequence[str]) -> None:
    """Raises ArgumentError for an origin that no page can have."""
    for origin in origins:
        if origin != "*" and not _is_origin(origin):
            problem = "is no origin; give scheme, host and port, such as http://localhost:3000, or *"
            raise ArgumentError("origins", origin, problem)


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
        """`load` returns the numbers of "running" and "waiting" requests."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "flexolmo_requests", "HTTP requests by path and status.", ["path", "status"], registry=registry
        )
        self._prompt_tokens = Counter("flexolmo_prompt_tokens", "Tokens of prompts that were read.", registry=registry)
        self._generated_tokens = Counter("flexolmo_generated_tokens", "Tokens that were written.", registry=registry)
        for name in ("running", "waiting"):
            gauge = Gauge(f"flexolmo_sequences_{name}", f"Sequences {name} now.", registry=registry)
            gauge.set_function(lambda name=name: load()[name])
        self._first_token = Histogram(
            "flexolmo_time_to_first_token_seconds",
            "From the arrival of a request to the first token of each of its sequences.",
            registry=registry,
            buckets=_SECONDS,
        )
        self._duration = Histogram(
            "flexolmo_sequence_duration_seconds",
            "From the arrival of a request to the end of each of its sequences.",
            registry=registry,
            buckets=_SECONDS,
        )

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def answered(self, path: str, status: int) -> None:
        """Counts an HTTP request."""
        known = path if path in _PATHS else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
        self._requests.labels(known, str(status)).inc()

    async def watched(self, job: Job) -> AsyncIterator[tuple[int, Update]]:
        """The updates of a job, which it counts."""
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
    """Middleware that counts responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        """Wraps an application."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts the response by its status."""
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
