"""The process that measures: it answers a line at a time, and knows its own peak memory."""

import subprocess
import sys

import numpy as np

PEAK = "from flexolmo_jax.benchmark.worker import peak_memory; {}; print(peak_memory())"


def peak(statement):
    done = subprocess.run([sys.executable, "-c", PEAK.format(statement)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    before = np.ones(2**28, np.uint8)
    small = peak("pass")
    assert small < before.nbytes
    assert peak(f"import numpy; numpy.ones({before.nbytes}, 'uint8')") > small + before.nbytes
