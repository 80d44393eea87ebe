"""Trees on disk: against Orbax, hashlib and plain numpy."""

import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from flexolmo_jax.checkpoint import copying, digests
from flexolmo_jax.checkpoint.copying import digest_slice, write_tree
from flexolmo_jax.checkpoint.params import Slice, open_tree, read_block, read_leaf
from flexolmo_jax.checkpoint.zarr import METADATA, chunk_folder
from flexolmo_jax.errors import UserError
from tests.support import small

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (5, 1, 3, 2), (1, 40), (2, 1, 33)]


FORMAT_GRIDS = {  # {(shape, bytes of a number): chunk}
    ((32, 4096, 11008), 4): (1, 256, 11008),
    ((32, 4096, 11008), 2): (1, 512, 11008),
    ((4096, 100352), 4): (32, 100352),
    ((16, 2048), 4): (16, 2048),
    ((100, 1024, 1024), 4): (4, 1024, 1024),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, request):
    """Leaves of a few numbers take several chunks, and a chunk several buffers."""
    if request.node.name == "test_a_chunk_grid_is_that_of_the_format":
        return
    monkeypatch.setattr(digests, "CHUNK_BYTES", 64)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 24)


def array(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def whole(leaf):
    return read_block(leaf, (slice(None),) * len(leaf.shape), "leaf")


def unnamed(path):
    return path


def plain_digest(name, values):
    """As docs/formats.md says it, without a generator, a thread or a buffer."""
    chunk = digests.chunk_shape(values.shape, values.itemsize)
    header = json.dumps([name, values.dtype.name, list(values.shape), list(chunk)]).encode() + b"\n"
    places = np.ndindex(*(-(-length // step) for length, step in zip(values.shape, chunk, strict=True)))
    arrays = [
        values[tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True))] for place in places
    ]
    little = values.dtype.newbyteorder("<")
    chunks = [hashlib.sha256(part.astype(little).tobytes()).digest() for part in arrays]
    return hashlib.sha256(header + b"".join(chunks)).hexdigest()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_cover_an_array_once_in_c_order(shape, itemsize):
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    chunk = digests.chunk_shape(shape, itemsize)
    assert np.prod(chunk, dtype=int) * itemsize <= digests.CHUNK_BYTES
    arrays = [numbers[index].ravel() for index in digests.chunks(digests.whole(shape), chunk)]
    np.testing.assert_array_equal(np.concatenate(arrays), numbers.ravel())
    # Edges along split axes are powers of two, and the largest that are small enough.
    split = [axis for axis in range(len(shape)) if chunk[axis] < shape[axis]]
    assert all(chunk[axis].bit_count() == 1 for axis in split)
    if split:
        step_bytes = np.prod(shape[split[-1] + 1 :], dtype=int) * itemsize
        assert 2 * chunk[split[-1]] * step_bytes > digests.CHUNK_BYTES


@pytest.mark.parametrize("shape", [(5, 3), (2, 33), (7, 1, 9), (40,), (3, 4, 5)])
def test_chunks_of_a_narrower_dtype_are_unions_of_those_of_a_wider_one(shape):
    wide, narrow = (digests.chunk_shape(shape, itemsize) for itemsize in (4, 2))
    arrays = [part for unit in digests.chunks(digests.whole(shape), narrow) for part in digests.chunks(unit, wide)]
    assert arrays == list(digests.chunks(digests.whole(shape), wide))


def test_a_chunk_grid_is_that_of_the_format():
    """16 MiB at most: of the published model's feed-forward, a head, a short leaf."""
    found = [digests.chunk_shape(shape, itemsize) for shape, itemsize in FORMAT_GRIDS]
    assert found == list(FORMAT_GRIDS.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orbax_restores_what_is_written(tmp_path, dtype):
    leaves = {f"blocks/deep/x{i}": array(shape, dtype, seed=i) for i, shape in enumerate(SHAPES[1:])}
    leaves["embedding"] = array((9, 4), dtype)
    leaves["zeros"] = np.zeros((5, 6), dtype)
    stack = [array((2, 3, 8), dtype, seed=i) for i in range(3)]
    content = {path: Slice(values, None, path) for path, values in leaves.items()}
    content["blocks/stack"] = [Slice(part, None, "stack") for part in stack]
    write_tree(tmp_path / "tree", content, unnamed)
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "tree")
    expected = leaves | {"blocks/stack": np.stack(stack, axis=1)}
    flat = {
        "/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]
    }
    assert flat.keys() == expected.keys() == open_tree(tmp_path / "tree").keys()
    for path, leaf in open_tree(tmp_path / "tree").items():
        for found in (flat[path], whole(leaf)):
            assert found.dtype == dtype
            np.testing.assert_array_equal(np.asarray(found), expected[path])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_are_those_of_hashlib_in_every_layout(tmp_path, dtype):
    arrays = [array((2, 3, 8), dtype, seed=i) for i in range(2)]
    content = {"a/one": Slice(arrays[0], None, ""), "a/both": [Slice(part, None, "") for part in arrays]}
    digests = write_tree(tmp_path / "tree", content, digest_name=lambda path: "gate")
    expected = [plain_digest("gate", part) for part in arrays]
    assert digests == {"a/one": expected[0], "a/both": expected}
    stored = open_tree(tmp_path / "tree")["a/both"]
    assert [digest_slice(Slice(stored, i, ""), "gate") for i in range(2)] == expected
    assert [digest_slice(Slice(jax.numpy.asarray(part), None, ""), "gate") for part in arrays] == expected


FOREIGN = {
    "compressed": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}],
    "big-endian": [{"name": "bytes", "configuration": {"endian": "big"}}],
    "transposed": [
        {"name": "transpose", "configuration": {"order": [2, 1, 0]}},
        {"name": "bytes", "configuration": {"endian": "little"}},
    ],
}


