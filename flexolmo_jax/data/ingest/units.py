"""Units of tokenizing: input files that one process tokenizes together, and what it writes of them.

A finished unit is a record `KEY.unit`, JSON, beside token files `KEY.SPLIT-00000.npy` and their indices. The key is a
digest of the names, sizes and times of the input files, so that a file that changed is tokenized again.

Processes import this module, so it imports no JAX.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flexolmo_jax.data.ingest.splits import Splits
from flexolmo_jax.data.ingest.worker_pool import Advance
from flexolmo_jax.data.text.bad_records import BadRecords, StoppedError
from flexolmo_jax.data.text.documents import AUTO, ByteRange, FileState, file_state, line_ranges, read_file
from flexolmo_jax.data.text.sources import SOURCES, Source
from flexolmo_jax.data.token_files import DTYPES, TokenFileWriter, token_dtype
from flexolmo_jax.data.tokenization.encoding import encode_documents
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, load_tokenizer

_UNIT_BYTES = 1 << 24  # small files are put together until they have this many
_RANGE_BYTES = 1 << 26  # large files of lines are divided into units of this many
RECORD_SUFFIX = ".unit"
WHOLE = "all"  # the name of the split where there are none


class Input(NamedTuple):
    """An input file, or a range of it.

    Attributes:
      file: its path.
      state: its state; None: a pipe.
      within: what is read of it; None: all.
    """

    file: str
    state: FileState | None
    within: ByteRange | None = None

    @property
    def size(self) -> int:
        """Number of bytes."""
        if self.within:
            return self.within.stop - self.within.start
        return self.state.size if self.state else 0


@dataclasses.dataclass(frozen=True)
class Unit:
    """Input files that are tokenized together, in order, or a range of one."""

    inputs: tuple[Input, ...]

    @property
    def size(self) -> int:
        """Number of bytes of the files."""
        return sum(entry.size for entry in self.inputs)

    @property
    def pipes(self) -> list[str]:
        """The files that can be read only once."""
        return [entry.file for entry in self.inputs if entry.state is None]

    @functools.cached_property
    def key(self) -> str:
        """The beginning of the names of what is written of it."""
        return hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest()[:24]

    @property
    def record(self) -> str:
        """The name of its record."""
        return f"{self.key}{RECORD_SUFFIX}"


def plan_units(files: Sequence[epath.Path], format: str = AUTO) -> list[Unit]:
    """Divides input files into units, in order.

    A file of 16 MiB or more is one of its own, or several of some 64 MiB, if `format` has lines.
    """
    groups: list[list[Input]] = []
    size = _UNIT_BYTES  # of the last group
    for file in files:
        state = file_state(file)
        for within in line_ranges(file, state, format, _RANGE_BYTES):
            entry = Input(os.fspath(file), state, within)
            if not groups or size + entry.size > _UNIT_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += entry.size
    return [Unit(tuple(group)) for group in groups]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the tokens of a unit depend on, besides the files.

    Attributes:
      tokenizer: path of its tokenizer.json.
      tokenizer_digest: of that tokenizer.
      eos_id: the id that terminates documents.
      label: the tokenizer's name in errors.
      text_key: as in `read_file`.
      format: as in `read_file`.
      skip: whether bad records are skipped.
      splits: which documents go where; None: all to one place.
      sources: the formats that there are, for those of other packages.
    """

    tokenizer: str
    tokenizer_digest: str
    eos_id: int
    label: str
    text_key: str
    format: str
    skip: bool
    splits: Splits | None
    sources: dict[str, Source] = dataclasses.field(default_factory=lambda: dict(SOURCES))

    @property
    def split_names(self) -> list[str]:
        """Names of the splits."""
        return list(self.splits.shares) if self.splits else [WHOLE]

    def description(self) -> dict[str, Any]:
        """Those that must not change while a work directory is used. Whether bad records are skipped may."""
        return {
            "tokenizer": self.tokenizer_digest,
            "eos_id": self.eos_id,
            "text_key": self.text_key,
            "format": self.format,
            "split": self.splits and {"shares": self.splits.shares, "key": self.splits.key},
        }


def tokenize_unit(unit: Unit, advance: Advance, settings: Settings, directory: str) -> dict[str, Any]:
    """Tokenizes the files of a unit into a directory, and writes its record last.

    Args:
      unit: the files.
      advance: called with numbers of bytes that were read.
      settings: how.
      directory: where to write; local.

    Returns:
      The record: of each split, descriptions of its token "files", and its "documents", "tokens" and "bytes" of each
      input; "empty", the number of documents without a token; "unknown", that of tokens for unknown text;
      "bad_records".

    Raises:
      StoppedError: a record has no usable text; it has the numbers of documents and tokens before.
      UserError: a file cannot be read, or changes.
    """
    SOURCES.update(settings.sources)
    tokenizer = _load(settings.tokenizer, settings.tokenizer_digest, settings.eos_id, settings.label)
    bad_records, names, read = BadRecords(settings.skip), settings.split_names, 0

    def documents() -> Iterator[tuple[str, tuple[int, int]]]:
        nonlocal read
        options: dict[str, Any] = {"text_key": settings.text_key, "format": settings.format, "check": tokenizer.check}
        options |= {"bad_records": bad_records, "advance": advance}
        for place, (file, state, within) in enumerate(unit.inputs):
            for text in read_file(epath.Path(file), state=state, within=within, **options):
                advance(0)
                read += 1
                yield text, (settings.splits.index(text) if settings.splits else 0, place)

    counts = np.zeros((len(names), len(unit.inputs), 3), np.int64)  # documents, tokens, bytes
    unknown, unknown_id = 0, tokenizer.unknown_id
    dtype = DTYPES[token_dtype(tokenizer.vocab_size)]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(contextlib.closing(TokenFileWriter(epath.Path(directory), dtype, name=stem)))
            for stem in (f"{unit.key}.{name}" for name in names)
        ]
        try:
            for ids, size, ends, label in encode_documents(documents(), tokenizer):
                writers[label[0]].append(ids, ends=ends)
                counts[label] += (ends, ids.size, size)
                if unknown_id is not None:
                    unknown += int(np.count_nonzero(ids == unknown_id))
        except StoppedError as error:
            error.documents, error.tokens = map(int, counts.sum((0, 1))[:2])
            raise
        files = [writer.close() for writer in writers]
    splits = {
        name: {"files": files[i], **dict(zip(("documents", "tokens", "bytes"), counts[i].T.tolist(), strict=True))}
        for i, name in enumerate(names)
    }
    record = {
        "splits": splits,
        "empty": read - int(counts[..., 0].sum()),
        "unknown": unknown,
        "bad_records": bad_records.description(),
    }
    _store(directory, unit.record, record)
    return record


@functools.lru_cache(maxsize=1)
def _load(tokenizer: str, digest: str, eos_id: int, label: str) -> Tokenizer:
    """Loads a tokenizer once; the digest tells it from another that had the same path."""
    return load_tokenizer(tokenizer, eos_id=eos_id, label=label)


def _store(directory: str, name: str, record: dict[str, Any]) -> None:
    """Writes the record of a unit, when all else of it is on disk."""
    for token_file in (token_file for split in record["splits"].values() for token_file in split["files"]):
        _sync(os.path.join(directory, token_file["name"]))
        _sync(os.path.join(directory, token_file["ends"]["name"]))
    file = os.path.join(directory, name)
    with open(f"{file}.incomplete", "w") as stream:
        json.dump(record, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{file}.incomplete", file)


def _sync(file: str) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
