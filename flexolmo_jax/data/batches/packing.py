"""How documents are put into sequences, without padding.

- "concatenate": documents one after another, cut where a sequence ends.
- "best_fit": the documents of a window of sequences are arranged so that few are cut (Ding et al., 2024, "Fewer
  Truncations Improve Language Modeling", arXiv 2404.10830). One that is longer than a sequence is cut into sequences
  first. Then each, the longest first, goes to the sequence with the least room in which it fits. What fits nowhere is
  cut to fill the room that is left.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.batches.stream import Stream
from flexolmo_jax.data.corpus import Corpus

PACKINGS = {"concatenate": 1, "best_fit": 64}  # sequences of a window, at most
_CACHED_WINDOWS = 256

Span = tuple[int, int]  # first token and end, as offsets of a stream


class PackedStream:
    """The sequences of a stream.

    Sequence k holds tokens of window k // window, which is as many tokens of the stream as its sequences have places.

    Attributes:
      stream: of documents.
      length: tokens of a sequence.
      window: sequences of a window.
    """

    def __init__(self, stream: Stream, length: int, packing: str):
        """Reads no token; a window is no longer than the stream, except where a sequence is."""
        self.stream, self.length = stream, length
        self.window = min(PACKINGS[packing], max(1, stream.tokens // length))
        self._arranged = functools.lru_cache(_CACHED_WINDOWS)(self._arrange)

    def spans(self, sequence: int) -> Sequence[Span]:
        """What a sequence holds: spans of the stream, one after another."""
        if self.window == 1:
            return [(sequence * self.length, (sequence + 1) * self.length)]
        window, place = divmod(sequence, self.window)
        offset = window * self.window * self.length
        return (self._arranged(window)[place] + offset).tolist()

    def _arrange(self, window: int) -> list[np.ndarray]:
        """The spans of each sequence of a window, as offsets within the window, int64 [spans, 2]."""
        size = self.window * self.length
        start = window * size
        ends = (self.stream.document_ends(start, start + size) - start).tolist()
        return [np.array(spans) for spans in best_fit(ends, self.length, self.window)]


def best_fit(ends: Sequence[int], length: int, count: int) -> list[list[Span]]:
    """Arranges documents in `count` sequences of exactly `length` tokens.

    Args:
      ends: offsets at which documents end, rising, among `count * length` tokens; the last document may go beyond.
      length: tokens of a sequence.
      count: number of sequences.

    Returns:
      The spans of each sequence. Together they hold each token once; no span holds tokens of two documents.
    """
    chunks = _chunks(ends, length, count * length)
    sequences: list[list[Span]] = [[] for _ in range(count)]
    room = [(length, place) for place in range(count)]  # rising
    unplaced = []
    for start, stop in sorted(chunks, key=lambda span: span[0] - span[1]):
        size = stop - start
        found = bisect.bisect_left(room, (size, 0))
        if found == len(room):
            unplaced.append((start, stop))
            continue
        left, place = room.pop(found)
        sequences[place].append((start, stop))
        if left > size:
            bisect.insort(room, (left - size, place))
    for start, stop in unplaced:
        while start < stop:
            left, place = room.pop()  # the largest
            size = min(left, stop - start)
            sequences[place].append((start, start + size))
            start += size
            if left > size:
                bisect.insort(room, (left - size, place))
    return sequences


def _chunks(ends: Sequence[int], length: int, total: int) -> list[Span]:
    """The documents of a window, those that are longer than a sequence in chunks of its length."""
    chunks, start = [], 0
    for end in [*ends, total]:
        while end - start > length:
            chunks.append((start, start + length))
            start += length
        if end > start:
            chunks.append((start, end))
        start = end
    return chunks


class PackingReport(NamedTuple):
    """What packing does to the documents of corpora in one pass over them, or over their first tokens.

    Attributes:
      documents: number of documents.
      tokens: number of tokens.
      cut_documents: documents that are not in one sequence whole.
      cut_tokens: tokens of these documents.
      padding: share of the sequences' places that hold no token; 0 for the packings that there are.
    """

    documents: int
    tokens: int
    cut_documents: int
    cut_tokens: int
    padding: float


def packing_report(corpora: Sequence[Corpus], length: int, packing: str, limit: int | None = None) -> PackingReport:
    """Counts the documents that a packing cuts.

    Args:
      corpora: that are packed together.
      length: tokens of a sequence.
      packing: a key of `PACKINGS`.
      limit: how many tokens to look at, at most; all by default.
    """
    stream = Stream(corpora)
    packed, tokens = PackedStream(stream, length, packing), min(stream.tokens, limit or stream.tokens)
    size = packed.window * length
    documents = cut_documents = cut_tokens = before = 0
    for first in range(0, -(-tokens // size) * packed.window, packed.window):
        spans = np.array(sorted(span for place in range(packed.window) for span in packed.spans(first + place)))
        end = min((first + packed.window) * length, tokens)
        ends = stream.document_ends(first * length, end)
        starts = np.concatenate([[before], ends])[:-1]
        # The span that holds a document's first token; -1: it began in an earlier window.
        holders = np.searchsorted(spans[:, 0], starts, "right") - 1
        is_cut = (holders < 0) | (spans[holders, 1] < ends)
        documents += len(ends)
        cut_documents += int(is_cut.sum())
        cut_tokens += int((ends - starts)[is_cut].sum())
        before = int(ends[-1]) if ends.size else before
    return PackingReport(documents, tokens, cut_documents, cut_tokens, 0.0)
