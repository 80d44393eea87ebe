"""The one family of errors that the command line turns into one line, and what other libraries raise instead."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

_STDERR = threading.RLock()  # file descriptor 2 is the whole process's


class UserError(Exception):
    """Bad input: the message names the file or argument, what is wrong, and what would be right.

    Raise it for anything a user can fix. The command line prints it on standard error, without a traceback, and exits
    with status 2. Messages never name flags: `cli.flags_of` translates arguments, paths and keys of a configuration
    (`config.steps`) to the flags that gave them.
    """


class ArgumentError(UserError, ValueError):
    """An argument of a function, or a key of a configuration, has a value that makes no sense."""

    def __init__(self, argument: str, value: object, problem: str):
        """Reads "ARGUMENT=VALUE: PROBLEM".

        Args:
          argument: its name, such as "top_k" or "config.data.batch_size".
          value: what was given.
          problem: what is wrong with it, and what would be right.
        """
        super().__init__(f"{argument}={value}: {problem}")
        self.argument, self.value, self.problem = argument, value, problem


class NotFoundError(UserError, FileNotFoundError):
    """A path that does not exist: "PATH: no such directory; give a model directory"."""


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
