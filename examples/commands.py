"""Runs `flexolmo` commands, each in a process of its own, and shows them."""

import shlex
import subprocess
import sys

from rich.console import Console

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def flexolmo(*arguments: str) -> None:
    """Prints and runs one `flexolmo` command; its failure ends this process with its status."""
    _console.print("$ " + shlex.join(["flexolmo", *arguments]), style="dim")
    code = subprocess.run([sys.executable, "-m", "flexolmo_jax", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def title(text: str) -> None:
    """Prints the heading of a stage."""
    _console.print(f"\n{text}", style="bold")
