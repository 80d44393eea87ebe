"""What `/metrics` tells Prometheus."""

import time
from collections.abc import AsyncIterator, Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexolmo_jax.inference.request import Update
from flexolmo_jax.serving.scheduler import Job

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
_CLIENT_GONE = 499  # as nginx has it


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
