"""Measures one step in a process of its own, since peak memory is a property of a process."""

import contextlib
import functools
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import psutil
from ml_collections import FrozenConfigDict

from flexolmo_jax.checkpoint.manifests import BY_ROUTER
from flexolmo_jax.errors import UserError, first_line

_LEAST_SECONDS = 0.3  # to time at once: short steps are repeated


class Place(NamedTuple):
    """Which of several processes, or of a process's devices, compute; each has a part of this machine's cores."""

    devices: int = 1  # of this process
    coordinator: str = ""  # address of the first process; "": there is no other
    process: int = 0
    processes: int = 1


class Spec(NamedTuple):
    """What a worker measures."""

    side: str  # "flexolmo" or "transformers"
    step: str  # one of `benchmark.run.STEPS`
    config: FrozenConfigDict
    experts: str = ""  # transformers' `experts_implementation`; "" for a model without experts
    compiled: bool = False  # whether transformers' model goes through `torch.compile`
    selection: str = BY_ROUTER  # what chooses experts of a model that decodes, one of `model.selectors.SELECTIONS`
    place: Place | None = None  # None: all devices that are there, and all cores


class Step:
    """A step that can be taken again and again, and what is asked of it.

    Those of this program also have `limit`, the FLOP/s or bytes/s that this machine can reach, and decoding has
    `token`, the seconds in which one token is decoded for every sequence.
    """

    def __init__(self, spec: Spec):
        """Notes the memory that libraries take; nothing is computed yet."""
        self._spec, self._config, self._repeats = spec, spec.config, 1
        self._batch_size, self._length = spec.config.data.batch_size, spec.config.data.sequence_length
        self._libraries = psutil.Process().memory_info().rss

    def build(self) -> dict[str, Any]:
        """Makes weights and data; returns "platform" and the "tokens" of a step.

        Those of this program also return "device", "devices", "flops", "limit_of" and, if bound by memory, the "bytes"
        that a step must read.
        """
        raise NotImplementedError

    def step(self) -> None:
        """Takes a step, and may return before its work is done; the first compiles."""
        raise NotImplementedError

    def wait(self) -> None:
        """Returns when it is done."""

    def device_memory(self) -> int | None:
        """Peak bytes in use on a device; None if the device is the host."""
        raise NotImplementedError

    def agree(self, number: int) -> int:
        """The number that all processes take which take steps together."""
        return number

    def begin(self) -> dict[str, Any]:
        """What `build` returns, and "compile_seconds": what the first step takes beyond the second."""
        built = self.build()
        start = time.perf_counter()
        self.step()
        self.wait()
        first = time.perf_counter() - start
        later = self.seconds()
        self._repeats = self.agree(math.ceil(_LEAST_SECONDS / later))
        return {**built, "compile_seconds": first - later}

    def seconds(self) -> float:
        """Seconds of a step, after one that is not timed, so that caches and memory hold nothing of other processes."""
        self.step()
        self.wait()
        start = time.perf_counter()
        for _ in range(self._repeats):
            self.step()
        self.wait()
        return (time.perf_counter() - start) / self._repeats

    def memory(self) -> dict[str, int]:
        """Peak bytes of the process so far, the same without libraries, and of a device if there is one."""
        host, device = peak_memory(), self.device_memory()
        memory = {"peak_bytes": host, "peak_bytes_above_libraries": host - self._libraries}
        return memory if device is None else {**memory, "device_peak_bytes": device}


class Worker:
    """The process, as seen by the one that starts it; to be closed in the end."""

    def __init__(self, spec: Spec):
        """Starts it."""
        self._spec = spec
        # Memory in huge pages for both sides, as users are told to run this program (docs/performance.md), unless the
        # caller's environment says otherwise, for both.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)
        self.pid = self._pool.submit(os.getpid).result()

    def close(self) -> None:
        """Ends it; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown()

    def ask(self, request: str, patience: float | None = None) -> Any:
        """What the step's method with this name returns, for which it waits `patience` seconds at most.

        Raises:
          UserError: the worker refuses what it is to measure, fails (for want of memory, say), or takes too long.
        """
        return self.answer(self.begin(request), patience)

    def begin(self, request: str) -> Future[Any]:
        """Asks, and does not wait."""
        return self._pool.submit(_answer, self._spec, request)

    def answer(self, asked: Future[Any], patience: float | None = None) -> Any:
        """Waits for the answer; raises what `ask` does."""
        label = f"{self._spec.step}: {self._spec.side}"
        try:
            return asked.result(patience)
        except UserError:
            raise
        except TimeoutError:
            raise UserError(f"{label}: no answer in {patience:.0f} seconds") from None
        except BrokenProcessPool:
            raise UserError(f"{label}: its process was killed, perhaps for want of memory") from None
        except Exception as error:  # whatever the libraries of that side raise
            raise UserError(f"{label}: {type(error).__name__}: {first_line(error)}") from error


class Workers:
    """Processes that take one step together; asked as a `Worker` is."""

    def __init__(self, spec: Spec, processes: int):
        """Starts them, each with one device."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        places = [Place(1, coordinator, index, processes) for index in range(processes)]
        self._workers = [Worker(spec._replace(place=place)) for place in places]

    def close(self) -> None:
        """Ends them."""
        for worker in self._workers:
            worker.close()

    def ask(self, request: str, patience: float | None = None) -> Any:
        """As `Worker.ask`, of all: the longest time, the sum of what is in memory, or else what the first says."""
        asked = [worker.begin(request) for worker in self._workers]
        answers = [worker.answer(of_worker, patience) for worker, of_worker in zip(self._workers, asked, strict=True)]
        if request == "memory":
            return {key: sum(answer[key] for answer in answers) for key in answers[0]}
        return max(answers) if isinstance(answers[0], float) else answers[0]


def _prepare() -> None:
    """Drops what libraries print: errors travel as exceptions. JAX compiles anew: the time it takes is measured."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)


def _answer(spec: Spec, request: str) -> Any:
    """Runs in the worker."""
    try:
        return getattr(make_step(spec), request)()
    except (UserError, RuntimeError) as error:  # not every subclass can be unpickled
        raise (UserError if isinstance(error, UserError) else RuntimeError)(str(error)) from None


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    try:
        # Not ru_maxrss, which Linux passes on from the process that started this one.
        with open("/proc/self/status") as status:
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read())[0])
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _take(place: Place) -> None:
    """Takes a part of the cores, and joins the other processes; before JAX looks for devices."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[place.process :: place.processes] or cores)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", place.devices)
    if place.coordinator:
        from flexolmo_jax import distributed

        distributed.start(place.coordinator, place.processes, place.process)


@functools.cache  # a process has one
def make_step(spec: Spec) -> Step:
    """The step of a spec; imports the libraries of its side alone."""
    if spec.place:
        _take(spec.place)
    if spec.side == "transformers":
        from flexolmo_jax.benchmark import torch_steps as steps
    else:
        from flexolmo_jax.benchmark import jax_steps as steps
    return steps.Decoding(spec) if spec.step == "decode" else steps.TrainStep(spec)
