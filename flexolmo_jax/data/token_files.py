"""Token files: flat little-endian ids without a header, as OLMo writes its `.npy` files, and where documents end.

An index of documents is a flat file too: the offset after each document of a token file, in tokens, uint64.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from flexolmo_jax.errors import UserError

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS_DTYPE = np.dtype("<u8")
_SCAN_TOKENS = 1 << 24  # searched at a time
_WRITE_TOKENS = 1 << 20  # written at a time
_READ_BYTES = 1 << 22  # hashed at a time
_COPY_AGAIN = "copy the corpus again"


def token_dtype(vocab_size: int) -> str:
    """The dtype of the token files that this project writes: uint16 where all ids fit."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class TokenFileWriter:
    """Writes documents to numbered token files, each with an index; no document spans two files.

    Args:
      directory: where to write `NAME-00000.npy` and its index `NAME-00000.ends`, and on.
      dtype: of the ids, little-endian.
      tokens_per_file: a new file starts when the current one has this many; by default there is one file.
      name: the beginning of the names.
    """

    def __init__(self, directory: epath.Path, dtype: np.dtype, tokens_per_file: float = math.inf, name: str = "tokens"):
        self._directory, self._dtype, self._tokens_per_file, self._name = directory, dtype, tokens_per_file, name
        self._files: list[dict[str, Any]] = []
        self._streams: tuple[DigestedFile, DigestedFile] | None = None
        self._tokens = self._documents = 0  # of the current file

    def append(self, ids: np.ndarray, *, ends: bool = True) -> None:
        """Writes ids [length] of a document; `ends`: they are its last, including EOS."""
        self._write(ids, np.array([self._tokens + len(ids)] * ends))

    def extend(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Writes whole documents, as `append` would one after another.

        Args:
          tokens: their ids [tokens].
          ends: the offset after each document, ascending [documents].
        """
        start, documents = 0, 0
        while documents < len(ends):
            room = min(self._tokens_per_file - self._tokens, len(tokens))
            stop = min(int(np.searchsorted(ends, start + room)) + 1, len(ends))  # the last document may fill the file
            end = int(ends[stop - 1])
            offset = self._tokens - start
            for at in range(start, end, _WRITE_TOKENS):
                is_last = at + _WRITE_TOKENS >= end
                finished = ends[documents:stop].astype(np.int64) + offset if is_last else _NO_ENDS
                self._write(tokens[at : min(at + _WRITE_TOKENS, end)], finished)
            start, documents = end, stop

    def close(self) -> list[dict[str, Any]]:
        """Closes the current file; returns the description of each file in corpus.json."""
        if self._streams is not None:
            tokens, ends = (stream.close() for stream in self._streams)
            self._files.append(tokens | {"tokens": self._tokens, "documents": self._documents, "ends": ends})
            self._streams, self._tokens, self._documents = None, 0, 0
        return self._files

    def _write(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Writes ids, which finish the documents of these ends, to the current file."""
        if self._streams is None:
            stem = self._directory / f"{self._name}-{len(self._files):05}"
            self._streams = DigestedFile(epath.Path(f"{stem}.npy")), DigestedFile(epath.Path(f"{stem}.ends"))
        tokens_stream, ends_stream = self._streams
        tokens_stream.write(ids.astype(self._dtype))
        ends_stream.write(ends.astype(ENDS_DTYPE))
        self._tokens += len(ids)
        self._documents += len(ends)
        if len(ends) and self._tokens >= self._tokens_per_file:
            self.close()


_NO_ENDS = np.zeros(0, np.int64)


class DigestedFile:
    """A file that is being written, and its SHA-256."""

    def __init__(self, path: epath.Path):
        self._name, self._stream, self._sha256 = path.name, path.open("wb"), hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        """Appends an array's bytes."""
        data = array.tobytes()
        self._stream.write(data)
        self._sha256.update(data)

    def close(self) -> dict[str, str]:
        """Closes the file; returns its description in corpus.json."""
        self._stream.close()
        return {"name": self._name, "sha256": self._sha256.hexdigest()}


def map_token_file(file: epath.Path, tokens: int, dtype: np.dtype, remedy: str = _COPY_AGAIN) -> np.ndarray:
    """Memory-maps a token file, flat or with the header that `np.save` writes: `dtype` [tokens].

    Raises:
      UserError: the file is missing, or does not hold that many tokens of that type; `remedy` says what to do.
    """
    if not file.exists():
        raise UserError(f"{file}: missing, and corpus.json names it; {remedy}")
    size = file.stat().length
    if tokens and size == tokens * dtype.itemsize:
        return np.asarray(np.memmap(file, dtype, "r"))
    wanted = f"{tokens} tokens of {dtype.name}, little-endian"
    try:
        array = np.asarray(np.lib.format.open_memmap(file, mode="r"))
    except (ValueError, EOFError):  # it has no header, or less than the header says
        raise UserError(f"{file}: has {size} bytes, not {wanted}; {remedy}") from None
    if array.shape != (tokens,) or array.dtype != dtype:
        raise UserError(f"{file}: holds {array.dtype.str} {list(array.shape)}, not {wanted}; {remedy}")
    return array


def map_document_ends(file: epath.Path, documents: int, tokens: int) -> np.ndarray:
    """Memory-maps the index of a token file: int64 [documents], which mixes with other offsets.

    Raises:
      UserError: the file is missing, or is not the index of so many documents with so many tokens.
    """
    if not file.exists():
        raise UserError(f"{file}: missing, and corpus.json names it; {_COPY_AGAIN}")
    size = file.stat().length
    if size != documents * ENDS_DTYPE.itemsize:
        raise UserError(f"{file}: has {size} bytes, not those of {documents} ends of documents; {_COPY_AGAIN}")
    ends = np.asarray(np.memmap(file, ENDS_DTYPE, "r")).view(np.int64)
    if ends[-1] != tokens:
        raise UserError(f"{file}: its last document ends at {ends[-1]}, not at {tokens} tokens; {_COPY_AGAIN}")
    return ends


def file_digest(file: epath.Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file, in hex; `advance` is called with the number of bytes of each read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def find_document_ends(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Returns the offset after each EOS, int64 [documents]; the last is the end of the file, with or without EOS."""
    starts = range(0, len(tokens), _SCAN_TOKENS)
    chunks = [np.flatnonzero(tokens[start : start + _SCAN_TOKENS] == eos_id) + start + 1 for start in starts]
    ends = np.concatenate(chunks)
    return ends if ends.size and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def find_above(tokens: np.ndarray, limit: int) -> int | None:
    """Returns the offset of the first id above `limit`, or None."""
    for start in range(0, len(tokens), _SCAN_TOKENS):
        found = np.flatnonzero(tokens[start : start + _SCAN_TOKENS] > limit)
        if found.size:
            return start + int(found[0])
    return None
