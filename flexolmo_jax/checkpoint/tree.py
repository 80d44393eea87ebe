"""Flat trees of arrays on disk, read and written block by block.

A tree is a directory in Orbax's layout (zarr3, one folder a leaf), so `orbax.checkpoint` restores it too.
Writing does not go through Orbax, because a merge must never hold a whole leaf: each leaf is stored in
blocks of at most `BLOCK_BYTES`, split along its leading axes, each a file of its bytes, which is copied a piece at a
time. Whatever else zarr3 allows is read through tensorstore, a block at a time.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.files import is_system_file
from flexolmo_jax.checkpoint.zarr import (
    METADATA,
    Index,
    TreeWriter,
    block_folder,
    folder_name,
    leaf_names,
    read_block_file,
    with_expert,
)
from flexolmo_jax.errors import UserError

BLOCK_BYTES = 16 * 2**20
# What is read, checked, digested and written at a time: little enough to stay in a core's cache from first to last.
PIECE_BYTES = 2**19
# One more than there are cores: a thread that waits for the disk leaves a core to another.
COPY_THREADS = min(8, 1 + (os.cpu_count() or 1))


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


def blocks(shape: Sequence[int], block: Sequence[int]) -> Iterator[Index]:
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


def open_tree(path: epath.PathLike) -> dict[str, ts.TensorStore]:
    """Opens every leaf of a tree for reading; nothing but metadata is read.

    Raises:
      UserError: the directory or its index is missing or damaged, or a leaf is missing.
    """
    path = epath.Path(path)
    try:
        index = json.loads((path / METADATA).read_text())
        names = leaf_names(index)
    except FileNotFoundError:
        raise UserError(f"{path}: no parameters here ({METADATA} is missing); is the copy complete?") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / METADATA}: damaged; copy the directory again from its source") from None
    if index.get("use_ocdbt") or not index.get("use_zarr3"):
        raise UserError(f"{path}: not in zarr3 layout without OCDBT, the only one read here")
    held = {entry.name for entry in path.iterdir() if not is_system_file(entry.name)}
    stray = held - {folder_name(name) for name in names} - {METADATA}
    if stray:
        raise UserError(f"{path}: holds {min(stray)}, which its index does not name; copy the directory again")
    leaves = {}
    for name in names:
        # A block that is missing must not be read as zeros.
        spec = {"driver": "zarr3", "kvstore": _kvstore(path / folder_name(name)), "open": True}
        spec["fill_missing_data_reads"] = False
        try:
            leaves[name] = ts.open(spec, context=_context()).result()
        except ValueError as error:
            raise UserError(f"{path}: leaf {name} cannot be opened ({_first_line(error)})") from None
    return leaves


def read_block(leaf: ts.TensorStore, index: Index, name: str) -> np.ndarray:
    """Reads one block of a leaf.

    Raises:
      UserError: the stored bytes are missing or truncated; `name` says of which leaf.
    """
    try:
        return leaf[index].read().result()
    except ValueError as error:
        raise _unreadable(name, error) from None


def read_leaf(leaf: ts.TensorStore, sharding: jax.sharding.Sharding, dtype: np.dtype, name: str) -> jax.Array:
    """Reads a leaf onto devices; each reads its own shard, cast to `dtype`."""

    def shard(index):
        return read_block(leaf, index, name).astype(dtype)

    return jax.make_array_from_callback(tuple(leaf.shape), sharding, shard)


class Slice(NamedTuple):
    """A leaf to be read block by block: a whole array, or one expert's part of a stacked one, cast where asked.

    Attributes:
      source: [layers, ...], or [layers, experts, ...] when `expert` is given; as `open_tree` gives it, in memory,
        or anything that reads a block when it is indexed and has `shape` and `dtype`.
      expert: position on the expert axis, or None when there is no such axis.
      name: where it comes from, for errors.
      cast: the dtype that values are rounded to, once and to nearest even, as they are read; None: that of the source.
      digest: of the source's content; compared when a cast slice is read whole. None: not known.
    """

    source: ts.TensorStore | jax.Array | np.ndarray
    expert: int | None
    name: str
    cast: np.dtype | None = None
    digest: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape without the expert axis."""
        shape = tuple(self.source.shape)
        return shape if self.expert is None else shape[:1] + shape[2:]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what is read."""
        return self.source_dtype if self.cast is None else self.cast

    @property
    def source_dtype(self) -> np.dtype:
        """The dtype before the cast."""
        dtype = self.source.dtype
        return dtype.numpy_dtype if isinstance(dtype, ts.dtype) else np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of what is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def as_dtype(self, dtype: np.dtype, digest: str | None = None) -> "Slice":
        """The same leaf, cast to `dtype`; as it is where it has that dtype. `digest` is that of its content before."""
        cast = None if self.source_dtype == dtype else np.dtype(dtype)
        return self._replace(cast=cast, digest=digest if cast is not None else None)

    def read(self, index: Index) -> np.ndarray:
        """Reads one block, of `index` into the shape without the expert axis, in `dtype`.

        Raises:
          UserError: it cannot be read, or a value is too large for `dtype`.
        """
        return self.rounded(self.read_source(index))

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """Values of the source, cast; raises UserError where one would become infinite."""
        if self.cast is None:
            return values
        with np.errstate(over="ignore"):  # what overflows is refused below
            rounded = values.astype(self.cast)
        if not _all_finite(rounded) and _all_finite(values):
            limit = float(jnp.finfo(self.cast).max)
            raise UserError(
                f"{self.name}: holds values beyond {limit:.6g}, the largest of {self.cast.name}; use another dtype"
            )
        return rounded

    def read_source(self, index: Index) -> np.ndarray:
        """Reads one block as it is before the cast."""
        index = with_expert(index, self.expert)
        if isinstance(self.source, ts.TensorStore):
            return read_block(self.source, index, self.name)
        return np.asarray(jax.device_get(self.source[index]))


def write_tree(
    path: epath.PathLike,
    leaves: Mapping[str, Slice | Sequence[Slice]],
    digest_name: Callable[[str], str],
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, str | list[str]]:
    """Writes a tree piece by piece; memory is a few pieces a thread, whatever the leaves' sizes and their number.

    From a source that is not stored in blocks as they are written here, a thread reads and holds whole blocks.

    Args:
      path: directory to make.
      leaves: {path in the tree: its content}; several slices are stacked on a new axis 1, in order.
      digest_name: path in the tree -> the name that enters a slice's digest.
      advance: called with the number of bytes written, as they are.

    Returns:
      {path: digest of what was written}, or {path: [digest of each slice]} for stacked leaves.

    Raises:
      UserError: a value is not finite or too large for the dtype it is cast to, a source cannot be read, or the
        content of a cast slice is not what its digest says.
    """
    writer = TreeWriter(path)
    parts = {leaf: [content] if isinstance(content, Slice) else list(content) for leaf, content in leaves.items()}
    jobs = {}
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        # The largest first, so that no thread is left alone with one at the end.
        for leaf in sorted(leaves, key=lambda leaf: parts[leaf][0].nbytes, reverse=True):
            shape, dtype = parts[leaf][0].shape, parts[leaf][0].dtype
            block = block_shape(shape, dtype.itemsize)
            experts = None if isinstance(leaves[leaf], Slice) else len(parts[leaf])
            writer.create(leaf, shape, dtype, block, experts)
            jobs[leaf] = []
            for i, part in enumerate(parts[leaf]):
                write = functools.partial(writer.write, leaf, None if experts is None else i)
                jobs[leaf].append(pool.submit(_copy, part, block, digest_name(leaf), advance, write))
        try:
            digests = {leaf: [job.result() for job in jobs[leaf]] for leaf in leaves}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    writer.finish()
    return {leaf: d[0] if isinstance(leaves[leaf], Slice) else d for leaf, d in digests.items()}


def digest_slice(part: Slice, name: str) -> str:
    """Reads a leaf block by block and returns its digest under `name`; raises UserError as `write_tree` does."""
    return _copy(part, block_shape(part.shape, part.source_dtype.itemsize), name)


def check_digest(name: str, found: str, named: str) -> None:
    """Raises UserError where the content of a leaf, called `name`, has not the digest that a manifest names."""
    if found != named:
        raise UserError(
            f"{name}: altered (its digest is {found[:12]}, the manifest says {named[:12]}); "
            "copy it again from its source"
        )


def _skip(index: Index, pieces: Iterable[np.ndarray]) -> None:
    """Goes through the pieces of a block, and does nothing with them."""
    collections.deque(pieces, maxlen=0)


def _copy(
    part: Slice,
    block: Sequence[int],
    digest_name: str,
    advance: Callable[[int], None] = lambda size: None,
    write: Callable[[Index, Iterable[np.ndarray]], None] = _skip,
) -> str:
    """Reads a leaf once, checks and digests it, and gives each block's pieces to `write`; returns the digest."""
    digest, before = (LeafDigest(digest_name, dtype, part.shape) for dtype in (part.dtype, part.source_dtype))
    # A cast leaf lies in blocks of another shape. Both are ranges of the leaf in C order, so that none is held whole.
    source_block = block if part.cast is None else block_shape(part.shape, part.source_dtype.itemsize)
    read = _reader(part, source_block)
    contents = (_examined(read(index), part, before) for index in blocks(part.shape, source_block))
    if part.cast is not None:
        contents = _regrouped(_cast(itertools.chain.from_iterable(contents), part, digest), part.shape, block)
    for index, pieces in zip(blocks(part.shape, block), contents, strict=True):
        write(index, pieces)
        advance(_count(index) * part.dtype.itemsize)
    if part.cast is None:
        return before.hexdigest()
    if part.digest is not None:
        check_digest(part.name, before.hexdigest(), part.digest)
    return digest.hexdigest()


