"""How much memory is left: asked before much is taken, since a system that has none left ends processes unasked."""

import os
import re
from pathlib import Path

import jax
import psutil

from flexolmo_jax.errors import UserError

# Of a container, in either version of control groups: the limit, and what is used.
_CONTAINER = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


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
    for names in _CONTAINER:
        limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in names)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used))
    return free


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f}"


def _number(file: Path) -> int | None:
    """The number in a file of the system; None where there is none."""
    text = file.read_text() if os.access(file, os.R_OK) else ""
    return int(text) if re.fullmatch(r"\d+\s*", text) else None
