"""How this process gives back memory."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Keeps freed memory for what is allocated next; to be called before threads start. Only glibc is told.

    XLA allocates a step's temporary memory anew for each step on a CPU. Given back in between, every page of it is
    mapped and cleared again, which takes a fifth of the time of a step that uses a gigabyte.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        for parameter, value in ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0), (ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
