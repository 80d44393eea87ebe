"""Documents of text to token ids: long ones in chunks, short ones many at once."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from flexolmo_jax.data.text.bad_records import StoppedError
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer

_BATCH_CHUNKS = 1024
_BATCH_BYTES = 1 << 20  # of text; `tokenizers` needs about 100 times as many
Label = TypeVar("Label")


class Encoded(NamedTuple, Generic[Label]):
    """Ids of a chunk of a document.

    Attributes:
      ids: int32 [length]; the last chunk of a document ends in EOS.
      bytes: at the last chunk, the number of UTF-8 bytes of the document; else 0.
      ends: whether it is the document's last.
      label: of the document.
    """

    ids: np.ndarray
    bytes: int
    ends: bool
    label: Label


class _Chunk(NamedTuple, Generic[Label]):
    """A chunk of a document: its text, the number of its UTF-8 bytes, whether it is the last, the document's label."""

    text: str
    bytes: int
    ends: bool
    label: Label


def encode_documents(documents: Iterable[tuple[str, Label]], tokenizer: Tokenizer) -> Iterator[Encoded[Label]]:
    """Encodes documents, each a text and a label, in order; those without a token are left out.

    Memory holds one document and a batch of chunks, whatever the number and length of the documents.
    """
    length = size = 0  # of the document so far
    for batch in _batches(_chunks(documents, tokenizer)):
        for chunk, ids in zip(batch, tokenizer.encode_batch([chunk.text for chunk in batch]), strict=True):
            length, size = length + ids.size, size + chunk.bytes
            if chunk.ends and length:
                yield Encoded(np.append(ids, np.int32(tokenizer.eos_id)), size, True, chunk.label)
            elif ids.size:
                yield Encoded(ids, 0, False, chunk.label)
            if chunk.ends:
                length = size = 0


def _chunks(documents: Iterable[tuple[str, Label]], tokenizer: Tokenizer) -> Iterator[_Chunk[Label]]:
    for text, label in documents:
        for start, end in itertools.pairwise([0, *tokenizer.chunk_ends(text)]):
            chunk = text[start:end]
            yield _Chunk(chunk, len(chunk.encode()), end == len(text), label)


def _batches(chunks: Iterable[_Chunk[Label]]) -> Iterator[list[_Chunk[Label]]]:
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
