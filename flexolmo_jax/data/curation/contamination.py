"""Contamination: n-grams of held-out documents that occur in training documents."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.curation.ngrams import ngram_hashes

_FILTER_BITS = 3  # 1 of 8 to 16 n-grams that do not occur is searched for


class Match(NamedTuple):
    """A held-out document, and the share of its n-grams that a training document holds."""

    document: int
    share: float


class HeldOutNgrams:
    """The n-grams of held-out documents, each with the number of training documents that hold it.

    Training documents are counted one after the other and not kept. Memory holds about 50 bytes for each n-gram of a
    held-out document.

    Args:
      documents: held-out documents, arrays of ids [length].
      n: tokens of an n-gram.
    """

    def __init__(self, documents: Iterable[np.ndarray], n: int):
        distinct = [np.unique(ngram_hashes(ids, n)) for ids in documents]
        self._n = n
        self.sizes = np.array([len(hashes) for hashes in distinct], np.int64)
        hashes = np.concatenate([np.zeros(0, np.uint64), *distinct])
        del distinct
        # An n-gram is owned by the held-out documents that contain it: owners[starts[i] : starts[i + 1]] for n-gram i.
        order = np.argsort(hashes, kind="stable")
        self._owners = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)[order]
        self._hashes, starts = np.unique(hashes[order], return_index=True)
        self._starts = np.append(starts, len(hashes))
        # Most n-grams of training documents are in none: the first bits of their hashes tell so without a search.
        self._shift = np.uint64(64 - _FILTER_BITS - len(self._hashes).bit_length())
        self._prefixes = np.zeros(1 << (64 - int(self._shift)), bool)
        self._prefixes[self._hashes >> self._shift] = True
        self._holders = np.zeros(len(self._hashes), np.int64)
        self._held = np.zeros(len(self.sizes), np.int64)
        self._marked, self._limit = np.zeros(len(self._hashes), bool), 1.0

    @property
    def shares(self) -> np.ndarray:
        """The share of each held-out document's n-grams that training documents hold: float64 [held-out documents].

        Each n-gram counts once. The share of a document that is shorter than an n-gram is 0.
        """
        return self._held / np.maximum(self.sizes, 1)

    def add(self, ids: np.ndarray) -> bool:
        """Counts the n-grams of a training document `ids` [length]; returns whether it holds any."""
        ngrams = self._lookup(ids)
        if not ngrams.size:
            return False
        self._holders[ngrams] += 1
        self._update_held(ngrams[self._holders[ngrams] == 1], 1)
        return True

    def remove(self, ids: np.ndarray) -> None:
        """Takes back what `add` did for a training document."""
        ngrams = self._lookup(ids)
        self._holders[ngrams] -= 1
        self._update_held(ngrams[self._holders[ngrams] == 0], -1)

    def mark(self, limit: float) -> None:
        """Marks n-grams that no training document should hold, so that no share is above `limit`.

        Of a held-out document above it, those are marked that the fewest training documents hold. So one that is copied
        costs its copies, and not every document with the same licence.
        """
        surplus = np.where(self.shares > limit, self._held - np.floor(limit * self.sizes).astype(np.int64), 0)
        ngrams = np.repeat(np.arange(len(self._hashes)), np.diff(self._starts))
        entries = np.flatnonzero((surplus[self._owners] > 0) & (self._holders[ngrams] > 0))
        ngrams, owners = ngrams[entries], self._owners[entries]
        order = np.lexsort((self._holders[ngrams], owners))
        ngrams, owners = ngrams[order], owners[order]
        ranks = np.arange(len(owners)) - np.searchsorted(owners, owners)
        self._marked[ngrams[ranks < surplus[owners]]] = True
        self._limit = limit

    def match(self, ids: np.ndarray) -> Match | None:
        """Finds the held-out document for which a training document has to be removed, after `mark`.

        Of those whose share is still above the limit, and of which it holds marked n-grams, the one that it holds most
        of. If every document with a match is removed at once, no share is above the limit in the end.

        Returns:
          None if there is no such held-out document.
        """
        ngrams = self._lookup(ids)
        documents = np.unique(self._owners_of(ngrams[self._marked[ngrams]]))
        documents = documents[self._held[documents] / self.sizes[documents] > self._limit]
        if not documents.size:
            return None
        owners, counts = np.unique(self._owners_of(ngrams), return_counts=True)
        shares = counts[np.searchsorted(owners, documents)] / self.sizes[documents]
        best = int(np.argmax(shares))
        return Match(int(documents[best]), float(shares[best]))

    def _lookup(self, ids: np.ndarray) -> np.ndarray:
        """Returns the indices of the n-grams that a training document holds, without duplicates."""
        if not self._hashes.size:
            return np.zeros(0, np.int64)
        hashes = ngram_hashes(ids, self._n)
        hashes = hashes[self._prefixes[hashes >> self._shift]]
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.unique(places[self._hashes[places] == hashes])

    def _owners_of(self, ngrams: np.ndarray) -> np.ndarray:
        """Returns the owners of each of the n-grams, one after the other."""
        counts = self._starts[ngrams + 1] - self._starts[ngrams]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._owners[np.repeat(self._starts[ngrams], counts) + offsets]

    def _update_held(self, ngrams: np.ndarray, change: int) -> None:
        documents, counts = np.unique(self._owners_of(ngrams), return_counts=True)
        self._held[documents] += change * counts
