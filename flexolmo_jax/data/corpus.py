"""A corpus: a directory of documents as token ids.

- `corpus.json`: format version, tokenizer digest, eos_id, dtype, totals, files; and the number and the first hundred
  of the bad records that were skipped. It is written last: a directory without it is incomplete.
- `tokenizer.json`: the tokenizer that made it.
- `tokens-00000.npy`, `tokens-00001.npy`, ... (see `token_files`): the documents, each terminated by EOS. No document
  spans two files.
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath
from rich.progress import SpinnerColumn, TimeElapsedColumn

from flexolmo_jax.checkpoint.atomic import atomic_directory, commit
from flexolmo_jax.checkpoint.digests import combined_digest
from flexolmo_jax.data.bad_records import BadRecords, StoppedError
from flexolmo_jax.data.local_copies import local_copy
from flexolmo_jax.data.token_files import TokenFileWriter, file_digest, find_above, find_document_ends, map_token_file
from flexolmo_jax.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote
from flexolmo_jax.progress import byte_progress, progress_bar

T = TypeVar("T")
FORMAT_VERSION = 1
_MANIFEST, _TOKENIZER, _TOKENS = "corpus.json", "tokenizer.json", "tokens-*.npy"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_TOKENS_PER_FILE = 1 << 28
_SCAN_TOKENS = 1 << 24
_BATCH_CHUNKS = 1024
_BATCH_BYTES = 1 << 20  # of text; `tokenizers` needs about 100 times as many


class NoTextError(UserError):
    """There is no document with text to make a corpus of.

    Attributes:
      problem: the message without its subject.
    """

    def __init__(self, bad_records: BadRecords | None):
        """Mentions the first bad record, if any."""
        if bad_records and bad_records.count:
            self.problem = f"holds no usable text; bad records: {bad_records.count:,}, {bad_records.first()}"
        else:
            self.problem = "holds no text; name files with at least one document that is not empty"
        super().__init__(f"the input {self.problem}")


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus directory, local or remote, memory-mapped: a random-access sequence of documents.

    `corpus[i]` is document i, EOS included: a read-only array of `dtype` [length]. The first access finds the ends of
    documents by one pass over the tokens, and keeps 8 bytes per document. Ids are not checked: callers compare them
    with `vocab_size`, and call `refuse_ids` for the error.

    Attributes:
      path: the directory.
      documents: number of documents.
      tokens: number of tokens, EOS included.
      bytes: number of UTF-8 bytes of the documents' text. In a copy of documents of another corpus it is that of the
        decoded tokens, which differs where the tokenizer loses information (letter case, unknown text).
      eos_id: the id that terminates each document.
      dtype: of the token files.
      tokenizer_digest: `Tokenizer.digest` of the tokenizer that made it.
      files: of each token file, its name, number of tokens and SHA-256.
    """

    path: epath.Path
    documents: int
    tokens: int
    bytes: int
    eos_id: int
    dtype: np.dtype
    tokenizer_digest: str
    files: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, path: epath.PathLike) -> "Corpus":
        """Opens a corpus directory. Of a remote one (`gs://`, `s3://`) the token files are copied, `local_copies`.

        Raises:
          UserError: it is not a corpus, or of another format version, or a token file is missing or truncated.
        """
        path = epath.Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; `flexolmo tokenize` makes a corpus")
        corpus = cls(path=path, **_read_description(path / _MANIFEST))
        corpus._arrays  # noqa: B018  maps the files, so that a missing one is an error now
        return corpus

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        file = bisect.bisect_right(self._first_documents, index) - 1
        ends = self._document_ends[file]
        place = index - self._first_documents[file]
        return self._arrays[file][ends[place - 1] if place else 0 : ends[place]]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from one offset to another, counted over all files one after another: `dtype` [stop - start].

        Within a file it is a view of it, which reads nothing yet.
        """
        slices = [array[first:last] for array, _, first, last in self._slices(self._arrays, start, stop)]
        return slices[0] if len(slices) == 1 else np.concatenate(slices or [np.empty(0, self.dtype)])

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Offsets, counted as by `read`, after the EOS of documents: above `start` and up to `stop`, int64 [documents].

        No token is read but for the first call, as by `corpus[i]`.
        """
        found = [np.empty(0, np.int64)]
        for ends, offset, first, last in self._slices(self._document_ends, start, stop):
            found.append(ends[slice(*np.searchsorted(ends, (first, last), "right"))] + offset)
        return np.concatenate(found)

    def file_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets, counted as by `read`, at which a file begins: from `start` on and below `stop`, int64 [files]."""
        first, last = (bisect.bisect_left(self._first_tokens, offset) for offset in (start, stop))
        return np.array(self._first_tokens[first:last], np.int64)

    def _slices(self, of_files: Sequence[T], start: int, stop: int) -> Iterator[tuple[T, int, int, int]]:
        """Yields, for each file with tokens in the range: what belongs to it, its offset, first token and end in it."""
        file = bisect.bisect_right(self._first_tokens, start) - 1
        while start < stop:
            offset, size = self._first_tokens[file], self.files[file]["tokens"]
            yield of_files[file], offset, start - offset, min(stop - offset, size)
            start, file = offset + size, file + 1

    @functools.cached_property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer that made the corpus; all ids are below it."""
        return self.tokenizer().vocab_size

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the content, which does not depend on the path."""
        files = {str(i): file["sha256"] for i, file in enumerate(self.files)}
        return combined_digest({"dtype": self.dtype.name, "eos_id": str(self.eos_id), **files})

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made this corpus, with the EOS it was made with.

        Raises:
          UserError: `tokenizer.json` is missing or is not the one that `corpus.json` names.
        """
        file = self.path / _TOKENIZER
        tokenizer = load_tokenizer(file, eos_id=self.eos_id)
        if tokenizer.digest != self.tokenizer_digest:
            raise UserError(f"{file}: did not make this corpus; tokenize the text again")
        return tokenizer

    def verify(self) -> None:
        """Reads every token file and compares its SHA-256.

        Raises:
          UserError: a file's content is not what `corpus.json` says.
        """
        verify_corpora([self])

    def refuse_ids(self) -> None:
        """Looks for the first id outside the vocabulary, in one pass over the tokens.

        Raises:
          UserError: there is one; the message has its file and offset.
        """
        for file, array in zip(self.files, self._arrays, strict=True):
            at = find_above(array, self.vocab_size - 1)
            if at is not None:
                raise UserError(
                    f"{self.path / file['name']}: damaged: the id {array[at]} at offset {at} (in tokens) is outside "
                    f"the vocabulary of {self.vocab_size}; copy the corpus again"
                )

    @functools.cached_property
    def local_files(self) -> list[epath.Path]:
        """The token files, or the local copies of remote ones."""
        files = {self.path / file["name"]: file["sha256"] for file in self.files}
        if not is_remote(self.path):
            return [*files]
        total = sum(file["tokens"] for file in self.files) * self.dtype.itemsize
        with byte_progress(f"copy of {self.path}", total) as advance:
            return [local_copy(file, digest, advance) for file, digest in files.items()]

    @functools.cached_property
    def _arrays(self) -> list[np.ndarray]:
        files = zip(self.local_files, self.files, strict=True)
        return [map_token_file(file, described["tokens"], self.dtype) for file, described in files]

    @functools.cached_property
    def _document_ends(self) -> list[np.ndarray]:
        """Of each file, the offset after each document's EOS, int64 [documents of the file]."""
        ends = [find_document_ends(array, self.eos_id) for array in self._arrays]
        found = sum(map(len, ends))
        if found != self.documents:
            raise UserError(
                f"{self.path}: holds {found} documents terminated by EOS {self.eos_id}, and corpus.json "
                f"says {self.documents}; tokenize the text again"
            )
        return ends

    @functools.cached_property
    def _first_documents(self) -> list[int]:
        return [0, *itertools.accumulate(map(len, self._document_ends))][:-1]

    @functools.cached_property
    def _first_tokens(self) -> list[int]:
        return [0, *itertools.accumulate(file["tokens"] for file in self.files)][:-1]


