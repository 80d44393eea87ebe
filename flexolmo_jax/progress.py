"""Progress bars on standard error."""

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def progress_bar(*columns: str | ProgressColumn, shown: bool = True) -> Progress:
    """A bar that leaves nothing behind, and that a log, where it could not move, never sees.

    Args:
      columns: what it is made of; rich's own choice by default.
      shown: False for no bar at all.
    """
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
