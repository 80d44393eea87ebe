"""Progress on standard error: bars on a terminal, lines in a log where work takes long."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich import filesize
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

LOG_SECONDS = 60.0  # between lines of `byte_progress`


def progress_bar(*columns: str | ProgressColumn, shown: bool = True) -> Progress:
    """A bar on a terminal, which disappears when it is done; nothing in a log.

    Args:
      columns: the columns of the bar; rich's default if there are none.
      shown: False for no bar.
    """
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


@contextlib.contextmanager
def byte_progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the block runs, or in a log a line each minute; yields a function that adds bytes to it.

    Args:
      title: what is measured.
      total: number of bytes in all; 0: it is not known.
      done: number of bytes before the block.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with progress_bar(TextColumn("{task.description}"), *columns) as bar:
        task = bar.add_task(title, total=total or None, completed=done)
        start = logged = time.monotonic()

        def advance(count: int) -> None:
            nonlocal logged
            bar.update(task, advance=count)
            now = time.monotonic()
            if bar.disable and now - logged >= LOG_SECONDS:
                logged = now
                completed = bar.tasks[task].completed
                sys.stderr.write(f"{title}: {_bytes_line(completed, total, (completed - done) / (now - start))}\n")

        yield advance


class Stages:
    """Progress of a command with stages that take different times, and the remaining time.

    On a terminal it is a bar, in a log a line from time to time. Both go to standard error.
    """

    def __init__(self, label: str, every: float = 30.0):
        """Begins each log line with `label`; log lines are at least `every` seconds apart."""
        self._label, self._every, self._logged, self._start = label, every, float("-inf"), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = progress_bar(*columns)
        self._task = self._bar.add_task("", total=None, left="")

    def say(self, stage: str, done: int, total: int) -> None:
        """Shows the current stage, and that `done` of `total` are done; the others take as long on average."""
        now = time.monotonic()
        left = f"about {_duration((now - self._start) / done * (total - done))} left" if done else ""
        self._bar.update(self._task, description=stage, completed=done, total=total, left=left)
        if self._bar.disable and now - self._logged >= self._every:
            self._logged = now
            sys.stderr.write(f"{self._label}: {stage} ({', '.join(filter(None, [f'{done} of {total} done', left]))})\n")

    def __enter__(self) -> "Stages":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()


def _bytes_line(completed: float, total: int, rate: float) -> str:
    """How many bytes are done, of how many if that is known, how many a second, and the time left."""
    words = [f"{_size(completed)} of {_size(total)}" if total else _size(completed), f"{_size(rate)}/s"]
    if total and rate:
        words.append(f"about {_duration((total - completed) / rate)} left")
    return ", ".join(words)


def _size(count: float) -> str:
    return filesize.decimal(round(count))


def _duration(seconds: float) -> str:
    """A time in whole seconds, minutes or hours."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