def rewrite(folder, values, **metadata):
    """Stores a leaf in another way, by tensorstore."""
    shutil.rmtree(folder)
    spec = {"driver": "zarr3", "kvstore": f"file://{folder}/", "create": True}
    spec["metadata"] = {"data_type": values.dtype.name, "shape": list(values.shape), **metadata}
    ts.open(spec).result().write(values).result()


@pytest.mark.parametrize(
    "metadata",
    [
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 1, 3]}}},
        *({"codecs": codecs} for codecs in FOREIGN.values()),
    ],
    ids=["folders", "chunks", *FOREIGN],
)
def test_leaves_stored_in_another_way_are_the_same_leaves(tmp_path, metadata):
    values = array((4, 4, 4))  # one chunk is [1, 4, 4]
    (digest,) = write_tree(tmp_path / "tree", {"x": Slice(values, None, "")}, unnamed).values()
    grid = {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 4, 4]}}}
    rewrite(tmp_path / "tree" / "x", values, **(grid | metadata))
    stored = Slice(open_tree(tmp_path / "tree")["x"], None, "leaf x")
    assert chunk_folder(stored.source, (1, 4, 4)) is None
    assert digest_slice(stored, "x") == digest
    assert write_tree(tmp_path / "again", {"x": stored}, unnamed) == {"x": digest}
    again = open_tree(tmp_path / "again")["x"]
    np.testing.assert_array_equal(whole(again), values)
    assert chunk_folder(again, (1, 4, 4)) == tmp_path / "again" / "x"


def test_a_tree_that_orbax_wrote_is_read(tmp_path):
    values = array((4, 4, 4))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    ocp.Checkpointer(handler).save(tmp_path / "theirs", {"x": values})
    for file in (tmp_path / "theirs").iterdir():
        if file.name not in ("x", METADATA):
            file.unlink()
    digests = write_tree(tmp_path / "ours", {"x": Slice(values, None, "")}, unnamed)
    stored = Slice(open_tree(tmp_path / "theirs")["x"], None, "leaf x")
    assert write_tree(tmp_path / "again", {"x": stored}, unnamed) == digests


@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1]], ids=["shorter", "wider"])
@pytest.mark.parametrize("shape", SHAPES)
def test_casting_a_stored_leaf_is_numpys_and_checks_it(tmp_path, shape, dtypes):
    """The chunks of the two dtypes differ; what is written lies as if it had never had another dtype."""
    source, target = dtypes
    values = array(shape, source)
    digests = write_tree(tmp_path / "tree", {"x": Slice(values, None, "")}, unnamed)
    stored = Slice(open_tree(tmp_path / "tree")["x"], None, "leaf x").as_dtype(target, digests["x"])
    written = write_tree(tmp_path / "cast", {"x": stored, "y": [stored, stored]}, lambda path: "x")
    plain = {"x": Slice(values.astype(target), None, "")}
    assert written["x"] == plain_digest("x", values.astype(target)) == digest_slice(stored, "x")
    assert written["y"] == [written["x"]] * 2
    write_tree(tmp_path / "plain", plain | {"y": [plain["x"]] * 2}, unnamed)
    assert small.files(tmp_path / "cast") == small.files(tmp_path / "plain")
    with pytest.raises(UserError, match="leaf x: altered"):
        digest_slice(stored._replace(digest="0" * 64), "x")


def test_digest_depends_on_name_dtype_shape_and_every_value():
    values = array((2, 3))
    changed = values.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    variants = [("a", values), ("b", values), ("a", values.T), ("a", values.view(np.int32)), ("a", changed)]
    assert len({digest_slice(Slice(array, None, ""), name) for name, array in variants}) == len(variants)


