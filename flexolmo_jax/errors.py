"""The errors that users can fix, and the conversion of errors that Rust libraries raise."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

_STDERR = threading.RLock()  # all threads share file descriptor 2


class UserError(Exception):
    """Bad input. The message names the file or argument, what is wrong, and what would be right.

    Raise it for everything that a user can fix. The command line prints it on standard error without a traceback, and
    exits with status 2. Messages never name flags: `cli.flags_of` replaces arguments, paths and configuration keys
    (`config.steps`) by the flags that set them.
    """


class ArgumentError(UserError, ValueError):
    """An argument of a function, or a key of a configuration, has an invalid value."""

    def __init__(self, argument: str, value: object, problem: str):
        """Makes the message "ARGUMENT=VALUE: PROBLEM".

        Args:
          argument: its name, such as "top_k" or "config.data.batch_size".
          value: its invalid value.
          problem: what is wrong with the value, and what would be right.
        """
        super().__init__(f"{argument}={value}: {problem}")
        self.argument, self.value, self.problem = argument, value, problem


class NotFoundError(UserError, FileNotFoundError):
    """A path does not exist: "PATH: no such directory; give a model directory"."""


class ProcessesError(Exception):
    """Processes that work as one have lost each other; to be run again, all of them, as schedulers do."""


@contextlib.contextmanager
def rust_errors(problem: str, remedy: str) -> Iterator[None]:
    """Converts errors of a library written in Rust to a `UserError`: "PROBLEM (its message); REMEDY".

    `tokenizers` raises `Exception` itself, not a subclass. If its code panics, pyo3 raises a `PanicException`, which is
    not an `Exception` and cannot be imported.
    """
    try:
        with _quiet_stderr():
            yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Captures what native code writes to standard error, and adds it to an error that is raised as a note."""
    with _STDERR, tempfile.TemporaryFile() as captured, contextlib.ExitStack() as restore:
        stderr = os.dup(2)
        restore.callback(os.close, stderr)
        restore.callback(os.dup2, stderr, 2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException as error:
            captured.seek(0)
            error.add_note(captured.read().decode(errors="replace"))
            raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
