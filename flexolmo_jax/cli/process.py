"""What a process of the command line sets up before its command runs: who writes to standard error, and signals."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import warnings

from absl import logging as absl_logging

from flexolmo_jax.cli import failures

# Loggers of libraries whose messages a user can act on: what a server says of requests, and of devices left unused.
_SHOWN = {"flexolmo_jax": logging.WARNING, "uvicorn": logging.ERROR, "jax._src.xla_bridge": logging.WARNING}


def open_closed_outputs() -> None:
    """Sends to nowhere what a process would print whose standard output or error is closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w"))


def quiet_libraries(label: str) -> None:
    """Shows on standard error what this program says, and of libraries only what ends the process.

    To be called before JAX is imported. `sys.stderr` gets a file descriptor of its own, since `errors.rust_errors`
    turns the second one elsewhere for a while.

    Args:
      label: begins each line of a log.
    """
    own = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    sys.stderr.flush()
    sys.stderr = sys.__stderr__ = own
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of XLA, fatal errors alone
    faulthandler.enable(own, all_threads=False)
    warnings.simplefilter("ignore")
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.FATAL)
    handler = logging.StreamHandler(own)
    handler.setFormatter(_OneLine(f"{label}: %(message)s"))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.CRITICAL)
    for name, level in _SHOWN.items():
        logging.getLogger(name).setLevel(level)
    sys.unraisablehook = lambda _: None  # what coroutines and destructors of a library raise while Python ends
    threading.excepthook = lambda args: _say(own, label, args.exc_value)


def end_on_sigterm() -> None:
    """Lets SIGTERM end the process as an error would, so that nothing half-written is left; status 143.

    It ends once Python runs again, so this is for commands that write directories, and spend no long time elsewhere.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _say(stream, label: str, error: BaseException | None) -> None:
    if error is not None:
        stream.write(f"{label}: {failures.describe(error).line}\n")


class _OneLine(logging.Formatter):
    """Formats a record, with the error that came with it, as one line."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        record = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        line = " ".join(super().format(record).split())
        return line if error is None else f"{line}: {failures.describe(error).line}"
