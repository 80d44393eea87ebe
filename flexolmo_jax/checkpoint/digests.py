"""Digests of leaves, of sets of leaves, and of JSON documents, all of them SHA-256 (docs/formats.md).

A leaf is digested by chunks, so that several threads or hosts can each digest and write a part of it.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

CHUNK_BYTES = 2**24  # a chunk of a leaf, at most
Index = tuple[slice, ...]


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Shape of the chunks in which a leaf is stored and digested.

    Leading axes are split until a chunk has at most `CHUNK_BYTES`. Edges along a split axis are powers of two. The last
    split axis apart, they are 1, so that a chunk is a range of the leaf in C order; the chunks of a narrower dtype are
    unions of those of a wider one.
    """
    chunk, size = list(shape), itemsize * math.prod(shape)
    for axis, length in enumerate(shape):
        if size <= CHUNK_BYTES:
            break
        step = size // length
        chunk[axis] = 1 << max(0, (CHUNK_BYTES // step).bit_length() - 1)
        size = step * chunk[axis]
    return tuple(chunk)


def chunks(within: Index, chunk: Sequence[int]) -> Iterator[Index]:
    """Chunks of a range, in C order; the range starts at a chunk, and the last along an axis may be shorter."""
    grid = [-(-(at.stop - at.start) // step) for at, step in zip(within, chunk, strict=True)]
    for place in np.ndindex(*grid):
        starts = (at.start + i * step for i, at, step in zip(place, within, chunk, strict=True))
        yield tuple(
            slice(start, min(start + step, at.stop)) for start, at, step in zip(starts, within, chunk, strict=True)
        )


def whole(shape: Sequence[int]) -> Index:
    """The range of a whole leaf."""
    return tuple(slice(0, length) for length in shape)


def leaf_digest(name: str, dtype: np.dtype, shape: Sequence[int], chunk_digests: Iterable[bytes]) -> str:
    """Digest of a leaf.

    Args:
      name: an expert's leaf has the same name in its contribution and in every model.
      dtype: of its values.
      shape: without the axis of experts.
      chunk_digests: SHA-256 of the little-endian bytes of each chunk (`chunk_shape`), in C order.
    """
    dtype = np.dtype(dtype)
    header = json.dumps([name, dtype.name, list(shape), list(chunk_shape(shape, dtype.itemsize))])
    return hashlib.sha256(header.encode() + b"\n" + b"".join(chunk_digests)).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """Digest of a set of {name: digest}, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def document_digest(document: Mapping[str, Any]) -> str:
    """Digest of a JSON document in canonical form, its key "digest" left out.

    Canonical: keys sorted, no spaces, other characters than ASCII escaped, numbers as Python writes them.

    Raises:
      ValueError: it holds a number that JSON does not know.
    """
    content = {key: value for key, value in document.items() if key != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