def open_corpora(paths: Sequence[str]) -> dict[str, Corpus]:
    """Opens corpora under labels, as `path_labels` gives them."""
    labels = path_labels(paths)
    return {labels[path]: Corpus.open(path) for path in paths}


def path_labels(paths: Sequence[str]) -> dict[str, str]:
    """Labels paths by what distinguishes them, or a single one by its name: {path: label}."""
    if not paths:
        return {}
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return {path: os.path.relpath(path, parent) for path in paths}


def verify_corpora(corpora: Sequence[Corpus]) -> None:
    """Reads the token files of all corpora and compares their SHA-256, with a progress bar.

    Raises:
      UserError: a file's content is not what `corpus.json` says.
    """
    files = {
        file: described["sha256"]
        for corpus in corpora
        for file, described in zip(corpus.local_files, corpus.files, strict=True)
    }
    with (
        byte_progress("token files", sum(file.stat().length for file in files)) as advance,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for file, found in zip(files, pool.map(functools.partial(file_digest, advance=advance), files), strict=True):
            if found != files[file]:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{file}: differs from the digest in corpus.json; copy the corpus again")


def write_corpus(
    out: epath.PathLike,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    tokens_per_file: int = _TOKENS_PER_FILE,
    bad_records: BadRecords | None = None,
    progress: bool = False,
) -> Corpus:
    """Tokenizes documents into a new corpus directory, which is complete or absent.

    Memory holds one document and a batch of chunks, whatever the number and length of the documents. Documents
    without a token are skipped.

    Args:
      out: the directory to make.
      documents: the texts.
      tokenizer: encodes them; a copy is stored in the corpus.
      tokens_per_file: a new file starts when the current one has this many.
      bad_records: records that the reader of `documents` skipped, for corpus.json.
      progress: show a progress bar on standard error.

    Raises:
      NoTextError: there is no document with text.
      StoppedError: the reader stopped at a bad record.
      UserError: `out` exists.
    """
    columns = (SpinnerColumn(), "{task.description} {task.completed} documents", TimeElapsedColumn())
    with progress_bar(*columns, shown=progress) as bar:
        chunks = _chunks(bar.track(documents, description="Tokenized"), tokenizer)
        encoded = (
            (ids, chunk)
            for batch in _batches(chunks)
            for chunk, ids in zip(batch, tokenizer.encode_batch([chunk.text for chunk in batch]), strict=True)
        )
        _write(out, _terminate_documents(encoded, tokenizer.eos_id), tokenizer, tokens_per_file, bad_records)
    return Corpus.open(out)


def unknown_text(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """A warning where text is lost: as tokens for unknown text, or because characters have no token."""
    if tokenizer.drops_unknown:
        return [f"{tokenizer.label}: has no token for unknown text; characters that it does not know were left out"]
    if tokenizer.unknown_id is None:
        return []
    slices = (array[at : at + _SCAN_TOKENS] for array in corpus._arrays for at in range(0, len(array), _SCAN_TOKENS))
    unknown = sum(np.count_nonzero(tokens == tokenizer.unknown_id) for tokens in slices)
    name = tokenizer.backend.id_to_token(tokenizer.unknown_id)
    share = f"{unknown / corpus.tokens:.2%}"
    return [f"{unknown:,} of {corpus.tokens:,} tokens ({share}) are {name!r}, unknown text"] if unknown else []


def copy_documents(source: Corpus, indices: Iterable[int], out: epath.PathLike) -> None:
    """Copies documents of one corpus, token by token, into a new one, which may be remote.

    Raises:
      UserError: `out` exists, there are no indices, or an id is outside the vocabulary.
    """
    tokenizer = source.tokenizer()
    documents = (source[index] for index in indices)
    counted = ((ids, tokenizer.count_bytes(ids[:-1]), True) for ids in _in_vocabulary(source, documents))
    _write(out, counted, tokenizer, _TOKENS_PER_FILE)


class _Chunk(NamedTuple):
    """A chunk of a document: its text, the number of its UTF-8 bytes, and whether it is the last."""

    text: str
    bytes: int
    ends: bool


def _chunks(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[_Chunk]:
    for text in documents:
        for start, end in itertools.pairwise([0, *tokenizer.chunk_ends(text)]):
            chunk = text[start:end]
            yield _Chunk(chunk, len(chunk.encode()), end == len(text))


def _batches(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Gathers chunks to be encoded together; where the reader stops, the chunks before are still yielded."""
    batch, size = [], 0
    try:
        for chunk in chunks:
            if batch and (len(batch) == _BATCH_CHUNKS or size + chunk.bytes > _BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(chunk)
            size += chunk.bytes
    except StoppedError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _terminate_documents(
    chunks: Iterable[tuple[np.ndarray, _Chunk]], eos_id: int
) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Appends EOS to each document with a token; yields ids, bytes of text, and whether the document ends."""
    length = size = 0
    for ids, chunk in chunks:
        length, size = length + ids.size, size + chunk.bytes
        if chunk.ends and length:
            yield np.append(ids, eos_id), size, True
        elif ids.size:
            yield ids, 0, False
        if chunk.ends:
            length = size = 0


def _write(
    out: epath.PathLike,
    chunks: Iterable[tuple[np.ndarray, int, bool]],
    tokenizer: Tokenizer,
    tokens_per_file: int,
    bad_records: BadRecords | None = None,
) -> None:
    """Writes a new corpus directory of chunks: (ids, bytes of text, whether the document ends)."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    with (
        atomic_directory(out, _MANIFEST, (_MANIFEST, _TOKENIZER, _TOKENS)) as directory,
        contextlib.closing(TokenFileWriter(directory, _DTYPES[dtype], tokens_per_file)) as files,
    ):
        try:
            for ids, size, ends in chunks:
                files.append(ids, ends=ends)
                totals["documents"] += ends
                totals["tokens"] += ids.size
                totals["bytes"] += size
        except StoppedError as error:
            raise StoppedError(
                f"{error} (stopped after {totals['documents']:,} documents, {totals['tokens']:,} tokens; "
                "no corpus is made)"
            ) from error
        if not totals["documents"]:
            raise NoTextError(bad_records)
        description = {
            "format_version": FORMAT_VERSION,
            "tokenizer_digest": tokenizer.digest,
            "eos_id": tokenizer.eos_id,
            "dtype": dtype,
            **totals,
            "files": files.close(),
            **({"bad_records": bad_records.description()} if bad_records and bad_records.count else {}),
        }
        tokenizer.save(directory / _TOKENIZER)
        commit(directory / _MANIFEST, description)


def _in_vocabulary(source: Corpus, documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for ids in documents:
        if ids.max() >= source.vocab_size:
            source.refuse_ids()
        yield ids


def _read_description(file: epath.Path) -> dict[str, Any]:
    """Reads the fields of `Corpus` from corpus.json."""
    if not file.exists():
        raise UserError(f"{file.parent}: is not a corpus (no corpus.json); `flexolmo tokenize` makes one")
    try:
        record = json.loads(file.read_bytes())
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{file}: has format version {version}; this program reads {FORMAT_VERSION}")
        counts = {name: int(record[name]) for name in ("documents", "tokens", "bytes", "eos_id")}
        files = tuple({"name": f["name"], "tokens": int(f["tokens"]), "sha256": f["sha256"]} for f in record["files"])
        dtype, digest = _DTYPES[record["dtype"]], record["tokenizer_digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not the description of a corpus ({error!r}); copy it again") from error
    if counts["tokens"] != sum(f["tokens"] for f in files):
        raise UserError(f"{file}: its files do not add up to {counts['tokens']} tokens; copy it again")
    return {**counts, "files": files, "dtype": dtype, "tokenizer_digest": digest}
