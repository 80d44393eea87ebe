"""Error messages of the command line: one line for every exception."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.errors import ProcessesError, UserError, first_line

USER, PROGRAM = 2, 1  # exit statuses: the user can fix it; a bug
_ROOT = Path(__file__).parents[2]
_MAKE_ROOM = "make room there, or name a place with more"
# Errors of the operating system, {errno: (problem, remedy)}. Others count as bugs.
_SYSTEM = {
    errno.ENOSPC: ("no space left on the device", _MAKE_ROOM),
    errno.EDQUOT: ("your disk quota is used up", _MAKE_ROOM),
    errno.EFBIG: ("a file grows beyond what is allowed", "raise the limit (ulimit -f), or name another file system"),
    errno.EROFS: ("the file system is read-only", "name a place that can be written"),
    errno.EACCES: ("permission denied", "change its permissions, or name another place"),
    errno.EPERM: ("the operation is not permitted", "change its owner or attributes, or name another place"),
    errno.ENOENT: ("no such file or directory", "check the path"),
    errno.ENOTDIR: ("a part of this path is a file, where a directory is needed", "check the path"),
    errno.EISDIR: ("is a directory, where a file is needed", "name a file"),
    errno.EEXIST: ("exists already", "name another, or remove it first"),
    errno.ENOTEMPTY: ("the directory is not empty", "another program may write there; run the command again"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
    errno.ELOOP: ("links lead in a circle", "name the directory itself"),
    errno.ENXIO: ("is no regular file", "name a file or a directory"),
    errno.ENODEV: ("is no regular file", "name a file or a directory"),
    errno.ESPIPE: ("is a pipe or a device, where a file is needed", "save it as a file first"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("the system has too many open files", "close other programs"),
    errno.EAGAIN: ("no more threads or processes may be started", "raise the limit (ulimit -u), or close others"),
    errno.EIO: ("the device fails to read or write", "check the disk, and copy what is there to another"),
    errno.ESTALE: ("the network file system lost this file", "run the command again"),
    errno.ETIMEDOUT: ("the file system does not answer", "run the command again when it does"),
    errno.ENOTCONN: ("the file system is no longer mounted", "mount it again"),
    errno.EBUSY: ("another program uses it", "run the command again when it has ended"),
}
# Errors of writing: if they name no file, the message names the destination of the command.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
# tensorstore (and Orbax) reports errors of the operating system in the text of a ValueError.
_TENSORSTORE = re.compile(r"\[os_error_code='(\d+)'")
_TENSORSTORE_FILE = re.compile(r'"((?:/|file://)[^"]*)"')
# What errors of communication between processes say, of whatever type they are.
_COLLECTIVE = re.compile(r"\bGloo\b|\bNCCL\b|\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED):|\bbarrier\b")
_MEMORY_REMEDY = "use shorter or fewer sequences, a smaller model, or a machine with more memory"


class Failure(NamedTuple):
    """The one-line message and the exit status of a failed command."""

    line: str
    status: int


def describe(
    error: BaseException, destination: str = "", memory_remedy: str = "", translate: Callable[[UserError], str] = str
) -> Failure:
    """Describes an exception that ended a command.

    Args:
      error: the exception.
      destination: the flag and path that the command writes to, for errors of writing that name no file.
      memory_remedy: what to do if memory does not suffice.
      translate: returns the message of a `UserError`.
    """
    if isinstance(error, UserError):
        return Failure(_one_line(translate(error)), USER)
    lost = _lost_processes(error)
    if lost is not None:
        from flexolmo_jax.distributed import LOST

        return Failure(_one_line(f"{lost}; run the same command again, with all of its processes"), LOST)
    line = _user_line(error, destination or "standard output", memory_remedy or _MEMORY_REMEDY)
    if line is not None:
        return Failure(_one_line(line), USER)
    summary = f"{type(error).__name__}: {first_line(error)[:300]}".removesuffix(f": {type(error).__name__}")
    advice = "this is a fault of the program; please report it, with what --traceback shows"
    return Failure(_one_line(f"{summary} ({_origin(error)}); {advice}"), PROGRAM)


def _one_line(text: str) -> str:
    """The text without line breaks; a name that it quotes from a directory cannot control the terminal."""
    from flexolmo_jax.tables import printable  # with rich, which most commands that fail have loaded

    return printable(" ".join(text.split()))


def _user_line(error: BaseException, destination: str, memory_remedy: str) -> str | None:
    """The message of an error that the user can fix; None for all others."""
    if _is_out_of_memory(error):
        return f"out of memory ({_amount(error)}); {memory_remedy}"
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        return _system_line(error.errno, error.filename2 or error.filename, destination)
    if isinstance(error, ValueError) and (code := _TENSORSTORE.search(str(error))) and int(code[1]) in _SYSTEM:
        files = _TENSORSTORE_FILE.findall(str(error))
        return _system_line(int(code[1]), files[0].removeprefix("file://") if files else None, destination)
    if type(error) is RuntimeError and str(error) == "can't start new thread":
        return _system_line(errno.EAGAIN, None, destination)
    if isinstance(error, RuntimeError | AssertionError) and _innermost(error).endswith("jax/_src/xla_bridge.py"):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        detail = str(error) and f" ({first_line(error)})"
        return f"JAX_PLATFORMS={platforms}: JAX finds no such devices here{detail}; name others, or leave it unset"
    if isinstance(error, ImportError) and re.search(r"gcsfs|s3fs|fsspec|tensorflow", str(error)):
        return f"a path in a bucket: {first_line(error)}; install that package, or mount the bucket"
    if isinstance(error, KeyError) and (scheme := str(error.args[0])).endswith("://"):  # of etils
        return f"{scheme}: is no path; name a local one, or one that begins with gs:// or s3://"
    return None


def _lost_processes(error: BaseException) -> str | None:
    """What happened to the other processes of a run, if they are why it ends."""
    if isinstance(error, ProcessesError):
        return str(error)
    jax, distributed = sys.modules.get("jax"), sys.modules.get("flexolmo_jax.distributed")
    if jax is None or distributed is None or distributed.count() == 1 or _is_out_of_memory(error):
        return None
    # JAX and Orbax raise plain errors too where a collective or a barrier fails.
    is_collective = isinstance(error, ValueError | RuntimeError) and _COLLECTIVE.search(str(error))
    is_barrier = isinstance(error, TimeoutError) and error.errno is None
    if isinstance(error, jax.errors.JaxRuntimeError) or is_collective or is_barrier:
        return f"another process of the run has ended, or cannot be reached ({first_line(error)[:200]}); see its log"
    return None


def _system_line(number: int, file: str | bytes | int | None, destination: str) -> str:
    """The message of an error of the operating system; `file` is the file that it names, if any."""
    problem, remedy = _SYSTEM[number]
    file = "" if isinstance(file, int) or not file else os.fsdecode(file)
    directory = destination.partition("=")[2]
    if number in _WRITING and (
        not file or (directory and Path(file).absolute().is_relative_to(Path(directory).absolute()))
    ):
        file = destination
    return f"{file}: {problem}; {remedy}" if file else f"{problem}; {remedy}"


def _is_out_of_memory(error: BaseException) -> bool:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
        return str(error).startswith("RESOURCE_EXHAUSTED")
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def _amount(error: BaseException) -> str:
    """The number of bytes that could not be allocated, if the error names it."""
    found = re.search(r"(\d[\d.,]*) ?(?:bytes|[KMGTPE]i?B)\b", str(error))
    return f"{found[0]} could not be had" if found else "less is there than it takes"


def _origin(error: BaseException) -> str:
    """FILE:LINE of the innermost frame in this project, or else of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    project_frames = [frame for frame in frames if _is_in_project(frame.filename)]
    if not frames:
        return "no place known"
    frame = (project_frames or frames)[-1]
    file = Path(frame.filename)
    return f"{file.relative_to(_ROOT) if project_frames else file.name}:{frame.lineno}"


def _innermost(error: BaseException) -> str:
    """The file of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _is_in_project(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(_ROOT / "flexolmo_jax") or path.is_relative_to(_ROOT / "configs")
