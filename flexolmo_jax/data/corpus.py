"""A corpus: a directory of documents as token ids (docs/formats.md); `corpus_writer` makes one.

- `corpus.json`: format version, tokenizer digest, eos_id, dtype, totals, files; and the card: where the documents come
  from, and what was left out. It is written last: a directory without it is incomplete.
- `tokenizer.json`: the tokenizer that made it.
- `tokens-00000.npy`, `tokens-00001.npy`, ... (see `token_files`): the documents, each terminated by EOS. No document
  spans two files. They may lie elsewhere, as files that another program wrote.
- `tokens-00000.ends`, ...: where the documents of each file end. Older corpora have none.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from etils import epath

from flexolmo_jax.checkpoint.digests import combined_digest
from flexolmo_jax.data.local_copies import local_copy
from flexolmo_jax.data.token_files import (
    DTYPES,
    ENDS_DTYPE,
    file_digest,
    find_above,
    find_document_ends,
    map_document_ends,
    map_token_file,
)
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import is_remote
from flexolmo_jax.progress import byte_progress

T = TypeVar("T")
FORMAT_VERSION = 1
MANIFEST, TOKENIZER = "corpus.json", "tokenizer.json"
CARD = ("license", "sources", "source", "dropped", "bad_records", "split")  # keys of corpus.json


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus directory, local or remote, memory-mapped: a random-access sequence of documents.

    `corpus[i]` is document i, EOS included: a read-only array of `dtype` [length]. The index of documents is
    memory-mapped too. In a corpus without one, the first access finds the ends of documents by one pass over the
    tokens, and keeps 8 bytes per document. Ids are not checked: callers compare them with `vocab_size`, and call
    `refuse_ids` for the error.

    Attributes:
      path: the directory.
      documents: number of documents.
      tokens: number of tokens, EOS included.
      bytes: number of UTF-8 bytes of the documents' text. In a copy of documents of another corpus it is that of the
        decoded tokens, which differs where the tokenizer loses information (letter case, unknown text).
      eos_id: the id that terminates each document.
      dtype: of the token files.
      tokenizer_digest: `Tokenizer.digest` of the tokenizer that made it.
      files: of each token file, its name (or its absolute path or URL), number of tokens and SHA-256, and where it has
        an index, the number of documents, and the name and SHA-256 of the index under "ends".
      card: what corpus.json has under the keys of `CARD`.
    """

    path: epath.Path
    documents: int
    tokens: int
    bytes: int
    eos_id: int
    dtype: np.dtype
    tokenizer_digest: str
    files: tuple[dict[str, Any], ...]
    card: Mapping[str, Any]

    @classmethod
    def open(cls, path: epath.PathLike) -> "Corpus":
        """Opens a corpus directory. Of a remote one (`gs://`, `s3://`) the token files are copied, `local_copies`.

        Raises:
          UserError: it is not a corpus, or of another format version, or a token file or an index is missing or
            truncated.
        """
        path = epath.Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; `flexolmo tokenize` makes a corpus")
        corpus = cls(path=path, **_read_description(path / MANIFEST))
        corpus._arrays  # noqa: B018  maps the files, so that a missing one is an error now
        if corpus._has_index:
            corpus._indices  # noqa: B018  the same
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
        file = self.path / TOKENIZER
        tokenizer = load_tokenizer(file, eos_id=self.eos_id)
        if tokenizer.digest != self.tokenizer_digest:
            raise UserError(f"{file}: did not make this corpus; tokenize the text again")
        return tokenizer

    def verify(self) -> None:
        """Reads every token file and index, and compares their SHA-256.

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
                    f"{self._locate(file)}: damaged: the id {array[at]} at offset {at} (in tokens) is outside "
                    f"the vocabulary of {self.vocab_size}; {self._remedy(file)}"
                )

    @functools.cached_property
    def local_files(self) -> list[epath.Path]:
        """The token files, or the local copies of remote ones."""
        return self._make_local([(file, file["tokens"] * self.dtype.itemsize) for file in self.files])

    @functools.cached_property
    def local_indices(self) -> list[epath.Path]:
        """The indices of the token files, or the local copies of remote ones; empty where there are none."""
        return self._make_local(
            [(file["ends"], file["documents"] * ENDS_DTYPE.itemsize) for file in self.files if self._has_index]
        )

    def expected_digests(self) -> dict[epath.Path, tuple[str, str]]:
        """The SHA-256 that each local file must have, and what to do where it has another."""
        described = [*self.files, *(file["ends"] for file in self.files if self._has_index)]
        files = zip([*self.local_files, *self.local_indices], described, strict=True)
        return {path: (file["sha256"], self._remedy(file)) for path, file in files}

    def _make_local(self, files: Sequence[tuple[Mapping[str, Any], int]]) -> list[epath.Path]:
        """The local paths of described files, of which remote ones, of that many bytes, are copied."""
        paths = [self._locate(file) for file, _ in files]
        total = sum(size for path, (_, size) in zip(paths, files, strict=True) if is_remote(path))
        if not total:
            return paths
        with byte_progress(f"copy of {self.path}", total) as advance:
            return [
                local_copy(path, file["sha256"], advance) if is_remote(path) else path
                for path, (file, _) in zip(paths, files, strict=True)
            ]

    def _locate(self, file: Mapping[str, Any]) -> epath.Path:
        """The path of a described file, which may lie elsewhere."""
        name = file["name"]
        return epath.Path(name) if is_remote(name) or os.path.isabs(name) else self.path / name

    def _remedy(self, file: Mapping[str, Any]) -> str:
        """What to do where a described file is not as it was."""
        lies_elsewhere = self._locate(file).parent != self.path
        return "restore it, or make the corpus again" if lies_elsewhere else "copy the corpus again"

    @functools.cached_property
    def _arrays(self) -> list[np.ndarray]:
        files = zip(self.local_files, self.files, strict=True)
        return [map_token_file(path, file["tokens"], self.dtype, self._remedy(file)) for path, file in files]

    @functools.cached_property
    def _has_index(self) -> bool:
        return all("ends" in file for file in self.files)

    @functools.cached_property
    def _document_ends(self) -> list[np.ndarray]:
        """Of each file, the offset after each document's EOS, int64 [documents of the file]."""
        if self._has_index:
            self._check_eos()
            return self._indices
        ends = [find_document_ends(array, self.eos_id) for array in self._arrays]
        found = sum(map(len, ends))
        if found != self.documents:
            raise UserError(
                f"{self.path}: holds {found} documents terminated by EOS {self.eos_id}, and corpus.json "
                f"says {self.documents}; tokenize the text again"
            )
        return ends

    @functools.cached_property
    def _indices(self) -> list[np.ndarray]:
        """The mapped indices, int64 [documents of the file]."""
        files = zip(self.local_indices, self.files, strict=True)
        return [map_document_ends(path, file["documents"], file["tokens"]) for path, file in files]

    def _check_eos(self) -> None:
        """Looks at one document of each file: where eos_id is wrong, none ends in it."""
        for ends, tokens, path in zip(self._indices, self._arrays, self.local_indices, strict=True):
            last = tokens[int(ends[0]) - 1]
            if last != self.eos_id and len(ends) > 1:  # the last document of a file may lack EOS
                raise UserError(
                    f"{path}: its first document ends in the id {last}, and corpus.json says EOS {self.eos_id}; "
                    "tokenize the text again"
                )

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


