"""The tokens of corpora as one stream, read by offset."""

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from flexolmo_jax.data.corpus import Corpus


class Stream:
    """The token files of corpora one after another, without end: after the last token comes the first again.

    Offsets are in tokens, and count on through the repetitions.

    Attributes:
      corpora: in their order.
      tokens: of all corpora, once.
      eos_id: the id that terminates each document.
    """

    def __init__(self, corpora: Sequence[Corpus]):
        """Reads no token."""
        self.corpora = tuple(corpora)
        self.tokens = sum(corpus.tokens for corpus in corpora)
        self.eos_id = corpora[0].eos_id
        self._starts = [0, *itertools.accumulate(corpus.tokens for corpus in corpora)][:-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens from one offset to another, as the files hold them, [stop - start]."""
        return _joined([corpus.read(first, last) for corpus, _, first, last in self._slices(start, stop)])

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Offsets after the EOS of documents, above `start` and up to `stop`, int64 [documents]."""
        slices = self._slices(start, stop)
        return _joined([corpus.document_ends(first, last) + offset for corpus, offset, first, last in slices])

    def file_starts(self, start: int, stop: int) -> np.ndarray:
        """Offsets from `start` on and below `stop` at which a token file begins, int64 [files]."""
        slices = self._slices(start, stop)
        return _joined([corpus.file_starts(first, last) + offset for corpus, offset, first, last in slices])

    def _slices(self, start: int, stop: int) -> Iterator[tuple[Corpus, int, int, int]]:
        """Yields (corpus, offset of its first token, and of it the first token and the end) in order."""
        while start < stop:
            repetition, place = divmod(start, self.tokens)
            index = bisect.bisect_right(self._starts, place) - 1
            offset = repetition * self.tokens + self._starts[index]
            end = min(stop, offset + self.corpora[index].tokens)
            yield self.corpora[index], offset, start - offset, end - offset
            start = end


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays or [np.empty(0, np.int64)])
