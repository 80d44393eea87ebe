"""The workers of a benchmark, as the process that started them sees them."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
from typing import Any

from flexolmo_jax.benchmark.subject import Spec
from flexolmo_jax.errors import UserError

WORKER = "flexolmo_jax.benchmark.worker"
# Both sides alike, and as this program's users are told to run it (docs/performance.md): memory in huge pages. What the
# caller's environment says instead holds for both, too.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

_COMPILING = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # how long that takes is measured


class Process:
    """A worker (see `worker`), to be closed in the end."""

    def __init__(self, spec: Spec):
        """Starts it; it takes some seconds to import what it needs."""
        self._label = f"--step={spec.step}, {spec.side}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  what libraries print; its last line tells of a failure
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**_ENVIRONMENT, **os.environ, **_COMPILING},
        )
        self._send(json.dumps(dataclasses.asdict(spec)))

    def close(self) -> None:
        """Ends it; nothing happens where it has ended."""
        if self._log.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, request: str, patience: float | None = None) -> Any:
        """The worker's answer to the name of one of its methods.

        Args:
          request: the method.
          patience: seconds to wait at most; None: as long as it takes.

        Raises:
          UserError: the worker refuses what it is to measure, fails (for want of memory, say), or takes too long.
        """
        self._send(request)
        if not select.select([self._process.stdout], [], [], patience)[0]:
            raise UserError(f"{self._label}: no answer in {patience:.0f} seconds")
        answer = json.loads(self._process.stdout.readline() or "{}")
        if "value" in answer:
            return answer["value"]
        raise UserError(answer.get("error") or f"{self._label}: {self._failure()}")

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has failed, and `ask` finds no answer

    def _failure(self) -> str:
        """Why the process ended: the last line it printed, or the signal that ended it."""
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["it printed nothing"]
        return f"ended by signal {-status}" if status < 0 else lines[-1]
