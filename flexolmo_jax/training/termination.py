"""SIGTERM, by which schedulers ask a run to end."""

import contextlib
import signal
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM came where nothing has to be saved first; like KeyboardInterrupt, no error to be handled."""


class Sigterm:
    """Whether SIGTERM has come; only the first one counts, so that another never interrupts what it set going.

    As a handler it raises `Terminated` at once, but where `waiting` says that a step is to be finished first.
    """

    def __init__(self):
        """No signal has come."""
        self.received = False
        self._waits = False

    def __call__(self, *_) -> None:
        """Handles the signal."""
        first, self.received = not self.received, True
        if first and not self._waits:
            raise Terminated

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Lets the block decide what to do, which reads `received`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False


@contextlib.contextmanager
def handle_sigterm() -> Iterator[Sigterm]:
    """Handles SIGTERM while the block runs; in the main thread alone, as Python has it."""
    handler = Sigterm()
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, before)
