"""Measures one step in a process of its own, since peak memory is a property of a process.

The process answers lines of standard input with lines of JSON. The first line is a `Spec`, as JSON; each of the others
names a method of `Measurement`. The answer is {"value": what it returns}; or {"error": one line}, and the process ends.
"""

import dataclasses
import json
import math
import os
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
from typing import Any, Protocol

import psutil

from flexolmo_jax.errors import UserError

MODULE = "flexolmo_jax.benchmark.worker"
# Memory in huge pages for both sides, as users are told to run this program (docs/performance.md), unless the caller's
# environment says otherwise, for both.
_DEFAULTS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_COMPILING = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # the time it takes is measured
_LEAST_SECONDS = 0.3  # to time at once: short steps are repeated


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a worker measures."""

    side: str  # "flexolmo" or "transformers"
    step: str  # "anchor", "expert", "joint", "router" or "decode"
    config: dict[str, Any]  # as JSON gives it back
    experts: str = ""  # transformers' `experts_implementation`; "" for a model without experts
    compiled: bool = False  # whether transformers' model goes through `torch.compile`


class Step(Protocol):
    """A step that can be taken again and again.

    Those of this program also have `limit`, the FLOP/s or bytes/s that this machine can reach, and decoding has
    `token`, the seconds in which one token is decoded for every sequence.
    """

    def build(self) -> dict[str, Any]:
        """Makes weights, compiles, and takes a step; returns "platform", "tokens" of a step and "compile_seconds".

        Those of this program also return "device", "devices", "flops", "limit_of" and, if bound by memory, the "bytes"
        that a step must read.
        """
        ...

    def step(self) -> None: ...  # may return before its work is done

    def wait(self) -> None: ...  # until it is

    def device_memory(self) -> int | None: ...  # peak bytes in use on a device; None if the device is the host


class Worker:
    """The process, as seen by the one that starts it; to be closed in the end."""

    def __init__(self, spec: Spec):
        """Starts it; it takes some seconds to import what it needs."""
        self._label = f"{spec.step}: {spec.side}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  what libraries print; its last line tells of a failure
        pipe, environment = subprocess.PIPE, {**_DEFAULTS, **os.environ, **_COMPILING}
        command = [sys.executable, "-m", MODULE]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=environment)
        self._send(json.dumps(dataclasses.asdict(spec)))

    def close(self) -> None:
        """Ends it; nothing happens if it has ended."""
        if not self._log.closed:
            self._process.kill()
            self._process.communicate()
            self._log.close()

    def ask(self, request: str, patience: float | None = None) -> Any:
        """The answer to the name of a method, for which it waits `patience` seconds at most.

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


class Measurement:
    """Answers requests about one step."""

    def __init__(self, step: Step):
        """Notes the memory that libraries take."""
        self._step, self._repeats = step, 1
        self._libraries = psutil.Process().memory_info().rss

    def build(self) -> dict[str, Any]:
        """What the step's `build` returns, and "first_seconds", of the first step that is timed."""
        built = self._step.build()
        first = self.step()
        self._repeats = math.ceil(_LEAST_SECONDS / first)
        return {**built, "first_seconds": first}

    def step(self) -> float:
        """Seconds of a step, after one that is not timed, so that caches and memory hold nothing of other processes."""
        self._step.step()
        self._step.wait()
        start = time.perf_counter()
        for _ in range(self._repeats):
            self._step.step()
        self._step.wait()
        return (time.perf_counter() - start) / self._repeats

    def memory(self) -> dict[str, int]:
        """Peak bytes of the process so far, the same without libraries, and of a device if there is one."""
        host, device = peak_memory(), self._step.device_memory()
        memory = {"peak_bytes": host, "peak_bytes_above_libraries": host - self._libraries}
        return memory if device is None else {**memory, "device_peak_bytes": device}

    def __getattr__(self, name: str) -> Any:
        """All else (`limit`, `token`) is a method of the step."""
        return getattr(self._step, name)


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    try:
        # Not ru_maxrss, which Linux passes on from the process that started this one.
        with open("/proc/self/status") as status:
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read())[0])
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_step(spec: Spec) -> Step:
    """The step of a spec; imports the libraries of its side alone."""
    if spec.side == "transformers":
        from flexolmo_jax.benchmark import torch_steps

        return torch_steps.Generation(spec) if spec.step == "decode" else torch_steps.TrainStep(spec)
    from flexolmo_jax.benchmark import jax_steps

    return jax_steps.Decoding(spec) if spec.step == "decode" else jax_steps.TrainStep(spec)


def main() -> None:
    """Answers the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    try:
        measurement = Measurement(make_step(Spec(**json.loads(sys.stdin.readline()))))
        for line in sys.stdin:
            answers.write(json.dumps({"value": getattr(measurement, line.strip())()}) + "\n")
    except UserError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")


if __name__ == "__main__":
    main()
