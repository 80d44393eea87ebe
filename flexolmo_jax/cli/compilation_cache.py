"""A directory of compiled programs, so that later processes need not compile them."""

import hashlib
import os
import platform
import re
import stat
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import filelock
import platformdirs

from flexolmo_jax.paths import is_remote

MAX_BYTES = 2**30  # for each machine; JAX removes the least recently used programs
_LOCK_SECONDS = 2  # JAX would wait longer, at each program
_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
_SETTINGS = {
    _SIZE: str(MAX_BYTES),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def keep_compiled(directory: str | None, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Makes JAX keep what it compiles. Call it before JAX is imported.

    A problem with the directory never fails a command: it then runs without a cache.

    Args:
      directory: where; None for the environment's setting or else the user's cache directory; "" for no cache.
      environment: gets JAX's settings.

    Returns:
      None, or why the given directory is not used.
    """
    if directory == "":
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return None
    if directory is None and "JAX_COMPILATION_CACHE_DIR" in environment:
        return None
    try:
        path = directory if directory and is_remote(directory) else str(_prepared(directory, environment))
    except (OSError, RuntimeError) as error:  # of which filelock.Timeout is one; no home is a RuntimeError
        return None if directory is None else str(error)
    environment["JAX_COMPILATION_CACHE_DIR"] = path
    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    _remove_unreadable(path)
    return None


def _prepared(directory: str | None, environment: Mapping[str, str]) -> Path:
    """This machine's folder in a cache, created, writable, without incomplete programs."""
    root = Path(directory).absolute() if directory else platformdirs.user_cache_path("flexolmo-jax") / "compiled"
    path = root / machine_name()
    path.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written")
    if directory is None and path.stat().st_uid != os.geteuid():  # what is loaded from there is run
        raise PermissionError(f"{path} belongs to another user")
    if int(environment.get(_SIZE, MAX_BYTES)) < 0:  # without a bound JAX writes no -atime files
        return path
    with filelock.FileLock(path / ".lockfile", timeout=_LOCK_SECONDS):  # JAX's own lock
        # JAX writes the -atime file after the program: a program without one is incomplete.
        for file in path.glob("*-cache"):
            if not file.with_name(file.name.removesuffix("-cache") + "-atime").exists():
                file.unlink()
    return path


def machine_name() -> str:
    """A name for the processor: a program compiled for one may not run on another that shares the directory."""
    facts = [platform.machine(), platform.processor(), str(os.cpu_count())]
    if sys.platform == "linux":
        facts.append(str(len(os.sched_getaffinity(0))))
        facts += sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*$", _cpuinfo(), re.MULTILINE)))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _remove_unreadable(path: str) -> None:
    """Removes a damaged program from the cache when JAX warns of it, so that JAX writes a new one."""
    show = warnings.showwarning

    def on_warning(message, *arguments) -> None:
        found = re.search(r"reading persistent compilation cache entry for '(\w+)'", str(message))
        if not found:
            show(message, *arguments)
        for file in Path(path).glob(f"{found[1]}-*") if found else ():
            file.unlink(missing_ok=True)

    warnings.filterwarnings("always", "Error reading persistent compilation cache entry")
    warnings.showwarning = on_warning
