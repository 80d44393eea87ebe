"""Flat trees of arrays on disk, read and written block by block.

A tree is a directory in Orbax's layout (zarr3, one folder a leaf), so `orbax.checkpoint` restores it too.
Writing does not go through Orbax, because a merge must never hold a whole leaf: each leaf is stored in
blocks of at most `BLOCK_BYTES`, split along its leading axes, and the reader gets the same blocks.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax.errors import UserError

BLOCK_BYTES = 16 * 2**20
# One more than there are cores: a thread that waits for tensorstore leaves a core to another. Each holds a few blocks.
COPY_THREADS = min(8, 1 + (os.cpu_count() or 1))
METADATA = "_METADATA"


def block_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of the blocks a leaf is stored in: leading axes are split until a block is small enough."""
    block, size = list(shape), itemsize * int(np.prod(shape, dtype=np.int64))
    for axis, length in enumerate(shape):
        if size <= BLOCK_BYTES:
            break
        row = size // length
        block[axis] = max(1, BLOCK_BYTES // row)
        size = row * block[axis]
    return tuple(block)


def blocks(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Index ranges that cover an array of that shape in C order."""
    grid = [-(-length // step) for length, step in zip(shape, block, strict=True)]
    for index in np.ndindex(*grid):
        yield tuple(
            slice(i * step, min((i + 1) * step, length)) for i, step, length in zip(index, block, shape, strict=True)
        )


class LeafDigest:
    """sha256 of a leaf's name, dtype, shape and little-endian bytes in C order."""

    def __init__(self, name: str, dtype: np.dtype, shape: Sequence[int]):
        """Starts the digest of one leaf; `update` then takes its blocks in C order."""
        header = json.dumps([name, np.dtype(dtype).name, list(shape)])
        self._hash = hashlib.sha256(header.encode() + b"\n")

    def update(self, block: np.ndarray) -> None:
        self._hash.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def combined_digest(leaves: Mapping[str, str]) -> str:
    """One sha256 for a set of leaf digests, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(leaves.items())).encode()).hexdigest()


class TreeWriter:
    """Makes a tree: `create` each leaf, write its blocks, then `finish`."""

    def __init__(self, path: epath.PathLike):
        """Starts a tree in `path`, which must not exist."""
        self._path = epath.Path(path)
        self._path.mkdir(parents=True)
        self._shapes: dict[str, list[int]] = {}

    def create(self, name: str, shape: Sequence[int], dtype: np.dtype, block: Sequence[int]) -> None:
        """Makes an array to be filled in units of `block` (shape of one stored block)."""
        self._shapes[name] = list(shape)
        ts.open(
            {
                "driver": "zarr3",
                "kvstore": _kvstore(self._path, name),
                "metadata": {
                    "data_type": np.dtype(dtype).name,
                    "shape": list(shape),
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(block)}},
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                },
                "create": True,
                "store_data_equal_to_fill_value": True,
            },
            context=_context(),
        ).result()

    def write(self, name: str, place: Sequence[int], values: np.ndarray, block_bytes: int) -> None:
        """Writes one stored block: `values` in C order, zeros up to its full size where the array ends within it.

        An uncompressed zarr3 block is a file of its bytes. Tensorstore takes up to twice as long to write the same.
        """
        *folders, file = map(str, ("c", *place))
        folder = self._path / name.replace("/", ".") / "/".join(folders)
        folder.mkdir(parents=True, exist_ok=True)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        missing = block_bytes - data.nbytes
        (folder / file).write_bytes(np.pad(data, (0, missing)) if missing else data)

    def finish(self) -> None:
        """Writes the index that makes the directory an Orbax checkpoint."""
        entries = {}
        for name, shape in sorted(self._shapes.items()):
            keys = name.split("/")
            entries[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": shape},
            }
        metadata = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._path / METADATA).write_text(json.dumps(metadata))


def open_tree(path: epath.PathLike) -> dict[str, ts.TensorStore]:
    """Opens every leaf of a tree for reading; nothing but metadata is read.

    Raises:
      UserError: the directory or its index is missing or damaged, or a leaf is missing.
    """
    path = epath.Path(path)
    try:
        index = json.loads((path / METADATA).read_text())
        names = ["/".join(k["key"] for k in e["key_metadata"]) for e in index["tree_metadata"].values()]
    except FileNotFoundError:
        raise UserError(f"{path}: no parameters here ({METADATA} is missing); is the copy complete?") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / METADATA}: damaged; copy the directory again from its source") from None
    if index.get("use_ocdbt") or not index.get("use_zarr3"):
        raise UserError(f"{path}: not in zarr3 layout without OCDBT, the only one read here")
    stray = {entry.name for entry in path.iterdir()} - {name.replace("/", ".") for name in names} - {METADATA}
    if stray:
        raise UserError(f"{path}: holds {min(stray)}, which its index does not name; copy the directory again")
    leaves = {}
    for name in names:
        # A block that is missing must not be read as zeros.
        spec = {"driver": "zarr3", "kvstore": _kvstore(path, name), "open": True}
        spec["fill_missing_data_reads"] = False
        try:
            leaves[name] = ts.open(spec, context=_context()).result()
        except ValueError as error:
            raise UserError(f"{path}: leaf {name} cannot be opened ({_first_line(error)})") from None
    return leaves


def read_block(leaf: ts.TensorStore, index: tuple[slice, ...], name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Reads one block of a leaf, into `out` where it is given (of the block's shape and dtype).

    Raises:
      UserError: the stored bytes are missing or truncated; `name` says of which leaf.
    """
    try:
        if out is None:
            return leaf[index].read().result()
        ts.array(out).write(leaf[index]).result()
        return out
    except ValueError as error:
        raise UserError(f"{name}: cannot be read, missing or truncated ({_first_line(error)})") from None


def read_leaf(leaf: ts.TensorStore, sharding: jax.sharding.Sharding, dtype: np.dtype, name: str) -> jax.Array:
    """Reads a leaf onto devices; each reads its own shard, cast to `dtype`."""

    def shard(index):
        return read_block(leaf, index, name).astype(dtype)

    return jax.make_array_from_callback(tuple(leaf.shape), sharding, shard)


class Slice(NamedTuple):
    """A leaf to be read block by block: a whole array, or one expert's part of a stacked one.

    Attributes:
      source: [layers, ...], or [layers, experts, ...] when `expert` is given; stored, in memory, or anything
        that reads a block when it is indexed and has `shape` and `dtype`.
      expert: position on the expert axis, or None when there is no such axis.
      name: where it comes from, for errors.
    """

    source: ts.TensorStore | jax.Array | np.ndarray
    expert: int | None
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape without the expert axis."""
        shape = tuple(self.source.shape)
        return shape if self.expert is None else shape[:1] + shape[2:]

    @property
    def dtype(self) -> np.dtype:
        dtype = self.source.dtype
        return dtype.numpy_dtype if isinstance(dtype, ts.dtype) else np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its content."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...], out: np.ndarray | None = None) -> np.ndarray:
        """Reads one block, of `index` into the shape without the expert axis; `out` may be used to hold it."""
        if self.expert is not None:
            index = (index[0], self.expert, *index[1:])
        if isinstance(self.source, ts.TensorStore):
            return read_block(self.source, index, self.name, out)
        return np.asarray(jax.device_get(self.source[index]))


def write_tree(
    path: epath.PathLike,
    leaves: Mapping[str, Slice | Sequence[Slice]],
    digest_name: Callable[[str], str],
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, str | list[str]]:
    """Writes a tree block by block; memory is a few blocks, whatever the leaves' sizes.

    Args:
      path: directory to make.
      leaves: {path in the tree: its content}; several slices are stacked on a new axis 1, in order.
      digest_name: path in the tree -> the name that enters a slice's digest.
      advance: called with the number of bytes written, as they are.

    Returns:
      {path: digest}, or {path: [digest of each slice]} for stacked leaves.

    Raises:
      UserError: a value is not finite, or a source cannot be read.
    """
    writer = TreeWriter(path)
    parts = {leaf: [content] if isinstance(content, Slice) else list(content) for leaf, content in leaves.items()}
    jobs = {}
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        # The largest first, so that no thread is left alone with one at the end.
        for leaf in sorted(leaves, key=lambda leaf: parts[leaf][0].nbytes, reverse=True):
            shape, dtype = parts[leaf][0].shape, parts[leaf][0].dtype
            block = block_shape(shape, dtype.itemsize)
            stacked = not isinstance(leaves[leaf], Slice)
            at, one = ((len(parts[leaf]),), (1,)) if stacked else ((), ())
            writer.create(leaf, shape[:1] + at + shape[1:], dtype, block[:1] + one + block[1:])
            jobs[leaf] = [
                pool.submit(_copy, part, block, digest_name(leaf), advance, writer, leaf, (i,) if stacked else ())
                for i, part in enumerate(parts[leaf])
            ]
        try:
            digests = {leaf: [job.result() for job in jobs[leaf]] for leaf in leaves}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    writer.finish()
    return {leaf: d[0] if isinstance(leaves[leaf], Slice) else d for leaf, d in digests.items()}


def digest_slice(part: Slice, name: str) -> str:
    """Reads a leaf block by block and returns its digest under `name`; raises UserError as `write_tree` does."""
    return _copy(part, block_shape(part.shape, part.dtype.itemsize), name)


def _copy(
    part: Slice,
    block: Sequence[int],
    digest_name: str,
    advance: Callable[[int], None] = lambda size: None,
    writer: TreeWriter | None = None,
    leaf: str = "",
    expert: tuple[int, ...] = (),
) -> str:
    """Reads a leaf once, checks and digests it, and writes it where there is a writer; returns the digest."""
    digest = LeafDigest(digest_name, part.dtype, part.shape)
    # Buffers for all blocks: to be given fresh memory for each takes longer than to read it.
    buffer, finite = np.empty(block, part.dtype), np.empty(block, bool)
    for index in blocks(part.shape, block):
        inside = (*(slice(at.stop - at.start) for at in index), ...)
        values = part.read(index, buffer[inside])
        if not np.isfinite(values, out=finite[inside]).all():
            raise UserError(f"{part.name}: holds values that are not finite (NaN or infinity)")
        digest.update(values)
        if writer is not None:
            place = tuple(at.start // step for at, step in zip(index, block, strict=True))
            writer.write(leaf, place[:1] + expert + place[1:], values, buffer.nbytes)
        advance(values.nbytes)
    return digest.hexdigest()


def _kvstore(path: epath.Path, name: str) -> str:
    folder = path / name.replace("/", ".")
    return f"{folder}/" if "://" in str(folder) else f"file://{folder.resolve()}/"


@functools.cache
def _context() -> ts.Context:
    """One context for all leaves: with one each, tensorstore's threads, and the memory they hold, would add up."""
    limit = {"limit": COPY_THREADS}
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_sync": False,
            "data_copy_concurrency": limit,
            "file_io_concurrency": limit,
        }
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]
