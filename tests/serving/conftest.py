"""A server in a thread of this process, and an engine that does as it is told."""

import contextlib
import itertools
import threading

import numpy as np
import pytest

from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.inference.request import Continuation, Update
from flexolmo_jax.serving.logprobs import TokenStrings
from flexolmo_jax.serving.parsing import Served
from flexolmo_jax.serving.scheduler import Scheduler
from flexolmo_jax.serving.server import Server, address, listen
from tests.support.fast_engine import fast_engine

PATIENCE = 600  # seconds before a test that hangs gives up


class ObedientEngine:
    """An engine that writes "x" in each step, and waits where a test wants it to.

    Attributes:
      gate: steps wait until it is set.
      error: raised by the next step, once.
      most: the largest number of requests that were in flight at once.
      entered: the first token of each request, in the order in which they came.
      cancelled: ids.
    """

    def __init__(self, slots=2):
        """Free slots, an open gate."""
        self.gate, self.error, self.most, self.entered, self.cancelled = threading.Event(), None, 0, [], []
        self.gate.set()
        self._slots, self._ids, self._written = slots, itertools.count(), {}

    @property
    def free(self):
        """Free slots."""
        return self._slots - len(self._written)

    def add(self, requests):
        """Takes requests."""
        assert len(requests) <= self.free
        ids = [next(self._ids) for _ in requests]
        self._written |= {id: [request, 0] for id, request in zip(ids, requests, strict=True)}
        self.entered += [request.token_ids[0] for request in requests]
        self.most = max(self.most, len(self._written))
        return ids

    def step(self, max_steps):
        """Writes an "x" for each request in flight."""
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        updates = []
        for id, (request, written) in list(self._written.items()):
            continuation, self._written[id][1] = None, written + 1
            if written + 1 == request.max_new_tokens:
                del self._written[id]
                layers = np.array([[0.75, 0.25], [0.25, 0.75]])
                experts = {"anchor": 0.5, "news": 0.5}
                continuation = Continuation("x" * (written + 1), [120] * (written + 1), experts, layers, "length")
            updates.append(Update(id, "x", [120], continuation))
        return updates

    def cancel(self, id):
        """Drops a request."""
        self.cancelled.append(id)
        self._written.pop(id, None)


@contextlib.contextmanager
def _running(make_engine, queue=32, keys=(), origins=(), **served):
    served = {
        "names": ("tiny",),
        "roster": ("anchor", "news"),
        "encode": lambda text: [256, *text.encode()],
        "decode": lambda ids: bytes(id for id in ids if id < 256).decode(),
        "strings": TokenStrings(byte_tokenizer()),
        "chat": "the model has no chat template",
        "vocab_size": 260,
        "max_length": 64,
        "max_sequences": queue,
    } | served
    listener = listen("127.0.0.1", 0)
    url = address(listener)
    scheduler = Scheduler(make_engine, queue)
    server = Server(Served(**served), scheduler, ready="", keys=keys, origins=origins)
    started = threading.Event()
    server.config.callback_notify, server.config.timeout_notify = _setter(started), 0
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield url, scheduler
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def _setter(event):
    async def notify():
        event.set()

    return notify


@pytest.fixture(scope="package", autouse=True)
def _fast_engine():
    with fast_engine():
        yield


@pytest.fixture(scope="session")
def running():
    """A context of a server, which gives (url, scheduler): `running(make_engine, queue=32, keys=(), **served)`."""
    return _running


@pytest.fixture(scope="session")
def obedient():
    """The class of such engines."""
    return ObedientEngine


@pytest.fixture
def engine():
    """An engine that does as it is told."""
    return ObedientEngine()
