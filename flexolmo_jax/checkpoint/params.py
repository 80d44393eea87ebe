"""Flat trees of arrays on disk, read, checked, digested and written chunk by chunk.

A tree is a directory in Orbax's layout (zarr3, one folder for each leaf), so `orbax.checkpoint` restores it too. Its
chunks are copied directly, in few bytes at a time, by several threads: never is a whole leaf in memory. Any other
layout that zarr3 allows is read through tensorstore, a chunk at a time.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.digests import Index, chunk_shape, chunks, leaf_digest, whole
from flexolmo_jax.checkpoint.files import is_system_file
from flexolmo_jax.checkpoint.zarr import (
    METADATA,
    TreeWriter,
    chunk_folder,
    folder_name,
    leaf_names,
    read_chunk_file,
    with_expert,
)
from flexolmo_jax.errors import UserError, first_line

# What is read, checked, digested and written at a time: little enough to stay in a core's cache from first to last.
BUFFER_BYTES = 2**19
# One more than there are cores: a thread that waits for the disk leaves a core to another.
COPY_THREADS = min(8, 1 + (os.cpu_count() or 1))


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
    except (RecursionError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / METADATA}: damaged; copy the directory again from its source") from None
    if index.get("use_ocdbt") or not index.get("use_zarr3"):
        raise UserError(f"{path}: not in zarr3 layout without OCDBT, the only one read here")
    entries = {entry.name for entry in path.iterdir() if not is_system_file(entry.name)}
    stray = entries - {folder_name(name) for name in names} - {METADATA}
    if stray:
        raise UserError(f"{path}: holds {min(stray)}, which its index does not name; copy the directory again")
    # A chunk that is missing must not be read as zeros.
    options = {"driver": "zarr3", "open": True, "fill_missing_data_reads": False}
    kvstores = {name: _kvstore(path / folder_name(name)) for name in names}
    # All at once: on an object store each takes a round trip.
    opening = {name: ts.open({**options, "kvstore": kvstores[name]}, context=_context()) for name in names}
    leaves = {}
    for name, leaf in opening.items():
        try:
            leaves[name] = leaf.result()
        except ValueError as error:
            raise UserError(f"{path}: leaf {name} cannot be opened ({first_line(error)[:160]})") from None
        _check_chunks(leaves[name], f"{path}: leaf {name}")
    return leaves


def _check_chunks(leaf: ts.TensorStore, name: str) -> None:
    """Raises UserError where a chunk is larger than its leaf: compressed zeros can decode to any number of bytes."""
    shape, chunk = list(leaf.shape), [edge or 1 for edge in leaf.chunk_layout.write_chunk.shape or leaf.shape]
    if any(edge > max(1, length) for edge, length in zip(chunk, shape, strict=True)):
        raise UserError(f"{name}: has chunks of {chunk}, larger than the leaf, {shape}; write it anew")


def read_block(leaf: ts.TensorStore, index: Index, name: str) -> np.ndarray:
    """Reads a range of a leaf.

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
        return read_block(leaf, index, name).astype(dtype, copy=False)

    return jax.make_array_from_callback(tuple(leaf.shape), sharding, shard)


