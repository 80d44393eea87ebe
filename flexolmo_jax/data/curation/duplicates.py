"""Duplicates of documents: exact ones by digests, near ones by MinHash and LSH (locality-sensitive hashing)."""

import hashlib
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.data.curation.ngrams import ngram_hashes
from flexolmo_jax.errors import ArgumentError

DIGEST = np.dtype("S16")
_SHINGLE = 5  # tokens
_SEED = 1
_BANDS = 20
_MAX_BAND_HASHES = 32
_RECALL = 0.98  # at the threshold; that of more similar documents is higher
_CHECKED = 4
_UPDATE_SHINGLES = 1 << 16  # rensa takes them as Python objects


class NearDuplicate(NamedTuple):
    """A document, the earlier one that is similar, and the Jaccard similarity of their sets of shingles."""

    index: int
    original: int
    similarity: float


def document_digest(ids: np.ndarray) -> bytes:
    """Returns the 16 bytes of BLAKE2b of `ids` [length], which do not depend on their dtype."""
    return hashlib.blake2b(ids.astype("<u4").data, digest_size=DIGEST.itemsize).digest()


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """Returns for each of `digests` [N] the index of the first that equals it: int64 [N]."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def near_duplicates(
    documents: Sequence[np.ndarray], indices: Iterable[int], threshold: float
) -> Iterator[NearDuplicate | None]:
    """Compares documents with the earlier ones that are no near-duplicates themselves.

    Two documents are near-duplicates if the Jaccard similarity of their sets of 5-grams is at least `threshold`. LSH
    finds candidates: 98% or more of the near-duplicates. Of the four with the most similar MinHash signatures, the
    similarity is computed exactly, so that no other document counts. Documents with fewer than 5 tokens have none.

    Memory holds the index of LSH, and a signature of each document that is kept.

    Args:
      documents: arrays of ids [length].
      indices: of the documents to compare, in the order of which the first is kept.
      threshold: above 0, at most 1.

    Yields:
      For each of the indices the near-duplicate, or None if the document has no earlier one.

    Raises:
      ArgumentError: rensa is not installed.
    """
    rensa, hashes = _rensa(threshold), _BANDS * _band_hashes(threshold)
    index = rensa.RMinHashLSH(threshold, hashes, _BANDS)
    signatures: dict[int, np.ndarray] = {}
    for document in indices:
        shingles = np.unique(ngram_hashes(documents[document], _SHINGLE))
        if not shingles.size:
            yield None
            continue
        sketch = _sketch(rensa, shingles, hashes)
        signature = np.array(sketch.digest(), np.uint32)
        found = None
        for candidate in _most_similar(signature, sorted(index.query(sketch)), signatures):
            similarity = _jaccard(shingles, np.unique(ngram_hashes(documents[candidate], _SHINGLE)))
            if similarity >= threshold:
                found = NearDuplicate(document, candidate, similarity)
                break
        if found is None:
            index.insert(document, sketch)
            signatures[document] = signature
        yield found


def _rensa(threshold: float) -> types.ModuleType:
    """Imports rensa, of the extra `dedup`."""
    try:
        import rensa
    except ImportError as error:
        problem = "near-duplicates need rensa; pip install 'flexolmo-jax[dedup]', or turn them off with 0"
        raise ArgumentError("near", threshold, problem) from error
    return rensa


def _band_hashes(threshold: float) -> int:
    """Returns the most hashes of a band with which LSH has its recall at the threshold.

    Documents of similarity s are candidates with a probability of 1 - (1 - s**hashes)**bands. More hashes give fewer
    candidates.
    """
    enough = [n for n in range(1, _MAX_BAND_HASHES + 1) if 1 - (1 - threshold**n) ** _BANDS >= _RECALL]
    return max(enough, default=1)


def _sketch(rensa: types.ModuleType, shingles: np.ndarray, hashes: int):
    """Makes the MinHash of `shingles`, uint64 [number of shingles]."""
    sketch = rensa.RMinHash(hashes, _SEED)
    for start in range(0, len(shingles), _UPDATE_SHINGLES):
        sketch.update(shingles[start : start + _UPDATE_SHINGLES].view("S8").tolist())
    return sketch


def _most_similar(signature: np.ndarray, candidates: Sequence[int], signatures: dict[int, np.ndarray]) -> list[int]:
    """Returns the candidates whose signatures are most similar, the most similar first, the earlier of equal ones."""
    if not candidates:
        return []
    equal = np.stack([signatures[candidate] for candidate in candidates]) == signature
    order = np.argsort(-np.count_nonzero(equal, axis=1), kind="stable")
    return [candidates[place] for place in order[:_CHECKED]]


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets, sorted arrays without duplicates."""
    shared = np.intersect1d(first, second, assume_unique=True).size
    return shared / (first.size + second.size - shared)
