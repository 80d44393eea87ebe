"""How much memory is left: asked before much is taken, since a system that has none left ends processes unasked."""

import os
import re
from pathlib import Path

import jax
import psutil

from flexolmo_jax.errors import UserError

# Of a container, in either version of control groups: the limit, what is used, and where it says what of that is files
# that were read or written, which make room for what is needed.
_CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", r"^(?:in)?active_file (\d+)$"),
    (
        *("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        r"^total_(?:in)?active_file (\d+)$",
    ),
)


def check_fits(needed: int, what: str, remedy: str, device: jax.Device | None = None) -> None:
    """Raises UserError, "WHAT takes ... GiB of memory, and ... are free; REMEDY", where that much is not left.

    Args:
      needed: bytes.
      what: the flag and what is asked for.
      remedy: what to do.
      device: whose memory; by default the first device's.
    """
    free = available_bytes(device or jax.devices()[0])
    if needed > free:
        raise UserError(f"{what} takes {_gib(needed)} GiB of memory, and {_gib(free)} are free; {remedy}")


def available_bytes(device: jax.Device) -> int:
    """Bytes of memory that are left on a device; of the host, those that this process may still take."""
    statistics = None if device.platform == "cpu" else device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    free = psutil.virtual_memory().available
    for *names, files in _CONTAINER:
        limit, used, statistics = (_text(Path("/sys/fs/cgroup") / name).strip() for name in names)
        if limit.isdigit() and used.isdigit():
            cached = sum(map(int, re.findall(files, statistics, re.MULTILINE)))
            free = min(free, max(0, int(limit) - max(0, int(used) - cached)))
    return free


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f}"


def _text(file: Path) -> str:
    """The text of a file of the system; "" where there is none."""
    return file.read_text() if os.access(file, os.R_OK) else ""
