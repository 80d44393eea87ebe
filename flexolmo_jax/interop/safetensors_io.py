"""Safetensors files, read and written one tensor at a time.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The library of the
format checks files and headers; tensors are read at their offsets rather than mapped, so that what was read does not
stay in memory, and written as they come, where the library wants all tensors of a file at once.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from flexolmo_jax.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK_BYTES = 16 * 2**20


class Stored(NamedTuple):
    """A tensor, or a range of one along its first axis, in a file.

    Attributes:
      file: the file.
      dtype: float32, bfloat16 or float16.
      shape: of the tensor.
      offset: of its first byte in the file.
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Reads it; raises UserError where the file has become too short."""
        count = math.prod(self.shape)
        values = np.fromfile(self.file, self.dtype, count, offset=self.offset)
        if len(values) < count:
            raise UserError(f"{self.file}: truncated; copy it again from its source")
        return values.reshape(self.shape)

    def range(self, start: int, stop: int) -> "Stored":
        """A range along the first axis."""
        item_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._replace(shape=(stop - start, *self.shape[1:]), offset=self.offset + start * item_bytes)

    def item(self, i: int) -> "Stored":
        """The tensor at index i of the first axis."""
        return self.range(i, i + 1)._replace(shape=self.shape[1:])


def open_tensors(directory: pathlib.Path) -> dict[str, Stored]:
    """Finds every tensor of a Hugging Face directory, {name: where it is stored}; reads the headers only.

    Raises:
      UserError: no weights, a damaged, missing or truncated file, an index that names files elsewhere than beside it
        or does not agree with them, or a dtype other than float32, bfloat16 and float16.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        if not (directory / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{directory}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}, the only weights read here; "
                "save the model again with transformers"
            )
        return _read_header(directory / WEIGHTS_FILE)
    weight_map = _read_index(index)
    for name in sorted(set(weight_map.values())):
        # What is checked is the name: the shards may be links, as they are in the cache of Hugging Face.
        if name == ".." or pathlib.PurePath(name).name != name:
            raise UserError(f"{index}: names {name!r}, no file beside it; put the shard there and name it alone")
        if not (directory / name).is_file():
            raise UserError(f"{index}: names {name}, which is missing; copy the directory again from its source")
    found = {}
    for name in sorted(set(weight_map.values())):
        for tensor, stored in _read_header(directory / name).items():
            if weight_map.get(tensor) != name:
                raise UserError(f"{directory / name}: holds {tensor}, which {INDEX_FILE} does not place there")
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise UserError(f"{directory / name}: lacks {tensor}, which {INDEX_FILE} places there")
    return found


def write_tensors(
    directory: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Callable[[str], np.ndarray],
    shard_bytes: int,
    advance: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Writes tensors into one file, or into shards and their index, holding one tensor at a time.

    Args:
      directory: where to.
      tensors: {name: (shape, dtype)} in the order in which they are to be written.
      values: name -> the tensor.
      shard_bytes: of tensors in a file at most; a bigger tensor gets a file of its own.
      advance: called with the number of bytes written, as they are.

    Returns:
      The names of the files, without the index.
    """
    shards: list[dict[str, int]] = []
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    stem, suffix = WEIGHTS_FILE.split(".", 1)
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    files = [WEIGHTS_FILE] if len(shards) == 1 else files
    for file, sizes in zip(files, shards, strict=True):
        _write_file(directory / file, {name: tensors[name] for name in sizes}, values, advance)
    if len(files) > 1:
        total = sum(sum(sizes.values()) for sizes in shards)
        weight_map = {name: file for file, sizes in zip(files, shards, strict=True) for name in sizes}
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n")
    return files


def chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values in C order, as contiguous chunks of a bounded size: a transposed matrix is not copied whole."""
    values = values.reshape(1) if values.ndim == 0 else values
    step = max(1, CHUNK_BYTES * len(values) // max(1, values.nbytes))
    for start in range(0, len(values), step):
        yield np.ascontiguousarray(values[start : start + step])


def _write_file(file, tensors, values, advance) -> None:
    # Wide dtypes first, so that every tensor is aligned to its items.
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in chunks(values(name)):
                out.write(chunk.view(np.uint8).data)
                advance(chunk.nbytes)


def _read_index(index: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not weight_map or not all(isinstance(name, str) and name for name in weight_map.values()):
            raise TypeError("weight_map does not name a file for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error!r}); copy it again from its source") from None
    return weight_map


def _read_header(file: pathlib.Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "np"):  # checks the header, and that it and the file's size agree
            pass
    except SafetensorError as error:
        raise UserError(f"{file}: truncated, or no safetensors file ({error}); copy it again from its source") from None
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is {entry['dtype']}; convert the model to one of {', '.join(DTYPES)}")
        offset = 8 + length + entry["data_offsets"][0]
        found[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)
    return found