def _reader(part: Slice, block: Sequence[int]) -> Callable[[Index], Iterator[np.ndarray]]:
    """Returns what yields a block's values before a cast, flat in C order, in pieces.

    A piece is there until the next is asked for.
    """
    stored_block = with_expert(block, None if part.expert is None else 1)
    folder = block_folder(part.source, stored_block) if isinstance(part.source, ts.TensorStore) else None
    # Kept: to be given fresh memory for each piece takes longer than to read it.
    buffer = np.empty(PIECE_BYTES // part.source_dtype.itemsize, part.source_dtype)

    def from_file(index: Index) -> Iterator[np.ndarray]:
        try:
            yield from read_block_file(folder, index, block, part.expert, buffer)
        except OSError as error:
            raise _unreadable(part.name, error) from None

    def at_once(index: Index) -> Iterator[np.ndarray]:
        values = np.ascontiguousarray(part.read_source(index)).reshape(-1)
        for start in range(0, values.size, buffer.size):
            yield values[start : start + buffer.size]

    return at_once if folder is None else from_file


def _examined(pieces: Iterable[np.ndarray], part: Slice, digest: LeafDigest) -> Iterator[np.ndarray]:
    """Yields the pieces of a leaf, checked and digested."""
    for values in pieces:
        if not _all_finite(values):
            raise UserError(f"{part.name}: holds values that are not finite (NaN or infinity)")
        digest.update(values)
        yield values


def _cast(pieces: Iterable[np.ndarray], part: Slice, digest: LeafDigest) -> Iterator[np.ndarray]:
    """Yields the pieces of a leaf, cast and digested."""
    for values in map(part.rounded, pieces):
        digest.update(values)
        yield values


def _regrouped(
    pieces: Iterator[np.ndarray], shape: Sequence[int], block: Sequence[int]
) -> Iterator[Iterator[np.ndarray]]:
    """Yields for each block the pieces of it, of an array's pieces in C order; to be used up before the next."""
    rest = np.empty(0)

    def of_block(count: int) -> Iterator[np.ndarray]:
        nonlocal rest
        while count:
            rest = rest if rest.size else next(pieces)
            values, rest = rest[:count], rest[count:]
            count -= values.size
            yield values

    yield from (of_block(_count(index)) for index in blocks(shape, block))


def _count(index: Index) -> int:
    """How many values a block has."""
    return math.prod(at.stop - at.start for at in index)


def _all_finite(values: np.ndarray) -> bool:
    """Whether no number's exponent is all ones; in bfloat16 this takes a tenth of `np.isfinite`'s time."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return True
    infinity = np.array(np.inf, values.dtype).view(f"u{values.dtype.itemsize}")
    return bool((values.view(infinity.dtype) & infinity).max() < infinity)


def _kvstore(folder: epath.Path) -> str | dict[str, str]:
    """Where tensorstore finds a folder; a local one is no URL, in which % and # would mean something else."""
    return f"{folder}/" if "://" in str(folder) else {"driver": "file", "path": f"{folder.resolve()}/"}


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


def _unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: cannot be read, missing or truncated ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]
