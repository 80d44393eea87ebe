"""Token files: flat little-endian ids without a header, as OLMo writes its `.npy` files."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from flexolmo_jax.errors import UserError

_SCAN_TOKENS = 1 << 24  # searched at a time
_READ_BYTES = 1 << 22  # hashed at a time


class TokenFileWriter:
    """Writes documents to numbered token files; no document spans two files.

    Args:
      directory: where to write `tokens-00000.npy` and on.
      dtype: of the ids, little-endian.
      tokens_per_file: a new file starts when the current one has this many.
    """

    def __init__(self, directory: epath.Path, dtype: np.dtype, tokens_per_file: int):
        self._directory, self._dtype, self._tokens_per_file = directory, dtype, tokens_per_file
        self._files: list[dict[str, Any]] = []
        self._stream = None

    def append(self, ids: np.ndarray, *, ends: bool = True) -> None:
        """Writes ids [length] of a document; `ends`: they are its last, including EOS."""
        if self._stream is None:
            name = f"tokens-{len(self._files):05}.npy"
            self._files.append({"name": name, "tokens": 0})
            self._stream, self._sha256 = (self._directory / name).open("wb"), hashlib.sha256()
        data = ids.astype(self._dtype).tobytes()
        self._stream.write(data)
        self._sha256.update(data)
        self._files[-1]["tokens"] += len(ids)
        if ends and self._files[-1]["tokens"] >= self._tokens_per_file:
            self.close()

    def close(self) -> list[dict[str, Any]]:
        """Closes the current file; returns the name, number of tokens and SHA-256 of each file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._files[-1]["sha256"] = self._sha256.hexdigest()
        return self._files


def map_token_file(file: epath.Path, tokens: int, dtype: np.dtype) -> np.ndarray:
    """Memory-maps a token file, flat or with the header that `np.save` writes: `dtype` [tokens].

    Raises:
      UserError: the file is missing, or does not hold that many tokens of that type.
    """
    if not file.exists():
        raise UserError(f"{file}: missing, and corpus.json names it; copy the corpus again")
    size = file.stat().length
    if tokens and size == tokens * dtype.itemsize:
        return np.asarray(np.memmap(file, dtype, "r"))
    wanted = f"{tokens} tokens of {dtype.name}, little-endian"
    try:
        array = np.asarray(np.lib.format.open_memmap(file, mode="r"))
    except (ValueError, EOFError):  # it has no header, or less than the header says
        raise UserError(f"{file}: has {size} bytes, not {wanted}; copy the corpus again") from None
    if array.shape != (tokens,) or array.dtype != dtype:
        raise UserError(f"{file}: holds {array.dtype.str} {list(array.shape)}, not {wanted}; copy the corpus again")
    return array


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
