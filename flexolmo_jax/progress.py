"""Progress bars on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def progress_bar(*columns: str | ProgressColumn, shown: bool = True) -> Progress:
    """A bar that leaves nothing behind, and that a log, where it could not move, never sees.

    Args:
      columns: what it is made of; rich's own choice by default.
      shown: False for no bar at all.
    """
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


@contextlib.contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the block runs; yields what is to be called with numbers of bytes, as they are done."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar(TextColumn("{task.description}"), *columns) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, advance=done)


class Stages:
    """How far a command of unlike parts has come, and how long it may yet take.

    A bar on a terminal; in a log a line now and then, on standard error.
    """

    def __init__(self, label: str, every: float = 30.0):
        """Lines of a log begin with `label`, and are `every` seconds apart at least."""
        self._label, self._every, self._logged = label, every, float("-inf")
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = progress_bar(*columns)
        self._task = self._bar.add_task("", total=None, left="")

    def say(self, what: str, done: int, total: int, seconds_left: float | None) -> None:
        """Shows what is being done, after `done` of `total` parts, and the time left, where it can be told."""
        left = "" if seconds_left is None else f"about {_duration(seconds_left)} left"
        self._bar.update(self._task, description=what, completed=done, total=total, left=left)
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= self._every:
            self._logged = now
            sys.stderr.write(f"{self._label}: {what} ({', '.join(filter(None, [f'{done} of {total} done', left]))})\n")

    def __enter__(self) -> "Stages":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    """A time as one says it: in whole seconds, minutes or hours."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
