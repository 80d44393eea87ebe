"""The one family of errors that the command line turns into one line, and what other libraries raise instead."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

_STDERR = threading.RLock()  # file descriptor 2 is the whole process's


class UserError(Exception):
    """Bad input: the message names the file or flag, what is wrong, and what would be right.

    Raise it for anything a user can fix (a flag, a file, a configuration key). The command line prints
    it on standard error, without a traceback, and exits with status 2.
    """


@contextlib.contextmanager
def rust_errors(what: str, remedy: str) -> Iterator[None]:
    """Makes a `UserError` of what a library written in Rust raises in the block: "WHAT (its words); REMEDY".

    `tokenizers` raises `Exception` itself, nothing narrower; where its code panics, pyo3 raises a `PanicException`,
    which is no `Exception` and cannot be imported.
    """
    try:
        with _quiet_stderr():
            yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({first_line(error)}); {remedy}") from error


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keeps what native code writes to standard error in the block: it becomes a note of the error that is raised."""
    with _STDERR, tempfile.TemporaryFile() as written, contextlib.ExitStack() as restore:
        stderr = os.dup(2)
        restore.callback(os.close, stderr)
        restore.callback(os.dup2, stderr, 2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException as error:
            written.seek(0)
            error.add_note(written.read().decode(errors="replace"))
            raise


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
