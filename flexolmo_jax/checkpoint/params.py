"""Flat trees of arrays on disk, and how ranges of their leaves are read.

A tree is a directory in Orbax's layout (zarr3, one folder for each leaf), so `orbax.checkpoint` restores it too.
`copying` writes it in chunks of its own; any other layout that zarr3 allows is read through tensorstore.
"""

import functools
import json
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.digests import Index
from flexolmo_jax.checkpoint.files import is_system_file
from flexolmo_jax.checkpoint.zarr import (
    METADATA,
    folder_name,
    leaf_names,
    with_expert,
)
from flexolmo_jax.errors import UserError, first_line
from flexolmo_jax.paths import kvstore

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
    kvstores = {name: kvstore(path / folder_name(name)) for name in names}
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
        raise unreadable(name, error) from None


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
        if not all_finite(rounded) and all_finite(values):
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


def all_finite(values: np.ndarray) -> bool:
    """Whether no number's exponent is all ones; in bfloat16 this takes a tenth of `np.isfinite`'s time."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return True
    infinity = np.array(np.inf, values.dtype).view(f"u{values.dtype.itemsize}")
    return bool((values.view(infinity.dtype) & infinity).max() < infinity)


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


def unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: cannot be read, missing or truncated ({first_line(error)[:160]})")
