"""Many clients, one engine: a thread that owns the engine, and a bounded queue in front of it."""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.request import Request, Update
from flexolmo_jax.serving.schema import ApiError

_LOG = logging.getLogger(__name__)
_STEPS = 8  # tokens that are written before anything is told, unless somebody streams


class Job:
    """Requests of one client, on their way through the engine; made by `Scheduler.submit`.

    Iterating gives (index of the request, update) until every request has ended. Only the event loop on
    which it was made may use it.
    """

    def __init__(self, requests: Sequence[Request], stream: bool, cancel: Callable[["Job"], None]):
        """`cancel` takes the job out of the queue and out of the engine."""
        self.requests, self.stream = tuple(requests), stream
        self.cancelled = False
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Update] | ApiError] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """Yields what the engine tells.

        Raises:
          ApiError: 500, the engine failed; 503, the server is shutting down.
        """
        left = len(self.requests)
        while left:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            left -= event[1].continuation is not None
            yield event

    def cancel(self) -> None:
        """Gives up what has not ended; its places become free."""
        self._cancel(self)

    def put(self, event: tuple[int, Update] | ApiError) -> None:
        """Hands over an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Place(NamedTuple):
    """One request of a job."""

    job: Job
    index: int


class Scheduler:
    """Runs jobs: their requests enter the engine as its slots become free, in the order they came."""

    def __init__(self, make_engine: Callable[[], Engine], queue: int = 32):
        """Makes the engine, and starts the thread that owns it from then on.

        Args:
          make_engine: called again after the engine has failed, when its state may be lost.
          queue: requests that may wait for a slot.
        """
        self._make_engine, self._engine = make_engine, make_engine()
        self._queue, self._slots = queue, self._engine.free
        self._changed = threading.Condition()  # guards what follows
        self._closed = False
        self._waiting: deque[Place] = deque()
        self._entering: list[Place] = []
        self._running: dict[int, Place] = {}  # by the engine's ids
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @property
    def load(self) -> dict[str, int]:
        """How many requests are in the engine ("running"), and how many wait for it ("waiting")."""
        with self._changed:
            return {"running": len(self._entering) + len(self._running), "waiting": len(self._waiting)}

    @property
    def closed(self) -> bool:
        """Whether no job is taken any more."""
        return self._closed

    def submit(self, requests: Sequence[Request], stream: bool = False) -> Job:
        """Queues the requests of a client; to be called on the client's event loop.

        Args:
          requests: of one client.
          stream: whether each token is to be told as soon as it is written; otherwise a few come together, which
            takes less time in all.

        Raises:
          ApiError: 429, the queue has no place for all of them; 503, the server is shutting down.
        """
        job = Job(requests, stream, self._give_up)
        with self._changed:
            if self._closed:
                raise _shutting_down()
            running = len(self._entering) + len(self._running)
            # Those for which slots are free are about to leave the queue.
            waiting = max(0, len(self._waiting) - (self._slots - running))
            if running + len(self._waiting) + len(job.requests) > self._slots + self._queue:
                message = f"the queue is full ({waiting} of {self._queue} places are taken); try again later"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
            self._waiting.extend(Place(job, index) for index in range(len(job.requests)))
            self._changed.notify()
        return job

    def close(self) -> None:
        """Breaks off every job and takes no other; returns at once."""
        with self._changed:
            self._closed = True
            jobs = {place.job for place in (*self._waiting, *self._entering, *self._running.values())}
            self._changed.notify()
        for job in jobs:
            job.put(_shutting_down())

    def join(self) -> None:
        """Waits for the thread to end: after `close`, as long as the engine's step takes."""
        self._worker.join()

    def _give_up(self, job: Job) -> None:
        with self._changed:
            job.cancelled = True
            self._waiting = deque(place for place in self._waiting if place.job is not job)

    def _work(self) -> None:
        try:
            while self._has_work():
                try:
                    self._advance()
                except Exception as error:  # whatever it is, other requests must be served
                    _LOG.error("the engine failed", exc_info=error)
                    self._start_over()
        finally:
            self.close()

    def _has_work(self) -> bool:
        """Waits for something to do; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _advance(self) -> None:
        """Lets requests leave and enter the engine, runs it for a few steps, and hands out what is new."""
        with self._changed:
            gone = [id for id, place in self._running.items() if place.job.cancelled]
            for id in gone:
                del self._running[id]
        for id in gone:
            self._engine.cancel(id)
        with self._changed:
            count = min(self._engine.free, len(self._waiting))
            self._entering = [self._waiting.popleft() for _ in range(count)]
        try:
            ids = self._engine.add([place.job.requests[place.index] for place in self._entering])
        except UserError as error:  # which it raises before it has taken any
            self._refuse(error)
            return
        with self._changed:
            self._running.update(zip(ids, self._entering, strict=True))
            self._entering = []
            steps = 1 if any(place.job.stream for place in self._running.values()) else _STEPS
        for update in self._engine.step(steps):
            place = self._running[update.id]
            if update.continuation is not None:
                with self._changed:
                    del self._running[update.id]
            place.job.put((place.index, update))

    def _refuse(self, error: UserError) -> None:
        """Tells those who were about to enter the engine why they cannot."""
        with self._changed:
            jobs = {place.job for place in self._entering}
            self._entering = []
        for job in jobs:
            self._give_up(job)
            job.put(ApiError(400, str(error)))

    def _start_over(self) -> None:
        """Breaks off the jobs that were in the engine, and makes another engine."""
        with self._changed:
            jobs = {place.job for place in (*self._entering, *self._running.values())}
            self._entering, self._running = [], {}
        for job in jobs:
            self._give_up(job)
            job.put(ApiError(500, "the server failed on this request; its log says why"))
        self._engine = self._make_engine()


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")
