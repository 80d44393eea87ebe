"""A corpus of token files that another program wrote: they stay where they are, and no token is copied.

The files are flat ids, little-endian, with or without the header of `np.save`; every document is terminated by EOS. So
write OLMo-core and dolma (`.npy`), MaxText's olmo_grain (`.npy`), and datatrove (`.ds`).
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from flexolmo_jax.checkpoint.atomic import check_absent
from flexolmo_jax.data.corpus import MANIFEST, Corpus
from flexolmo_jax.data.corpus_writer import (
    NAMES,
    NoTextError,
    corpus_directory,
    describe_sources,
    dropped,
    finish_corpus,
)
from flexolmo_jax.data.text.bad_records import BadRecordError, BadRecords
from flexolmo_jax.data.text.documents import check_unchanged, file_state, matching_files
from flexolmo_jax.data.token_files import DTYPES, DigestedFile, token_dtype
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote
from flexolmo_jax.progress import byte_progress

SUFFIXES = (".npy", ".bin", ".ds")
_READ_BYTES = 1 << 22
_TELLING_IDS = 32  # whose zeros tell uint32 from uint16
_NUMPY = b"\x93NUMPY"


def refer_to_token_files(
    out: epath.PathLike,
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    *,
    dtype: str | None = None,
    license: str = "",
    bad_records: BadRecords | None = None,
) -> Corpus:
    """Makes a corpus directory that refers to token files, by one pass over them.

    The pass finds where documents end, compares ids with the vocabulary, and takes digests. What follows the last EOS
    of a file is a document too. Memory holds a few megabytes, and with a tokenizer that is not byte-level a document.

    Args:
      out: the directory to make.
      patterns: the token files, as in `matching_files`; their names end in one of `SUFFIXES`.
      tokenizer: made them; a copy is stored in the corpus.
      dtype: of the ids, "uint16" or "uint32"; by default uint16 where all ids of the tokenizer fit.
      license: under which the texts may be used, for corpus.json.
      bad_records: counts files that cannot be used, as wholes; by default the first one is an error.

    Raises:
      NoTextError: no file can be used.
      StoppedError: a file is empty, has an odd number of bytes, another dtype or an id outside the vocabulary, and is
        not to be skipped.
      UserError: `out` exists, or a file changes while it is read.
    """
    bad_records = bad_records or BadRecords()
    check_absent(out, MANIFEST, NAMES)
    files = [_checked_name(file, out) for file in matching_files(patterns)]
    dtype = dtype or token_dtype(tokenizer.vocab_size)
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    descriptions, sources = [], []
    total = sum(file.stat().length for file in files)
    with corpus_directory(out) as directory, byte_progress("token files", total) as advance:
        for file in files:
            ends = directory / f"tokens-{len(descriptions):05}.ends"
            try:
                description, size = _read_tokens(file, ends, DTYPES[dtype], tokenizer, advance)
            except BadRecordError as error:
                ends.unlink()
                bad_records.add(f"{file}", error)
                continue
            source = {"file": os.fspath(file), **{key: description[key] for key in ("documents", "tokens")}}
            sources.append(source | {"bytes": size})
            descriptions.append(description)
            for key in totals:
                totals[key] += sources[-1][key]
        if not descriptions:
            raise NoTextError(bad_records)
        card: dict[str, Any] = {"license": license} if license else {}
        card |= dropped(0, bad_records)
        card["sources"] = describe_sources(sources)
        finish_corpus(directory, tokenizer, totals, descriptions, card, dtype)
    return Corpus.open(out)


def _checked_name(file: epath.Path, out: epath.PathLike) -> epath.Path:
    """The absolute path of a token file.

    Raises:
      UserError: its name is not that of a token file, or a corpus in a bucket would refer to a local file.
    """
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{file}: is not named as token files are ({', '.join(SUFFIXES)}); name those alone")
    if is_remote(file):
        return file
    if is_remote(out):
        raise UserError(f"{file}: is a local file, to which a corpus in a bucket cannot refer; copy it there first")
    return epath.Path(os.path.abspath(file))


def _read_tokens(
    file: epath.Path, index: epath.Path, dtype: np.dtype, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> tuple[dict[str, Any], int]:
    """Reads a token file and writes its index; returns its description in corpus.json, and the bytes of its text."""
    state = file_state(file)
    sha256, tokens, documents, size = hashlib.sha256(), 0, 0, 0
    last_end = 0
    counter = _TextBytes(tokenizer)
    with contextlib.closing(DigestedFile(index)) as ends, file.open("rb") as stream:
        for block in _blocks(stream, dtype, sha256.update):
            _check_ids(block, tokens, tokenizer.vocab_size)
            found = np.flatnonzero(block == tokenizer.eos_id) + 1
            ends.write((found + tokens).astype("<u8"))
            size += counter.add(block, found)
            documents += len(found)
            last_end = tokens + int(found[-1]) if len(found) else last_end
            tokens += len(block)
            advance(block.nbytes)
        if not tokens:
            raise BadRecordError("is empty; leave it out", "empty file")
        if last_end != tokens:  # a document that was cut off is one nevertheless
            ends.write(np.array([tokens], "<u8"))
            documents += 1
        size += counter.finish()
        check_unchanged(file, state)
        described = {"name": os.fspath(file), "sha256": sha256.hexdigest(), "tokens": tokens, "documents": documents}
        return described | {"ends": ends.close()}, size


def _blocks(stream: IO[bytes], dtype: np.dtype, digest: Callable[[bytes], object]) -> Iterator[np.ndarray]:
    """Yields the ids of a token file after its header, if it has one; all bytes go to `digest`."""
    head = stream.read(_READ_BYTES)
    digest(head)
    begin = _header_length(head, dtype) if head.startswith(_NUMPY) else 0
    rest, offset, is_first = head[begin:], begin, True
    while rest or is_first:
        if len(rest) % dtype.itemsize:
            rest += (more := stream.read(dtype.itemsize - len(rest) % dtype.itemsize))
            digest(more)
            if len(rest) % dtype.itemsize:
                raise BadRecordError(
                    f"has {offset + len(rest)} bytes, which is no whole number of ids of {dtype.name}; "
                    "copy it again, or give another dtype",
                    "damaged file",
                )
        block = np.frombuffer(rest, dtype)
        if is_first and dtype.itemsize == 2 and len(block) >= _TELLING_IDS and not block[1::2].any():
            raise BadRecordError("every second id is 0, so its ids are uint32; give dtype=uint32", "another dtype")
        offset, is_first = offset + len(rest), False
        yield block
        rest = stream.read(_READ_BYTES)
        digest(rest)


def _header_length(head: bytes, dtype: np.dtype) -> int:
    """The length of the header of np.save; refuses one of another dtype or shape."""
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read(stream)
    except ValueError as error:
        raise BadRecordError(f"its header cannot be read ({error}); copy it again", "damaged file") from error
    if len(shape) != 1 or found != dtype:
        problem = f"holds {found.str} {list(shape)}, not {dtype.name} [tokens]; give its dtype"
        raise BadRecordError(problem, "another dtype")
    return stream.tell()


def _check_ids(ids: np.ndarray, before: int, vocab_size: int) -> None:
    if len(ids) and ids.max() >= vocab_size:
        place = int(np.argmax(ids >= vocab_size))
        raise BadRecordError(
            f"the id {ids[place]} at offset {before + place} (in tokens) is outside the vocabulary of "
            f"{vocab_size}; name the tokenizer and the dtype that it was written with",
            "another vocabulary",
        )


class _TextBytes:
    """Counts the UTF-8 bytes of the text of documents, which come in blocks."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._begun = tokenizer, []

    def add(self, block: np.ndarray, ends: np.ndarray) -> int:
        """The bytes of the documents of a block up to the last that ends in it, or of the whole block."""
        if self._tokenizer.is_byte_level:
            return self._tokenizer.count_bytes(block)
        size = 0
        for start, end in zip([0, *ends[:-1]], ends, strict=False):
            size += self._tokenizer.count_bytes(np.concatenate([*self._begun, block[start : end - 1]]))
            self._begun = []
        self._begun.append(block[ends[-1] if len(ends) else 0 :])
        return size

    def finish(self) -> int:
        """The bytes of a document without EOS at the end of a file."""
        begun, self._begun = self._begun, []
        return self._tokenizer.count_bytes(np.concatenate(begun)) if begun else 0
