"""Processes of one run on this machine, of which several find each other over loopback.

They are forked from a server that has imported what they need and used no device: to import it takes a process seconds.
"""

import atexit
import importlib
import multiprocessing
import os
import pathlib
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax

from flexolmo_jax import distributed
from tests.support import runs

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["flexolmo_jax.cli.train", "flexolmo_jax.training.loop", __name__])


class Started(NamedTuple):
    """A process, and the folder of its files `out` and `err`."""

    process: multiprocessing.process.BaseProcess
    folder: pathlib.Path


def free_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(
    count: int,
    devices: int,
    module: str,
    function: str,
    arguments: Sequence[Any] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Started]:
    """Starts `count` processes with `devices` each, in which `module.function(*arguments)` runs.

    Their environment is that at the first start of any, with `environment`.
    """
    place = (free_address(), count)
    started = []
    # So that the server, which the first start starts, imports no torch.
    with mock.patch.dict(os.environ, PYTHONPATH=runs.PYTHONPATH):
        for index in range(count):
            folder = pathlib.Path(tempfile.mkdtemp(prefix="process-", dir=os.environ["XDG_CACHE_HOME"]))
            process = _FORKS.Process(
                target=_run, args=(folder, environment or {}, devices, (*place, index), module, function, arguments)
            )
            process.start()
            started.append(Started(process, folder))
    return started


def _run(
    folder: pathlib.Path,
    environment: Mapping[str, str],
    devices: int,
    place: tuple[str, int, int],
    module: str,
    function: str,
    arguments: Sequence[Any],
) -> None:
    """Joins the others, if there are any, then calls a function of a module."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(runs.ROOT)
    os.environ.update(environment)
    for name, value in environment.items():
        if name.startswith("JAX_"):  # which JAX has read when it was imported
            jax.config.update(name.lower(), type(jax.config.values[name.lower()] or "")(value))
    jax.config.update("jax_num_cpu_devices", devices)
    try:
        if place[1] > 1:
            distributed.start(*place, distributed.Timeouts(60, 10, 60))
        getattr(importlib.import_module(module), function)(*arguments)
    except Exception:
        traceback.print_exc()  # here, since what follows may abort
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out; JAX leaves the other processes there


def finish(started: Sequence[Started], timeout: float = 300) -> list[tuple[int | None, str, str]]:
    """Waits for processes, and returns (status, standard output, standard error) of each."""
    for process, _ in started:
        process.join(timeout)
    for process, _ in started:
        process.kill()
        process.join()
    return [
        (process.exitcode, *((folder / name).read_text() for name in ("out", "err"))) for process, folder in started
    ]


def run(*arguments, **options) -> list[str]:
    """As `start`, until all have ended well; returns what each printed, without what gloo prints."""
    ended = finish(start(*arguments, **options))
    for status, _, errors in ended:
        assert status == 0, errors
    return ["\n".join(line for line in output.splitlines() if "[Gloo]" not in line) for _, output, _ in ended]
