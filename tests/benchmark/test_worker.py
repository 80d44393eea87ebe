"""The process that measures: its time, its peak memory, and its environment."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from configs import benchmark as config_file
from flexolmo_jax.benchmark import worker
from flexolmo_jax.benchmark.run import prepared
from flexolmo_jax.benchmark.worker import Spec, Step, Worker
from flexolmo_jax.errors import UserError

SPEC = Spec("flexolmo", "pair", prepared(config_file.get_config("64"), "pair"))

PEAK = "from flexolmo_jax.benchmark.worker import peak_memory; {}; print(peak_memory())"


def peak(statement):
    done = subprocess.run([sys.executable, "-c", PEAK.format(statement)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    before = np.ones(2**28, np.uint8)
    small = peak("pass")
    assert small < before.nbytes
    # Without the array, two processes differ by some hundred kilobytes.
    assert peak(f"import numpy; numpy.ones({before.nbytes}, 'uint8')") > small + 0.9 * before.nbytes


class AfterAPause(Step):
    """Its first step after a measurement takes 100 seconds of a clock that it moves, each other one 2."""

    now, rested = 0.0, True

    def build(self):
        return {"tokens": 1}

    def step(self):
        self.now += 100 if self.rested else 2
        self.rested = False

    def limit(self):
        self.rested = True


def test_the_first_step_after_a_pause_is_not_timed(monkeypatch):
    step = AfterAPause(SPEC)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: step.now)
    for _ in range(2):
        assert step.seconds() == 2
        step.limit()


def test_compiling_is_what_the_first_step_takes_besides(monkeypatch):
    step = AfterAPause(SPEC)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: step.now)
    assert step.begin() == {"tokens": 1, "compile_seconds": 98}


def test_both_sides_have_the_same_allocator(monkeypatch):
    """Huge pages, which the docs advise for training; what the caller asks for instead holds for both."""

    def allocator():
        with contextlib.closing(Worker(SPEC)) as started:
            return psutil.Process(started.pid).environ()["GLIBC_TUNABLES"]

    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    assert allocator() == "glibc.malloc.mmap_max=0"
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert allocator() == "glibc.malloc.hugetlb=1"


def test_a_worker_that_is_killed_or_too_slow_says_so():
    with contextlib.closing(Worker(SPEC)) as started:
        with pytest.raises(UserError, match="pair: flexolmo: no answer in 0 seconds"):
            started.ask("begin", patience=0)
        os.kill(started.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="pair: flexolmo: its process was killed"):
            started.ask("seconds")
    assert not psutil.pid_exists(started.pid)