def check_one_tokenizer(corpora: Sequence[Corpus]) -> None:
    """Raises UserError unless all corpora were made with the tokenizer of the first, and end documents alike."""
    first = corpora[0]
    for corpus in corpora:
        if (corpus.tokenizer_digest, corpus.eos_id) != (first.tokenizer_digest, first.eos_id):
            raise UserError(f"{corpus.path}: its tokenizer is not that of {first.path}; tokenize both alike")


def verify_corpora(corpora: Sequence[Corpus]) -> None:
    """Reads the token files and indices of all corpora and compares their SHA-256, with a progress bar.

    Raises:
      UserError: a file's content is not what `corpus.json` says.
    """
    expected = {path: digest for corpus in corpora for path, digest in corpus.expected_digests().items()}
    with (
        byte_progress("token files", sum(path.stat().length for path in expected)) as advance,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        found = pool.map(functools.partial(file_digest, advance=advance), expected)
        for (path, (digest, remedy)), digest_found in zip(expected.items(), found, strict=True):
            if digest_found != digest:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{path}: differs from the digest in corpus.json; {remedy}")


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
        files = tuple(map(_file_description, record["files"]))
        dtype, digest = DTYPES[record["dtype"]], record["tokenizer_digest"]
        card = {key: record[key] for key in CARD if key in record}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not the description of a corpus ({error!r}); copy it again") from error
    if counts["tokens"] != sum(f["tokens"] for f in files):
        raise UserError(f"{file}: its files do not add up to {counts['tokens']} tokens; copy it again")
    if all("ends" in f for f in files) and counts["documents"] != sum(f["documents"] for f in files):
        raise UserError(f"{file}: its files do not add up to {counts['documents']} documents; copy it again")
    return {**counts, "files": files, "dtype": dtype, "tokenizer_digest": digest, "card": card}


def _file_description(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a token file in corpus.json."""
    description = {"name": record["name"], "tokens": int(record["tokens"]), "sha256": record["sha256"]}
    if "ends" in record:
        ends = {"name": record["ends"]["name"], "sha256": record["ends"]["sha256"]}
        description |= {"documents": int(record["documents"]), "ends": ends}
    return description
