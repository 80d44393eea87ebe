"""How a tree of arrays lies on disk: in Orbax's layout, zarr3 with a folder for each leaf, a file for each chunk."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from flexolmo_jax.checkpoint.digests import Index
from flexolmo_jax.checkpoint.files import FILE, Content, Names

METADATA = "_METADATA"
LEAF_METADATA = "zarr.json"


class TreeWriter:
    """Makes a tree: `create` each leaf, write its chunks, then `finish`."""

    def __init__(self, path: epath.PathLike, makes: bool = True):
        """Starts a tree in `path`, which must not exist.

        Args:
          path: directory to make.
          makes: whether to make folders and metadata; one of the processes that write a tree together does.
        """
        self._path, self._makes = epath.Path(path), makes
        if makes:
            self._path.mkdir(parents=True)
        self._shapes: dict[str, Sequence[int]] = {}
        self._chunks: dict[str, tuple[Sequence[int], int]] = {}

    def create(
        self, name: str, shape: Sequence[int], dtype: np.dtype, chunk: Sequence[int], experts: int | None
    ) -> None:
        """Makes an array to be filled in units of `chunk`, with a new axis 1 of that many `experts` unless None."""
        self._shapes[name] = with_expert(shape, experts)
        self._chunks[name] = chunk, math.prod(chunk) * np.dtype(dtype).itemsize
        stored_chunk = with_expert(chunk, None if experts is None else 1)
        folder = self._path / folder_name(name)
        if self._makes:
            folder.mkdir()
            (folder / LEAF_METADATA).write_text(json.dumps(_metadata(self._shapes[name], dtype, stored_chunk)))

    def write(self, name: str, expert: int | None, index: Index, values: Iterable[np.ndarray]) -> None:
        """Writes one chunk; zeros fill it up where the array ends within it.

        Args:
          name: the leaf.
          expert: position on the expert axis, or None when there is no such axis.
          index: the chunk's range, without the expert axis.
          values: its values, flat in C order, in consecutive arrays.
        """
        chunk, padding = self._chunks[name]
        path = self._path / folder_name(name) / _file_name(index, chunk, expert)
        with path.open("wb") as file:
            for part in values:
                padding -= file.write(part.view(np.uint8))
            file.write(bytes(padding))

    def finish(self) -> None:
        """Writes the index that makes the directory an Orbax checkpoint."""
        if not self._makes:
            return
        entries = {}
        for name, shape in sorted(self._shapes.items()):
            keys = name.split("/")
            entries[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(shape)},
            }
        metadata = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._path / METADATA).write_text(json.dumps(metadata))


def leaf_names(index: Any) -> list[str]:
    """The leaves that a tree's index names.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: it is no index, or holds a name that could lead out of the tree.
    """
    names = []
    for entry in index["tree_metadata"].values():
        keys = [key["key"] for key in entry["key_metadata"]]
        if not keys or not all(re.fullmatch(r"\w[\w.-]*", key, re.ASCII) for key in keys):
            raise ValueError(f"a leaf named {keys}")
        names.append("/".join(keys))
    return names


def folder_name(leaf: str) -> str:
    """The name of a leaf's folder."""
    return leaf.replace("/", ".")


def tree_content(folder: epath.Path) -> Names | None:
    """What the folder of a tree holds (`files.Content`): the index, and a folder for each leaf that it names."""
    try:
        names = leaf_names(json.loads((folder / METADATA).read_text()))
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
        return None
    content: dict[str, Content] = {METADATA: FILE, **{folder_name(name): _leaf_content for name in names}}
    return content


def _leaf_content(folder: epath.Path) -> Names | None:
    try:
        document = json.loads((folder / LEAF_METADATA).read_text())
        lengths = zip(document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"], strict=True)
        return _Chunks([-(-int(length) // int(chunk)) for length, chunk in lengths])
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None


class _Chunks:
    """What the folder of a leaf holds: its metadata, and a file for each chunk of a grid."""

    def __init__(self, grid: Sequence[int]):
        self._grid = grid

    def get(self, name: str, /) -> Content | None:
        prefix, *place = name.split(".")
        # str(int): a chunk has one name.
        numbers = [int(part) for part in place if part.isascii() and part.isdigit() and part == str(int(part))]
        is_chunk = prefix == "c" and len(numbers) == len(place) == len(self._grid)
        inside = is_chunk and all(number < length for number, length in zip(numbers, self._grid, strict=True))
        return FILE if inside or name == LEAF_METADATA else None


def with_expert(axes: Sequence[Any], expert: Any) -> tuple[Any, ...]:
    """Inserts what stands for the expert axis, axis 1; nothing where it is None."""
    return tuple(axes) if expert is None else (*axes[:1], expert, *axes[1:])


def chunk_folder(leaf: ts.TensorStore, chunk: Sequence[int]) -> epath.Path | None:
    """The local folder of a leaf whose chunks of that shape are files of their bytes, or None if they are not."""
    spec = leaf.spec().to_json()
    plain = spec["metadata"] == _metadata(leaf.shape, leaf.dtype.numpy_dtype, chunk)
    return epath.Path(spec["kvstore"]["path"]) if plain and spec["kvstore"]["driver"] == "file" else None


def read_chunk_file(
    folder: epath.Path, index: Index, chunk: Sequence[int], expert: int | None, buffer: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the values of a chunk that `TreeWriter.write` wrote, each time as many as fit, in the buffer.

    Args:
      folder: of the leaf.
      index: the chunk's range, without the expert axis.
      chunk: shape of the leaf's chunks, without the expert axis.
      expert: position on the expert axis, or None when there is no such axis.
      buffer: one axis, of the leaf's dtype.

    Raises:
      OSError: the file is missing, or not of a chunk's size.
    """
    path = folder / _file_name(index, chunk, expert)
    count = math.prod(at.stop - at.start for at in index)
    with path.open("rb") as file:
        size, expected = os.fstat(file.fileno()).st_size, math.prod(chunk) * buffer.itemsize
        if size != expected:
            raise OSError(f"{path} holds {size} bytes, not {expected}")
        for start in range(0, count, buffer.size):
            values = buffer[: count - start]
            if file.readinto(values.view(np.uint8)) != values.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
                raise OSError(f"{path} became shorter")
            yield values


def _metadata(shape: Sequence[int], dtype: np.dtype, chunk: Sequence[int]) -> dict[str, Any]:
    """A leaf's zarr3 metadata."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": np.dtype(dtype).name,
        "shape": list(shape),
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # All in one folder: a folder for each index, the default, can take longer to make than its file to write.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


def _file_name(index: Index, chunk: Sequence[int], expert: int | None) -> str:
    place = (at.start // step for at, step in zip(index, chunk, strict=True))
    return ".".join(map(str, ("c", *with_expert(tuple(place), expert))))