def test_digest_does_not_depend_on_how_much_is_read_at_once(monkeypatch):
    part = Slice(array((4, 5, 6)), None, "")
    small = digest_slice(part, "gate")
    monkeypatch.setattr(copying, "BUFFER_BYTES", 2**20)
    assert digest_slice(part, "gate") == small


def test_a_source_that_is_read_in_order_is_read_by_one_thread(tmp_path):
    """As an imported tensor is, which keeps what it read until the last of it was asked for."""
    values, asked = array((9, 8)), []

    class InOrder:
        shape, dtype = values.shape, values.dtype

        def __getitem__(self, index):
            asked.append(index[0].start)
            return values[index]

    part = Slice(InOrder(), None, "")
    assert write_tree(tmp_path / "tree", {"x": part}, unnamed) == {"x": plain_digest("x", values)}
    assert asked == sorted(asked)
    assert len(asked) > 3


def test_combined_digest_is_that_of_the_sorted_pairs():
    leaves = {"up": "12", "gate": "34"}
    plain = hashlib.sha256(b'[["gate", "34"], ["up", "12"]]').hexdigest()
    assert digests.combined_digest(leaves) == digests.combined_digest(dict(sorted(leaves.items()))) == plain


def test_devices_read_their_shards_and_cast(tmp_path):
    values = array((8, 6))
    write_tree(tmp_path / "tree", {"x": Slice(values, None, "x")}, unnamed)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    read = read_leaf(open_tree(tmp_path / "tree")["x"], sharding, np.dtype(ml_dtypes.bfloat16), "x")
    assert read.sharding == sharding
    np.testing.assert_array_equal(np.asarray(read), values.astype(ml_dtypes.bfloat16))


def test_progress_adds_up_to_the_bytes_written(tmp_path):
    written = []
    content = {"x": Slice(array((8, 6)), None, ""), "y": [Slice(array((2, 5)), None, "")] * 3}
    write_tree(tmp_path / "tree", content, unnamed, advance=written.append)
    assert sum(written) == 4 * (8 * 6 + 3 * 2 * 5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refuses_values_that_are_not_finite(tmp_path, dtype, value):
    values = array((4, 8), dtype)
    values[3, 7] = value
    with pytest.raises(UserError, match="the last leaf: holds values that are not finite"):
        write_tree(tmp_path / "tree", {"x": Slice(values, None, "the last leaf")}, unnamed)
    assert not (tmp_path / "tree" / METADATA).exists()


CHUNK = "x/c.1.0"
DAMAGES = {
    "missing block": lambda path: (path / CHUNK).unlink(),
    "truncated block": lambda path: (path / CHUNK).write_bytes((path / CHUNK).read_bytes()[:-1]),
    "empty block": lambda path: (path / CHUNK).write_bytes(b""),
    "longer block": lambda path: (path / CHUNK).write_bytes((path / CHUNK).read_bytes() + b"0"),
    "missing leaf": lambda path: shutil.rmtree(path / "x"),
    "missing leaf metadata": lambda path: (path / "x" / "zarr.json").unlink(),
    "damaged leaf metadata": lambda path: (path / "x" / "zarr.json").write_text("{"),
    "other leaf metadata": lambda path: (path / "x" / "zarr.json").write_text("[]"),
    "missing index": lambda path: (path / METADATA).unlink(),
    "missing directory": shutil.rmtree,
}
INDICES = ["{", "[]", "3", "null", "{}", '{"tree_metadata": []}', '{"tree_metadata": {"a": 3}}', "\udcff"]
DAMAGES |= {
    f"index {i}": lambda path, text=text: (path / METADATA).write_bytes(text.encode(errors="surrogateescape"))
    for i, text in enumerate(INDICES)
}
DAMAGES["other layout"] = lambda path: (path / METADATA).write_text(
    (path / METADATA).read_text().replace('"use_zarr3": true', '"use_zarr3": false')
)


READS = {
    "read": lambda leaf, name: read_block(leaf, (slice(None), slice(None)), name),
    "copied": lambda leaf, name: digest_slice(Slice(leaf, None, name), "x"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_place(tmp_path, damage, read):
    write_tree(tmp_path / "tree", {"x": Slice(array((4, 8)), None, "x")}, unnamed)
    assert (tmp_path / "tree" / CHUNK).exists()
    DAMAGES[damage](tmp_path / "tree")
    with pytest.raises(UserError, match=r"/tree|leaf x") as caught:
        read(open_tree(tmp_path / "tree")["x"], f"{tmp_path}/tree: leaf x")
    assert "\n" not in str(caught.value)
