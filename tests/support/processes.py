"""Several processes of one run on this machine, which find each other over loopback."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.support import runs

# Joins the others, with that many devices, then calls a function of a module.
PROGRAM = """
import importlib, json, sys
import jax
coordinator, count, index, devices, module, function, arguments = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
from flexolmo_jax import distributed
distributed.start(coordinator, int(count), int(index), distributed.Timeouts(60, 10, 60))
getattr(importlib.import_module(module), function)(*json.loads(arguments))
"""


def free_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(
    count: int, devices: int, module: str, function: str, arguments: Sequence[Any] = (), environment=None
) -> list[subprocess.Popen]:
    """Starts `count` processes with `devices` each, in which `module.function(*arguments)` runs."""
    address = free_address()
    environment = {**os.environ, "PYTHONPATH": runs.PYTHONPATH, **(environment or {})}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, address, str(count), str(index), str(devices)),
                *(module, function, json.dumps(arguments)),
            ],
            cwd=runs.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Waits for processes, and returns (status, standard output, standard error) of each."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *printed) for process, printed in zip(processes, texts, strict=True)]


def run(*arguments, **options) -> list[str]:
    """As `start`, until all have ended well; returns what each printed, without what gloo prints."""
    ended = finish(start(*arguments, **options))
    for status, _, errors in ended:
        assert status == 0, errors
    return ["\n".join(line for line in output.splitlines() if "[Gloo]" not in line) for _, output, _ in ended]
