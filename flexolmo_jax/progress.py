"""Progress bars on standard error."""

import contextlib
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
