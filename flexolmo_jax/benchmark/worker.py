"""A process that measures one thing, since peak memory is a property of a process.

It answers lines of standard input with lines of JSON. The first line is a `Spec`, as JSON; each of the others names a
method of `Worker`. The answer is {"value": what it returns}; or {"error": one line}, with which the process ends.
"""

import json
import math
import os
import re
import resource
import sys
import time
from typing import Any

import psutil

from flexolmo_jax.benchmark.subject import Spec, Subject
from flexolmo_jax.errors import UserError

LEAST_SECONDS = 0.3  # that are timed at once: short steps are repeated


class Worker:
    """Answers requests about one subject."""

    def __init__(self, spec: Spec):
        """Imports what the subject needs, and notes the memory that this takes."""
        self._subject = _subject(spec)
        self._libraries = psutil.Process().memory_info().rss
        self._repeats = 1
        self.limit, self.token = self._subject.limit, self._subject.token

    def build(self) -> dict[str, Any]:
        """What the subject's `build` returns, and "first_seconds", of the first step that is timed."""
        built = self._subject.build()
        first = self.step()
        self._repeats = math.ceil(LEAST_SECONDS / first)
        return {**built, "first_seconds": first}

    def step(self) -> float:
        """Seconds of a step, after one that is not timed: what other processes left in caches and memory is gone."""
        self._subject.step()
        self._subject.wait()
        start = time.perf_counter()
        for _ in range(self._repeats):
            self._subject.step()
        self._subject.wait()
        return (time.perf_counter() - start) / self._repeats

    def memory(self) -> dict[str, int]:
        """Peak bytes of the process so far, the same without what it had once libraries were imported, of a device."""
        host = peak_memory()
        memory = {"peak_bytes": host, "peak_bytes_above_libraries": host - self._libraries}
        device = self._subject.device_memory()
        return memory if device is None else {**memory, "device_peak_bytes": device}


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    try:
        # Not ru_maxrss, which Linux passes on from the process that started this one.
        with open("/proc/self/status") as status:
            return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1])
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answers the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        worker = Worker(Spec(**json.loads(sys.stdin.readline())))
        for line in sys.stdin:
            answer(value=getattr(worker, line.strip())())
    except UserError as error:
        answer(error=str(error))


def _subject(spec: Spec) -> Subject:
    """Imports libraries of one side alone."""
    if spec.side == "transformers":
        from flexolmo_jax.benchmark import hugging_face

        return hugging_face.Generation(spec) if spec.step == "decode" else hugging_face.TrainStep(spec)
    if spec.step == "decode":
        from flexolmo_jax.benchmark.decoding import Decoding

        return Decoding(spec)
    from flexolmo_jax.benchmark.training import TrainStep

    return TrainStep(spec)


if __name__ == "__main__":
    main()
