"""Copies leaves chunk by chunk: read once, checked, digested and written by several threads, and by several processes.

Chunks are copied directly, in few bytes at a time: never is a whole leaf in memory. Of several processes each writes
its share of the chunks into the same directory, and all learn the digests of the others' chunks.
"""

import collections
import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax import distributed
from flexolmo_jax.checkpoint.digests import Index, chunk_shape, chunks, leaf_digest, whole
from flexolmo_jax.checkpoint.params import COPY_THREADS, Slice, all_finite, unreadable
from flexolmo_jax.checkpoint.sharded import Held, is_held_elsewhere
from flexolmo_jax.checkpoint.zarr import TreeWriter, chunk_folder, read_chunk_file, with_expert
from flexolmo_jax.errors import UserError

# What is read, checked, digested and written at a time: little enough to stay in a core's cache from first to last.
BUFFER_BYTES = 2**19


def write_tree(
    path: epath.PathLike,
    leaves: Mapping[str, Slice | Sequence[Slice]],
    digest_name: Callable[[str], str],
    advance: Callable[[int], None] = lambda size: None,
) -> dict[str, str | list[str]]:
    """Writes a tree; threads copy its chunks, each holding a small buffer, whatever the leaves' sizes and number.

    From a source that is not stored in the chunks written here, a thread reads and holds whole chunks. Of several
    processes each writes its share of the chunks; of a leaf that is sharded over them it holds that share.

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
    leaves = dict(sorted(leaves.items()))  # all processes in the same order
    writer = TreeWriter(path, makes=distributed.is_primary())
    slices = {leaf: [content] if isinstance(content, Slice) else list(content) for leaf, content in leaves.items()}
    with distributed.agreed(f"folders of {epath.Path(path).name}"):
        for leaf, parts in slices.items():
            chunk = chunk_shape(parts[0].shape, parts[0].dtype.itemsize)
            experts = None if isinstance(leaves[leaf], Slice) else len(parts)
            writer.create(leaf, parts[0].shape, parts[0].dtype, chunk, experts)
    jobs: dict[str, list[_Copy]] = {}
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        buffer = _Buffer()
        for leaf, parts in slices.items():
            jobs[leaf] = []
            for i, part in enumerate(parts):
                write = functools.partial(writer.write, leaf, None if isinstance(leaves[leaf], Slice) else i)
                jobs[leaf].append(_Copy(pool, part, digest_name(leaf), buffer, advance, write, is_shared=True))
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
    (`digests.chunk_shape`); a thread takes the larger one at a time. Where `is_shared`, processes take turns with
    these; what only process 0 has, such as statistics, it copies alone.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        part: Slice,
        digest_name: str,
        buffer: _Buffer,
        advance: Callable[[int], None],
        write: Callable[[Index, Iterable[np.ndarray]], None] = _skip,
        is_shared: bool = False,
    ):
        self._part, self._digest_name, self._buffer, self._advance, self._write = (
            *(part, digest_name, buffer),
            *(advance, write),
        )
        self._is_shared = is_shared and distributed.count() > 1
        self._source_chunk = chunk_shape(part.shape, part.source_dtype.itemsize)
        self._chunk = chunk_shape(part.shape, part.dtype.itemsize)
        larger = tuple(map(max, self._source_chunk, self._chunk))
        units = self._share(list(chunks(whole(part.shape), larger)))
        self._read = _reader(self._part, self._source_chunk, buffer)
        parallel = isinstance(self._part.source, ts.TensorStore | np.ndarray | jax.Array | Held)
        groups = [[unit] for unit in units] if parallel or not units else [units]
        self._jobs: list[Future] = [pool.submit(lambda group: [*map(self._copy, group)], group) for group in groups]

    def digest(self) -> str:
        """Waits until the leaf is copied, and returns its digest; raises UserError as `write_tree` does."""
        part, results = self._part, self._results()
        source, written = (itertools.chain.from_iterable(column) for column in zip(*results, strict=True))
        digest = leaf_digest(self._digest_name, part.dtype, part.shape, written)
        if part.digest is not None:
            cast = part.cast is not None
            before = leaf_digest(self._digest_name, part.source_dtype, part.shape, source) if cast else digest
            check_digest(part.name, before, part.digest)
        return digest

    def _share(self, units: list[Index]) -> list[Index]:
        """The units that this process copies; of a leaf that others hold, they are fetched first."""
        if not self._is_shared:
            return units
        part, is_held_by_all = self._part, isinstance(self._part.source, ts.TensorStore | jax.Array)
        owners = [i % distributed.count() if is_held_by_all else 0 for i in range(len(units))]
        is_mine = [owner == distributed.index() for owner in owners]
        if is_held_elsewhere(part.source):
            at = None if part.expert is None else slice(part.expert, part.expert + 1)
            ranges = [(with_expert(unit, at), mine) for unit, mine in zip(units, is_mine, strict=True)]
            self._part = part._replace(source=Held(part.source, ranges))
        elif isinstance(part.source, jax.Array):
            self._part = part._replace(source=part.source.addressable_data(0))
        return list(itertools.compress(units, is_mine))

    def _results(self) -> list[tuple[list[bytes], list[bytes]]]:
        """What `_copy` returned for every unit, in their order, whichever process copied it."""
        if not self._is_shared:
            return [result for job in self._jobs for result in job.result()]
        with distributed.agreed(self._digest_name):
            mine = [result for job in self._jobs for result in job.result()]
        answers = distributed.gather(self._digest_name, [[[x.hex() for x in of] for of in result] for result in mine])
        in_turns = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*answers)))
        return [([*map(bytes.fromhex, before)], [*map(bytes.fromhex, after)]) for before, after in in_turns]

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
                if not all_finite(values):
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
            raise unreadable(part.name, error) from None

    def at_once(index: Index) -> Iterator[np.ndarray]:
        values = np.ascontiguousarray(part.read_source(index)).reshape(-1)
        for start in range(0, values.size, size):
            yield values[start : start + size]

    return at_once if folder is None else functools.partial(from_file, folder)


def _count(index: Index) -> int:
    """Number of values in a range."""
    return math.prod(at.stop - at.start for at in index)
