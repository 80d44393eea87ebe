"""The process that measures: its time, its peak memory, and its environment."""

import subprocess
import sys
from unittest import mock

import numpy as np

from flexolmo_jax.benchmark import worker
from flexolmo_jax.benchmark.worker import Measurement, Spec, Worker

PEAK = "from flexolmo_jax.benchmark.worker import peak_memory; {}; print(peak_memory())"


def peak(statement):
    done = subprocess.run([sys.executable, "-c", PEAK.format(statement)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    before = np.ones(2**28, np.uint8)
    small = peak("pass")
    assert small < before.nbytes
    assert peak(f"import numpy; numpy.ones({before.nbytes}, 'uint8')") > small + before.nbytes


class AfterAPause:
    """Its first step after a measurement takes 100 seconds of a clock that it moves, each other one 2."""

    now, rested = 0.0, True

    def step(self):
        self.now += 100 if self.rested else 2
        self.rested = False

    def wait(self):
        pass

    def limit(self):
        self.rested = True

    token = limit


def test_the_first_step_after_a_pause_is_not_timed(monkeypatch):
    step = AfterAPause()
    monkeypatch.setattr(worker.time, "perf_counter", lambda: step.now)
    measured = Measurement(step)
    for _ in range(2):
        assert measured.step() == 2
        measured.limit()


def test_both_sides_have_the_same_allocator(monkeypatch):
    """Huge pages, which the docs advise for training; what the caller asks for instead holds for both."""

    def allocators():
        with mock.patch("subprocess.Popen") as started:
            for side in ("flexolmo", "transformers"):
                Worker(Spec(side, "expert", {}))
        return [call.kwargs["env"]["GLIBC_TUNABLES"] for call in started.call_args_list]

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert allocators() == ["glibc.malloc.hugetlb=1"] * 2
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    assert allocators() == ["glibc.malloc.mmap_max=0"] * 2
