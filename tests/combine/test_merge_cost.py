"""What a merge and an opt-out read and hold: every byte once, and a buffer for each thread."""

import math
import threading
import weakref

import numpy as np
import pytest

from flexolmo_jax.checkpoint import copying, digests, params
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.model.architecture import Architecture
from tests.support import small

ARCHITECTURE = Architecture(
    vocab_size=300, num_layers=3, d_model=64, num_heads=2, num_kv_heads=1, d_ff=160, rope_theta=1e4, norm_eps=1e-6
)
NAMES = ["code", "legal", "news"]
CHUNK_BYTES, BUFFER_BYTES = 2**14, 2**12


class Reads:
    """Stands for `copying.read_chunk_file` and `params.read_block`, and keeps account of what they read and hold."""

    def __init__(self, monkeypatch):
        self.blocks, self.peak = [], 0
        self._buffers, self._lock = {}, threading.Lock()
        self._read_chunk_file, self._read_block = copying.read_chunk_file, params.read_block
        monkeypatch.setattr(copying, "read_chunk_file", self.read_chunk_file)
        monkeypatch.setattr(params, "read_block", self.read_block)

    def read_chunk_file(self, folder, index, chunk, expert, buffer):
        size = 0
        for values in self._read_chunk_file(folder, index, chunk, expert, buffer):
            self._hold(values)
            size += values.nbytes
            yield values
        self.blocks.append((f"{folder} {expert}", str(index), size))

    def read_block(self, leaf, index, name):
        values = self._read_block(leaf, index, name)
        self._hold(values)
        self.blocks.append((name, str(index), values.nbytes))
        return values

    def _hold(self, values):
        with self._lock:
            while isinstance(values.base, np.ndarray):
                values = values.base
            self._buffers[id(values)] = weakref.ref(values)
            alive = (reference() for reference in self._buffers.values())
            self.peak = max(self.peak, sum(buffer.nbytes for buffer in alive if buffer is not None))


@pytest.fixture
def reads(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(copying, "BUFFER_BYTES", BUFFER_BYTES)
    small.anchor(tmp_path / "anchor", architecture=ARCHITECTURE, leaves=small.random_leaves(0, ARCHITECTURE))
    for seed, name in enumerate(NAMES, 1):
        small.contribution(tmp_path / name, tmp_path / "anchor", seed=seed)
    return Reads(monkeypatch)


def sizes():
    """Bytes of what is shared, and of an expert."""
    sizes = {path: 4 * math.prod(shape) for path, shape in small.shapes(ARCHITECTURE).items()}
    expert = sum(size for path, size in sizes.items() if "moe/" in path)
    return sum(sizes.values()) - expert, expert


def check(reads, total, most):
    assert len({block[:2] for block in reads.blocks}) == len(reads.blocks)
    assert sum(size for *_, size in reads.blocks) == total
    assert len(reads.blocks) > 5 * copying.COPY_THREADS
    assert most / 2 < reads.peak <= copying.COPY_THREADS * most < total / 5


def test_a_merge_reads_every_byte_once_and_holds_a_buffer_for_each_thread(tmp_path, reads):
    merge(tmp_path / "anchor", [tmp_path / name for name in NAMES], tmp_path / "merged", top_k=2)
    shared, expert = sizes()
    check(reads, shared + 4 * expert, BUFFER_BYTES)


def test_opting_out_does_not_read_what_it_removes(tmp_path, reads):
    merge(tmp_path / "anchor", [tmp_path / name for name in NAMES], tmp_path / "merged", top_k=2)
    reads.blocks, reads.peak = [], 0
    opt_out(tmp_path / "merged", ["legal"], tmp_path / "rest")
    shared, expert = sizes()
    check(reads, shared + 3 * expert, BUFFER_BYTES)
    experts = {name.split()[1] for name, *_ in reads.blocks}
    assert experts == {"None", "0", "1", "3"}  # all but legal


@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_changes_no_byte(tmp_path, reads, monkeypatch, threads):
    inputs = [tmp_path / name for name in NAMES]
    merge(tmp_path / "anchor", inputs, tmp_path / "merged", top_k=2)
    monkeypatch.setattr(copying, "COPY_THREADS", threads)
    merge(tmp_path / "anchor", inputs, tmp_path / "again", top_k=2)
    assert small.files(tmp_path / "again") == small.files(tmp_path / "merged")
