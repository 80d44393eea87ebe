"""A model served over HTTP until the process is told to end."""

import contextlib
import errno
import functools
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
from etils import epath

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.model import load
from flexolmo_jax.serving.app import make_app
from flexolmo_jax.serving.scheduler import Scheduler
from flexolmo_jax.serving.schema import Served

DEFAULT_LENGTH = 2048
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
      max_length: tokens of a prompt and its continuation together, at most; None: a row of the anchor's training,
        or `DEFAULT_LENGTH` where its data card does not say.
      dtype: of parameters and computation.
      verbose: whether to log each request.

    Raises:
      UserError: the model cannot be read, or the address cannot be listened on.
    """
    with _status_0_on_signals(), listen(host, port) as listener:
        model = load(path, dtype)
        if model.tokenizer is None:
            raise UserError(f"--model={path}: has no tokenizer.json; put the tokenizer's there, for requests are text")
        directory = epath.Path(path).resolve().name
        max_length = max_length or model.manifest.sequence_length or DEFAULT_LENGTH
        served = Served(
            names=tuple(dict.fromkeys([name or directory, directory])),
            roster=tuple(model.roster),
            encode=model.encode,
            decode=model.tokenizer.decode,
            vocab_size=model.decoder.architecture.vocab_size,
            max_length=max_length,
            max_sequences=queue,
        )
        scheduler = Scheduler(functools.partial(Engine, model, slots, max_length), queue)
        Server(served, scheduler, f"serving {path} at {address(listener)}/v1", verbose).run([listener])


class Server(uvicorn.Server):
    """uvicorn, which says when it answers, and lets go of what is in flight when it ends."""

    def __init__(self, served: Served, scheduler: Scheduler, ready: str, verbose: bool = False):
        """`ready` is the line to print; see `serve`."""
        config = uvicorn.Config(
            make_app(served, scheduler),
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
        super().__init__(config)
        self._scheduler, self._ready = scheduler, ready

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
            super().run(sockets)
        finally:
            self._scheduler.close()
            self._scheduler.join()


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address, with a warning on standard error where other machines can reach it.

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
            raise UserError(f"--port={port}: is in use; choose another, or 0 for any that is free") from error
        raise UserError(f"--host={host} --port={port}: cannot be listened on ({error}); try 127.0.0.1, 8000") from error
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        sys.stderr.write(f"flexolmo serve: --host={host}: other machines may connect; there is no authentication\n")
    return listener


def address(listener: socket.socket) -> str:
    """The http:// address of a bound socket, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _status_0_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the process with status 0; uvicorn sends them on when it has ended."""
    before = {sign: signal.signal(sign, lambda *_: sys.exit(0)) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