class Slice(NamedTuple):
    """A leaf to be read chunk by chunk: a whole array, or one expert's part of a stacked one, cast where asked.

    Attributes:
      source: [layers, ...], or [layers, experts, ...] when `expert` is given; as `open_tree` gives it, in memory,
        or anything that has `shape` and `dtype` and reads a range when it is indexed (in C order, in one thread).
      expert: position on the expert axis, or None when there is no such axis.
      name: where it comes from, for errors.
      cast: the dtype that values are rounded to, once and to nearest even, as they are read; None: that of the source.
      digest: of the source's content; compared when the slice is read whole. None: not known.
    """

    source: Any
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
        return self._replace(cast=None if self.source_dtype == dtype else np.dtype(dtype), digest=digest)

    def read(self, index: Index) -> np.ndarray:
        """Reads a range, of `index` into the shape without the expert axis, in `dtype`.

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
        """Reads a range as it is before the cast."""
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
    """Writes a tree; threads copy its chunks, each holding a small buffer, whatever the leaves' sizes and number.

    From a source that is not stored in the chunks written here, a thread reads and holds whole chunks.

    Args:
      path: directory to make.
      leaves: {path in the tree: its content}; several slices are stacked on a new axis 1, in order.
      digest_name: path in the tree -> the name that enters a slice's digest.
      advance: called with the number of bytes written, as they are.

    Returns:
      {path: digest of what was written}, or {path: [digest of each slice]} for stacked leaves.

    Raises:
      UserError: a value is not finite or too large for the dtype it is cast to, a source cannot be read, or the
        content of a slice is not what its digest says.
    """
    writer = TreeWriter(path)
    jobs: dict[str, list[_Copy]] = {}
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        buffer = _Buffer()
        for leaf, content in leaves.items():
            stacked = not isinstance(content, Slice)
            parts = list(content) if stacked else [content]
            chunk = chunk_shape(parts[0].shape, parts[0].dtype.itemsize)
            writer.create(leaf, parts[0].shape, parts[0].dtype, chunk, len(parts) if stacked else None)
            jobs[leaf] = []
            for i, part in enumerate(parts):
                write = functools.partial(writer.write, leaf, i if stacked else None)
                jobs[leaf].append(_Copy(pool, part, digest_name(leaf), buffer, advance, write))
        try:
            digests = {leaf: [job.digest() for job in jobs[leaf]] for leaf in leaves}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    writer.finish()
    return {leaf: found[0] if isinstance(leaves[leaf], Slice) else found for leaf, found in digests.items()}


def digest_slice(part: Slice, name: str, advance: Callable[[int], None] = lambda size: None) -> str:
    """Reads a leaf and returns its digest under `name`; raises UserError as `write_tree` does."""
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        try:
            return _Copy(pool, part, name, _Buffer(), advance).digest()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_digest(label: str, found: str, expected: str) -> None:
    """Raises UserError where the content of a leaf, called `label`, has not the digest that a manifest names."""
    if found != expected:
        raise UserError(
            f"{label}: altered (its digest is {found[:12]}, the manifest says {expected[:12]}); "
            "copy it again from its source"
        )


class _Buffer(threading.local):
    """Memory of a thread: to be given fresh memory for each read takes longer than to read."""

    def __init__(self) -> None:
        self.bytes = np.empty(BUFFER_BYTES, np.uint8)


def _skip(index: Index, values: Iterable[np.ndarray]) -> None:
    """Reads the values of a chunk, and does nothing with them."""
    collections.deque(values, maxlen=0)


class _Copy:
    """A leaf that the threads of a pool read once, check, digest and give to `write`, chunk by chunk.

    A cast leaf has chunks of another shape than its source. The chunks of one are unions of those of the other
    (`digests.chunk_shape`); a thread takes the larger one at a time.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        part: Slice,
        digest_name: str,
        buffer: _Buffer,
        advance: Callable[[int], None],
        write: Callable[[Index, Iterable[np.ndarray]], None] = _skip,
    ):
        self._part, self._digest_name, self._buffer, self._advance, self._write = (
            *(part, digest_name, buffer),
            *(advance, write),
        )
        self._source_chunk = chunk_shape(part.shape, part.source_dtype.itemsize)
        self._chunk = chunk_shape(part.shape, part.dtype.itemsize)
        self._read = _reader(part, self._source_chunk, buffer)
        larger = tuple(map(max, self._source_chunk, self._chunk))
        units = list(chunks(whole(part.shape), larger))
        parallel = isinstance(part.source, ts.TensorStore | np.ndarray | jax.Array)
        groups = [[unit] for unit in units] if parallel else [units]
        self._jobs: list[Future] = [pool.submit(lambda group: [*map(self._copy, group)], group) for group in groups]

    def digest(self) -> str:
        """Waits until the leaf is copied, and returns its digest; raises UserError as `write_tree` does."""
        part, results = self._part, [result for job in self._jobs for result in job.result()]
        source, written = (itertools.chain.from_iterable(column) for column in zip(*results, strict=True))
        digest = leaf_digest(self._digest_name, part.dtype, part.shape, written)
        if part.digest is not None:
            cast = part.cast is not None
            before = leaf_digest(self._digest_name, part.source_dtype, part.shape, source) if cast else digest
            check_digest(part.name, before, part.digest)
        return digest

    def _copy(self, unit: Index) -> tuple[list[bytes], list[bytes]]:
        """Copies a range; returns the digests of its chunks in the source and as they are written."""
        before: list[bytes] = []
        values = self._source_values(unit, before)
        if self._part.cast is None:
            self._write(unit, values)
            after = before
        else:
            after = self._write_cast(unit, map(self._part.rounded, values))
        self._advance(_count(unit) * self._part.dtype.itemsize)
        return before, after

    def _source_values(self, unit: Index, digests: list[bytes]) -> Iterator[np.ndarray]:
        """Yields the values of a range before the cast, checked; adds each chunk's digest once it was read."""
        for index in chunks(unit, self._source_chunk):
            digest = hashlib.sha256()
            for values in self._read(index):
                if not _all_finite(values):
                    raise UserError(f"{self._part.name}: holds values that are not finite (NaN or infinity)")
                digest.update(values.view(np.uint8).data)
                yield values
            digests.append(digest.digest())

    def _write_cast(self, unit: Index, values: Iterator[np.ndarray]) -> list[bytes]:
        """Writes the values of a range, which is in C order, in chunks; returns their digests."""
        digests, rest = [], np.empty(0, np.uint8)

        def take(count: int, digest: "hashlib._Hash") -> Iterator[np.ndarray]:
            nonlocal rest
            while count:
                rest = rest if rest.size else next(values)
                part, rest = rest[:count], rest[count:]
                count -= part.size
                digest.update(part.view(np.uint8).data)
                yield part

        for index in chunks(unit, self._chunk):
            digest = hashlib.sha256()
            self._write(index, take(_count(index), digest))
            digests.append(digest.digest())
        collections.deque(values, maxlen=0)  # so that the source's last chunk is digested
        return digests


def _reader(part: Slice, chunk: Sequence[int], buffer: _Buffer) -> Callable[[Index], Iterator[np.ndarray]]:
    """Returns a function that yields a chunk's values before a cast, flat in C order, one buffer after another.

    Values are there until the next are asked for.
    """
    stored_chunk = with_expert(chunk, None if part.expert is None else 1)
    folder = chunk_folder(part.source, stored_chunk) if isinstance(part.source, ts.TensorStore) else None
    itemsize = part.source_dtype.itemsize
    size = BUFFER_BYTES // itemsize

    def from_file(folder: epath.Path, index: Index) -> Iterator[np.ndarray]:
        try:
            values = buffer.bytes[: size * itemsize].view(part.source_dtype)
            yield from read_chunk_file(folder, index, chunk, part.expert, values)
        except OSError as error:
            raise _unreadable(part.name, error) from None

    def at_once(index: Index) -> Iterator[np.ndarray]:
        values = np.ascontiguousarray(part.read_source(index)).reshape(-1)
        for start in range(0, values.size, size):
            yield values[start : start + size]

    return at_once if folder is None else functools.partial(from_file, folder)


def _count(index: Index) -> int:
    """Number of values in a range."""
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
    return UserError(f"{name}: cannot be read, missing or truncated ({first_line(error)[:160]})")
