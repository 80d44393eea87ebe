"""A model served over HTTP until the process is told to end."""

import contextlib
import errno
import functools
import ipaddress
import logging
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence

import uvicorn
from etils import epath

from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.model import load
from flexolmo_jax.paths import absolute
from flexolmo_jax.serving import scheduler as scheduling
from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.chat import load_chat_template
from flexolmo_jax.serving.logprobs import TokenStrings
from flexolmo_jax.serving.middleware import check_origins
from flexolmo_jax.serving.parsing import Served
from flexolmo_jax.serving.scheduler import Scheduler

_LOG = logging.getLogger(__name__)
_GRACE = 5  # seconds that a client has to take the rest of its answer when the server ends


def serve(
    path: epath.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    queue: int = 32,
    max_length: int | None = None,
    dtype: str = "float32",
    verbose: bool = False,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> None:
    """Serves a model directory until SIGINT or SIGTERM, which end the process with status 0.

    Prints a line once requests are answered.

    Args:
      path: the model directory.
      host: name or address to listen on.
      port: port to listen on; 0: any that is free.
      name: what requests may call the model, besides the name of its directory.
      slots: requests decoded at once.
      queue: requests that may wait for a slot.
      max_length: tokens of a prompt and its continuation together, at most; None: the model's context,
        `manifest.context_length`.
      dtype: of parameters and computation.
      verbose: whether to log each request, and errors with their tracebacks.
      keys: API keys, one of which must come with each request; none: all may ask.
      origins: pages of these origins may ask, "*" being all.

    Raises:
      UserError: the model cannot be read, or the address cannot be listened on.
    """
    check_origins(origins)
    with _status_0_on_signals(), listen(host, port, bool(keys)) as listener:
        model = load(path, dtype)
        if model.tokenizer is None:
            raise UserError(f"{path}: has no tokenizer.json; add the tokenizer's, which requests with text need")
        directory = absolute(path).name
        max_length = max_length or model.manifest.context_length
        served = Served(
            names=tuple(dict.fromkeys([name or directory, directory])),
            roster=tuple(model.roster),
            encode=model.encode,
            decode=model.tokenizer.decode,
            strings=TokenStrings(model.tokenizer),
            vocab_size=model.decoder.architecture.vocab_size,
            max_length=max_length,
            max_sequences=queue,
            chat=load_chat_template(epath.Path(path), model.tokenizer),
        )
        scheduler = Scheduler(functools.partial(Engine, model, slots, max_length), queue)
        ready = f"serving {path} at {address(listener)}/v1"
        Server(served, scheduler, ready, verbose, keys, origins).run([listener])


class Server(uvicorn.Server):
    """uvicorn, which says when it answers, and lets go of what is in flight when it ends."""

    def __init__(
        self,
        served: Served,
        scheduler: Scheduler,
        ready: str,
        verbose: bool = False,
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
    ):
        """`ready` is the line to print; see `serve`."""
        config = uvicorn.Config(
            make_app(served, scheduler, keys, origins),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=verbose,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
        if verbose:
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)
            handler = logging.StreamHandler()  # the command line's own leaves tracebacks out
            for name in ("uvicorn.access", "uvicorn.error", scheduling.__name__):
                logging.getLogger(name).handlers = [handler]
                logging.getLogger(name).propagate = False
        super().__init__(config)
        self._scheduler, self._ready, self._verbose = scheduler, ready, verbose

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to answer."""
        await super().startup(sockets)
        print(self._ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Breaks off what is in flight and ends."""
        self._scheduler.close()
        await super().shutdown(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers until told to end; the engine's thread has ended too then."""
        try:
            with contextlib.nullcontext() if self._verbose else _one_line_errors():
                super().run(sockets)
        finally:
            self._scheduler.close()
            self._scheduler.join()


def listen(host: str, port: int, has_keys: bool = False) -> socket.socket:
    """A socket bound to that address; logs a warning where other machines can reach it without a key.

    Raises:
      UserError: the address does not exist here, or is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ArgumentError("port", port, "is in use; choose another, or 0 for any that is free") from error
        problem = f"port {port} cannot be listened on ({error}); try 127.0.0.1, port 8000"
        raise ArgumentError("host", host, problem) from error
    if not has_keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        problem = "other machines may connect, and there is no authentication; give API keys"
        _LOG.warning(ArgumentError("host", host, problem))
    return listener


def address(listener: socket.socket) -> str:
    """The http:// address of a bound socket, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _OneLine(logging.Filter):
    """An error with a traceback becomes a line that names its type and place."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record; lets all pass."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
            text = f"{record.getMessage()}: {type(error).__name__}: {error} ({place}); verbose mode shows the traceback"
            record.msg, record.args, record.exc_info, record.exc_text = " ".join(text.split()), (), None, None
        return True


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors of requests and of the engine are logged in a line each."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", scheduling.__name__)]
    one_line = _OneLine()
    for logger in loggers:
        logger.addFilter(one_line)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(one_line)


@contextlib.contextmanager
def _status_0_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the process with status 0; uvicorn sends them on when it has ended."""
    before = {sign: signal.signal(sign, lambda *_: sys.exit(0)) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
