"""Traces some steps of a run, for xprof."""

import os

import jax
from etils import epath

PROFILE = "profile"  # folder of a workdir


class Profile:
    """Traces `steps` steps from step `first` on into a folder; `first` 0: none. Every process traces its devices."""

    def __init__(self, folder: epath.Path, first: int, steps: int):
        """Traces nothing yet."""
        self._folder, self._first, self._end, self._is_on = folder, first, first + steps, False

    def begins(self, step: int) -> None:
        """Is called before each step."""
        if step == self._first:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._is_on = True
        elif step == self._end:
            self._stop()

    def _stop(self) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
        self._is_on = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        """Ends the trace of a run that ends within it."""
        self._stop()
