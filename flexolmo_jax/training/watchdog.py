"""Ends a process that takes no step for too long, as one does that waits for a process which is stuck."""

import faulthandler
import os
import sys
import threading
import time

from flexolmo_jax import distributed


class Watchdog:
    """Watches a run from a thread of its own while the block runs; `timeout` 0: it does not.

    A process that waits within a collective cannot be interrupted, so this one writes the stacks of all threads to
    standard error, names the step, and ends the process at once. The others then lose it, and end too.
    """

    def __init__(self, timeout: float):
        """Watches for steps that take more than `timeout` seconds, the first one included."""
        self._timeout, self._step, self._since = timeout, 0, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Says that the process is alive, and which step it begins."""
        self._step, self._since = step, time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._timeout / 4)):
            if time.monotonic() - self._since > self._timeout:
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
                sys.stderr.write(
                    f"step {self._step}: not done within {self._timeout:g} seconds (config.faults.step_timeout); "
                    "ended, run the same command again, which resumes from the last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(distributed.LOST)

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._since = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Ends the watch."""
        self._done.set()
