"""Our streamed safetensors files against the format's own library."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import safetensors_io
from flexolmo_jax.interop.safetensors_io import INDEX_FILE, chunks, open_tensors, write_tensors


@pytest.fixture
def tensors():
    """Odd sizes, so that a wide tensor after a short one would lie askew."""
    rng = np.random.default_rng(0)
    return {
        "short": rng.random((3,)).astype(ml_dtypes.bfloat16),
        "wide": rng.random((5, 7), np.float32),
        "scalar": np.array(2, np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": rng.random((4, 6), np.float32).T,
        "cube": rng.random((3, 4, 5)).astype(np.float16),
    }


def write(path, tensors, shard_bytes):
    asked = []
    described = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    written = []
    files = write_tensors(
        path, described, lambda name: asked.append(name) or tensors[name], shard_bytes, written.append
    )
    assert sorted(asked) == sorted(tensors)
    assert sum(written) == sum(x.nbytes for x in tensors.values())
    return files


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (x.dtype, x.shape, x.tobytes()), name


def test_the_library_reads_what_we_write(tmp_path, tensors):
    assert write(tmp_path, tensors, 10**6) == ["model.safetensors"]
    assert_equal(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert not (tmp_path / INDEX_FILE).exists()


def test_every_tensor_is_aligned(tmp_path, tensors):
    write(tmp_path, tensors, 10**6)
    for stored in open_tensors(tmp_path).values():
        assert stored.offset % stored.dtype.itemsize == 0


def test_shards_hold_no_more_than_they_may(tmp_path, tensors):
    files = write(tmp_path, tensors, 130)
    found = {file: load_file(tmp_path / file) for file in files}
    for file, held in found.items():
        assert sum(x.nbytes for x in held.values()) <= 130 or list(held) == ["wide"], file
    assert_equal({name: x for held in found.values() for name, x in held.items()}, tensors)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["weight_map"] == {name: file for file, held in found.items() for name in held}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert_equal({name: stored.read() for name, stored in open_tensors(tmp_path).items()}, tensors)


def test_we_read_what_the_library_writes(tmp_path, tensors):
    tensors = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = open_tensors(tmp_path)
    assert_equal({name: stored.read() for name, stored in found.items()}, tensors)
    cube = tensors["cube"]
    np.testing.assert_array_equal(found["cube"].range(1, 3).read(), cube[1:3])
    np.testing.assert_array_equal(found["cube"].item(2).read(), cube[2])
    np.testing.assert_array_equal(found["cube"].item(1).range(2, 4).read(), cube[1, 2:4])


def test_a_file_that_shrinks_is_named(tmp_path, tensors):
    write(tmp_path, tensors, 10**6)
    found = open_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors: truncated"):
        found["wide"].read()


def test_chunks_are_contiguous_and_small(monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_BYTES", 100)
    values = np.arange(60, dtype=np.float32).reshape(5, 12).T
    found = list(chunks(values))
    assert len(found) == 3
    assert all(chunk.flags.c_contiguous and chunk.nbytes <= 100 for chunk in found)
    np.testing.assert_array_equal(np.concatenate(found), values)
