"""Memory of the host and of devices: whether something fits, and giving back what compiling leaves behind."""

import ctypes
import functools
import os
import re
import sys
from pathlib import Path

import jax
import jax.monitoring
import psutil

from flexolmo_jax.errors import UserError

# Of a container, in both versions of control groups: the files with the limit, the usage and its statistics, and a
# pattern for the page cache in the statistics, which the kernel can reclaim.
_CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", r"^(?:in)?active_file (\d+)$"),
    (
        *("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        r"^total_(?:in)?active_file (\d+)$",
    ),
)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LARGE_SECONDS = 0.5  # compiling a small program leaves little behind


def check_fits(
    needed: int,
    what: str,
    remedy: str,
    device: jax.Device | None = None,  # pyright: ignore[reportInvalidTypeForm]  to type checkers it is a variable
) -> None:
    """Raises UserError, "WHAT takes ... GiB of memory, and ... are free; REMEDY", if it does not fit.

    Args:
      needed: bytes.
      what: the subject of the message; it begins with the file or argument.
      remedy: what to do.
      device: whose memory; by default the first device's.
    """
    free = available_bytes(device or jax.devices()[0])
    if needed > free:
        raise UserError(f"{what} takes {_gib(needed)} GiB of memory, and {_gib(free)} are free; {remedy}")


def available_bytes(device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm]  as above
    """Bytes of memory that are free on a device; on the host, those that this process may still allocate."""
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


@functools.cache
def trim_after_compiling() -> None:
    """Returns to the system, from now on, the heap memory that compiling a large program has freed.

    glibc keeps such memory for the rest of the process: about 100 MiB for each program of a model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def trim_if_large(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and duration_secs > _LARGE_SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(trim_if_large)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f}"


def _text(file: Path) -> str:
    """The text of a file of the system; "" where there is none."""
    return file.read_text() if os.access(file, os.R_OK) else ""
