"""Documents as vectors of unit length, so that inner products are cosines: from n-grams, or from token embeddings."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize

from flexolmo_jax.errors import ArgumentError

BUCKET_BITS = 18
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: multiplicative hashing

Matrix = Any  # float32 [N, F], a NumPy array or a SciPy CSR matrix


class Features(Protocol):
    """A function from documents, each token ids [length] without EOS, to their vectors [N, F]."""

    def __call__(self, documents: Sequence[np.ndarray], /) -> Matrix:
        """Returns float32 [N, F], vectors of length 1, or 0 for a document without tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class NgramFeatures:
    """Counts of unigrams and bigrams of tokens, hashed into 2^18 buckets: 1 + log(count), times idf."""

    weighting: TfidfTransformer

    @classmethod
    def fit(cls, documents: Sequence[np.ndarray]) -> "NgramFeatures":
        """Takes idf, the inverse document frequency of each bucket, from these documents."""
        return cls(TfidfTransformer(sublinear_tf=True).fit(_ngram_counts(documents)))

    def __call__(self, documents: Sequence[np.ndarray]) -> Matrix:
        """Returns a sparse matrix, float32 [N, 2^18]."""
        return self.weighting.transform(_ngram_counts(documents))


@dataclasses.dataclass(frozen=True)
class EmbeddingFeatures:
    """The mean of the embeddings of a document's tokens, less the mean over documents."""

    table_VxD: np.ndarray
    center_D: np.ndarray

    @classmethod
    def fit(cls, documents: Sequence[np.ndarray], table_VxD: np.ndarray) -> "EmbeddingFeatures":
        """Takes the mean over documents from these."""
        return cls(table_VxD, _mean_embeddings(documents, table_VxD).mean(axis=0))

    def __call__(self, documents: Sequence[np.ndarray]) -> Matrix:
        """Returns float32 [N, D]."""
        return normalize(_mean_embeddings(documents, self.table_VxD) - self.center_D)


def read_embeddings(file: epath.PathLike, vocab_size: int) -> np.ndarray:
    """Reads the embeddings of tokens from a `.npy` file, float32 [V, D].

    Raises:
      ArgumentError: it is no array of finite numbers, of at least `vocab_size` vectors.
    """
    right = f"give a .npy of numbers [tokens, dimensions], with the {vocab_size:,} tokens of the corpora's tokenizer"
    try:
        with epath.Path(file).open("rb") as stream:
            table = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ArgumentError("embedder", file, f"is no array ({error}); {right}") from error
    if table.ndim != 2 or len(table) < vocab_size or not np.issubdtype(table.dtype, np.floating):
        raise ArgumentError("embedder", file, f"holds {table.dtype} {list(table.shape)}; {right}")
    if not np.isfinite(table).all():
        raise ArgumentError("embedder", file, f"holds numbers that are not finite; {right}")
    return table.astype(np.float32)


def _ngram_counts(documents: Sequence[np.ndarray]) -> Matrix:
    """How often the n-grams of each bucket are in each document, a sparse matrix, float32 [N, 2^18]."""
    buckets = [_ngram_buckets(ids.astype(np.uint64)) for ids in documents]
    ends = np.cumsum([0, *map(len, buckets)])
    columns = np.concatenate([np.empty(0, np.int32), *buckets])
    ones = np.ones(len(columns), np.float32)
    counts = sparse.csr_matrix((ones, columns, ends), shape=(len(documents), 1 << BUCKET_BITS))
    counts.sum_duplicates()
    return counts


def _ngram_buckets(ids: np.ndarray) -> np.ndarray:
    """The buckets of all unigrams and bigrams of uint64 ids [length], int32 [2 * length - 1]."""
    bigrams = ((ids[:-1] + 1) << 32) + ids[1:]
    hashed = np.concatenate([ids, bigrams]) * _MULTIPLIER
    return (hashed >> (64 - BUCKET_BITS)).astype(np.int32)


def _mean_embeddings(documents: Sequence[np.ndarray], table_VxD: np.ndarray) -> np.ndarray:
    empty_D = np.zeros(table_VxD.shape[1], np.float32)
    return np.stack([table_VxD[ids].mean(axis=0) if ids.size else empty_D for ids in documents])
