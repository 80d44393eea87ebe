"""Set-up of a command-line process: logging, warnings, standard streams, signals."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import TextIO

from absl import logging as absl_logging

from flexolmo_jax.cli import failures
from flexolmo_jax.errors import UserError

# Loggers whose messages a user can act on: of the server, and of JAX on unused devices.
_SHOWN = {"flexolmo_jax": logging.WARNING, "uvicorn": logging.ERROR, "jax._src.xla_bridge": logging.WARNING}


def open_closed_outputs() -> None:
    """Opens the null device as standard output or error if that is closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w"))


def quiet_libraries(label: str, translate: Callable[[UserError], str] = str) -> None:
    """Silences warnings and logs of libraries, except fatal errors; shows those of this package.

    Call it before JAX is imported. `sys.stderr` gets a new file descriptor, because `errors.rust_errors` redirects
    descriptor 2.

    Args:
      label: begins each line of a log.
      translate: returns the message of a `UserError` that is logged as a warning.
    """
    stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    sys.stderr.flush()
    sys.stderr = sys.__stderr__ = stderr
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA then logs fatal errors only
    faulthandler.enable(stderr, all_threads=False)
    warnings.simplefilter("ignore")
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.FATAL)
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(_OneLine(f"{label}: %(message)s", translate))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.CRITICAL)
    for name, level in _SHOWN.items():
        logging.getLogger(name).setLevel(level)
    sys.unraisablehook = lambda _: None  # errors in destructors of libraries while Python ends
    threading.excepthook = lambda args: _report(stderr, label, args.exc_value)


def end_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit with status 143, so that incomplete directories are removed.

    Python handles the signal between bytecodes, so this suits commands without long calls into native code.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _report(stream: TextIO, label: str, error: BaseException | None) -> None:
    if error is not None:
        stream.write(f"{label}: {failures.describe(error).line}\n")


class _OneLine(logging.Formatter):
    """Formats a record and its exception as one line."""

    def __init__(self, form: str, translate: Callable[[UserError], str]):
        super().__init__(form)
        self._translate = translate

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        message = self._translate(record.msg) if isinstance(record.msg, UserError) else record.msg
        record = logging.makeLogRecord(
            {**record.__dict__, "msg": message, "exc_info": None, "exc_text": None, "stack_info": None}
        )
        line = " ".join(super().format(record).split())
        return line if error is None else f"{line}: {failures.describe(error).line}"
