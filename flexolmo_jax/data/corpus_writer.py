"""Writes corpus directories, of texts or of documents of another corpus, complete or not at all."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.progress import SpinnerColumn, TimeElapsedColumn

from flexolmo_jax.checkpoint.atomic import atomic_directory, commit
from flexolmo_jax.data.corpus import FORMAT_VERSION, MANIFEST, TOKENIZER, Corpus
from flexolmo_jax.data.text.bad_records import BadRecords, StoppedError
from flexolmo_jax.data.token_files import DTYPES, TokenFileWriter, token_dtype
from flexolmo_jax.data.tokenization.encoding import encode_documents
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.progress import progress_bar

TOKENS_PER_FILE = 1 << 28
_LISTED_SOURCES = 100
NAMES = (MANIFEST, TOKENIZER, "tokens-*.npy", "*.ends")  # of what is in a corpus directory


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


def write_corpus(
    out: epath.PathLike,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    tokens_per_file: int = TOKENS_PER_FILE,
    bad_records: BadRecords | None = None,
    progress: bool = False,
) -> Corpus:
    """Tokenizes documents into a new corpus directory, in this process.

    Memory holds one document and a batch of chunks, whatever the number and length of the documents. Documents
    without a token are left out, and counted in corpus.json.

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
    read = 0

    def labelled() -> Iterator[tuple[str, None]]:
        nonlocal read
        for read, text in enumerate(bar.track(documents, description="Tokenized"), 1):  # noqa: B007
            yield text, None

    columns = (SpinnerColumn(), "{task.description} {task.completed} documents", TimeElapsedColumn())
    with progress_bar(*columns, shown=progress) as bar, corpus_directory(out) as directory:
        chunks = ((chunk.ids, chunk.bytes, chunk.ends) for chunk in encode_documents(labelled(), tokenizer))
        totals, files = _write(directory, chunks, tokenizer, tokens_per_file)
        if not totals["documents"]:
            raise NoTextError(bad_records)
        finish_corpus(directory, tokenizer, totals, files, dropped(read - totals["documents"], bad_records))
    return Corpus.open(out)


def copy_documents(
    source: Corpus, indices: Iterable[int], out: epath.PathLike, *, card: Mapping[str, Any] | None = None
) -> None:
    """Copies documents of one corpus, token by token, into a new one, which may be remote.

    Args:
      source: the corpus to copy from.
      indices: of its documents, in the order of the copy.
      out: the directory to make.
      card: other keys of corpus.json.

    Raises:
      UserError: `out` exists, there are no indices, or an id is outside the vocabulary.
    """
    tokenizer = source.tokenizer()
    documents = _in_vocabulary(source, (source[index] for index in indices))
    counted = ((ids, tokenizer.count_bytes(ids[:-1]), True) for ids in documents)
    with corpus_directory(out) as directory:
        totals, files = _write(directory, counted, tokenizer, TOKENS_PER_FILE)
        if not totals["documents"]:
            raise NoTextError(None)
        finish_corpus(directory, tokenizer, totals, files, card)


def corpus_directory(out: epath.PathLike) -> contextlib.AbstractContextManager[epath.Path]:
    """A corpus directory to fill, which is complete or absent; see `atomic_directory`."""
    return atomic_directory(out, MANIFEST, NAMES)


def dropped(empty: int, bad_records: BadRecords | None = None) -> dict[str, Any]:
    """The part of a corpus's card that counts what was left out.

    Args:
      empty: number of documents without a token.
      bad_records: those that were skipped.
    """
    counts = dict(bad_records.kinds) if bad_records else {}
    card: dict[str, Any] = {"dropped": dict(sorted((counts | ({"empty": empty} if empty else {})).items()))}
    if bad_records and bad_records.count:
        card["bad_records"] = {"count": bad_records.count, "records": bad_records.listed}
    return card


def describe_sources(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of a corpus's card that lists input files: {"count", "digest", "files"}.

    Args:
      sources: "file", "documents", "tokens" and "bytes" of each, in order. The digest is of all, the list of a hundred.
    """
    canonical = json.dumps([list(source.values()) for source in sources], separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return {"count": len(sources), "digest": digest, "files": list(sources[:_LISTED_SOURCES])}


def finish_corpus(
    directory: epath.Path,
    tokenizer: Tokenizer,
    totals: Mapping[str, int],
    files: Sequence[Mapping[str, Any]],
    card: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes the tokenizer and corpus.json into a corpus directory whose other files are there.

    Args:
      directory: the corpus.
      tokenizer: made it.
      totals: numbers of "documents", "tokens" and "bytes" of text.
      files: descriptions of the token files.
      card: other keys of corpus.json.
      dtype: of the token files, by default `token_dtype`.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "tokenizer_digest": tokenizer.digest,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype or token_dtype(tokenizer.vocab_size),
        **totals,
        **(card or {}),
        "files": files,
    }
    tokenizer.save(directory / TOKENIZER)
    commit(directory / MANIFEST, description)


def _write(
    directory: epath.Path, chunks: Iterable[tuple[np.ndarray, int, bool]], tokenizer: Tokenizer, tokens_per_file: int
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Writes token files of chunks: (ids, bytes of text, whether the document ends); returns totals and files."""
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    dtype = DTYPES[token_dtype(tokenizer.vocab_size)]
    with contextlib.closing(TokenFileWriter(directory, dtype, tokens_per_file)) as files:
        try:
            for ids, size, ends in chunks:
                files.append(ids, ends=ends)
                totals["documents"] += ends
                totals["tokens"] += ids.size
                totals["bytes"] += size
        except StoppedError as error:
            raise error.after(totals["documents"], totals["tokens"]) from error
        return totals, files.close()


def _in_vocabulary(source: Corpus, documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for ids in documents:
        if ids.max() >= source.vocab_size:
            source.refuse_ids()
        yield ids
