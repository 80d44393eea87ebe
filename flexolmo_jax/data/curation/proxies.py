"""Proxies: public documents that are like an owner's, so that others can train on them instead.

1. A classifier learns to tell the owner's documents from public ones.
2. It ranks the public documents. Five classifiers are trained, each without a fifth of the documents, and each scores
   that fifth, so that no public document is scored by a classifier that learned to call it public.
3. Of the best documents a determinantal point process chooses ones that differ from each other.

Nothing that is written for others (`Selection.write`) holds text of the owner, or numbers that were computed from it:
only which public documents were chosen. `disclosure` tells the owner what those reveal.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from scipy import sparse
from scipy.special import log_expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from flexolmo_jax.data.corpus import Corpus, check_one_tokenizer
from flexolmo_jax.data.corpus_writer import copy_documents
from flexolmo_jax.data.curation.document_features import (
    EmbeddingFeatures,
    Features,
    Matrix,
    NgramFeatures,
    read_embeddings,
)
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.progress import progress_bar

DIVERSITY = 0.9
FOLDS = 5
SAMPLE = 10_000  # documents of each corpus that classifiers learn from
_FEWEST = 20  # documents that a classifier can learn from
_TOKENS = 1024  # of a document that are looked at, from its beginning
_BATCH = 256  # documents that are scored at once
_CANDIDATES = 10  # times the wanted number, among which diverse ones are chosen
_SHARD = 5000  # candidates that are compared with each other


class Sample(NamedTuple):
    """Documents of a corpus: indices [N], features [N, F], and the fold of each [N], from 0 to 4."""

    indices_N: np.ndarray
    features_NxF: Matrix
    folds_N: np.ndarray


class Accuracy(NamedTuple):
    """How well documents are told apart that a classifier has not seen.

    Attributes:
      accuracy: the mean of the shares of both classes that are told right, at the best threshold; 0.5 is chance.
      auc: area under the ROC curve; 0.5 is chance.
    """

    accuracy: float
    auc: float


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The chosen public documents, and what the report to the owner needs.

    Attributes:
      private: the owner's corpus.
      public: the corpus that was chosen from.
      documents: indices of the chosen documents, in the order of the corpus, which does not tell their ranks.
      features: what makes vectors of documents; fitted to public text alone.
      private_sample: documents of the owner that were learned from.
      public_sample: public documents that were learned from.
      accuracy: of the classifier, on documents that it has not seen.
    """

    private: Corpus
    public: Corpus
    documents: list[int]
    features: Features
    private_sample: Sample
    public_sample: Sample
    accuracy: Accuracy

    def write(self, out: epath.PathLike) -> Corpus:
        """Makes a corpus of the chosen public documents; its `corpus.json` says which they are.

        Raises:
          UserError: `out` exists.
        """
        card = {"source": {"digest": self.public.digest, "documents": self.documents}}
        copy_documents(self.public, self.documents, out, card=card)
        return Corpus.open(out)


class Classifier(NamedTuple):
    """A linear classifier for each fold, which was trained without the documents of the fold."""

    weights_KxF: np.ndarray
    bias_K: np.ndarray

    @classmethod
    def train(cls, first: Sample, second: Sample) -> "Classifier":
        """Trains one for each fold to tell two classes apart."""
        models = [
            fit(*(sample.features_NxF[sample.folds_N != fold] for sample in (first, second))) for fold in range(FOLDS)
        ]
        weights_KxF = np.concatenate([model.coef_ for model in models]).astype(np.float32)
        return cls(weights_KxF, np.concatenate([model.intercept_ for model in models]).astype(np.float32))

    def scores(self, features_NxF: Matrix, folds_N: np.ndarray) -> np.ndarray:
        """Log-odds that a document is of the first class, by the classifier without its fold, float32 [N]."""
        scores_NxK = features_NxF @ self.weights_KxF.T + self.bias_K
        return scores_NxK[np.arange(len(folds_N)), folds_N]


def select_proxies(
    private: Corpus,
    public: Corpus,
    *,
    documents: int | None = None,
    tokens: int | None = None,
    diversity: float = DIVERSITY,
    embedder: epath.PathLike | None = None,
) -> Selection:
    """Chooses public documents that are like the owner's, and unlike each other. Deterministic.

    Memory holds samples of both corpora, candidates, and some 20 bytes a public document.

    Args:
      private: the owner's documents.
      public: the documents to choose from.
      documents: how many to choose; or
      tokens: how many tokens they have together, at least; the last document exceeds it.
      diversity: from 0, the documents that are most like the owner's, to 1.
      embedder: a `.npy` of token embeddings [V, D]; documents are then compared by the mean of these, not by n-grams.

    Raises:
      UserError: the corpora have different tokenizers, or too few documents, or an argument is out of bounds.
    """
    _check(private, public, documents, tokens, diversity)
    table = None if embedder is None else read_embeddings(embedder, public.vocab_size)
    rng = np.random.default_rng(0)
    public_indices, private_indices = (_draw(corpus, rng) for corpus in (public, private))
    public_documents = read_documents(public, public_indices)
    features: Features = (
        NgramFeatures.fit(public_documents) if table is None else EmbeddingFeatures.fit(public_documents, table)
    )
    public_sample = _sample(public, public_indices, public_documents, features)
    private_sample = _sample(private, private_indices, read_documents(private, private_indices), features)
    classifier = Classifier.train(private_sample, public_sample)
    scores_N, costs_N = _score(public, classifier, features, by_tokens=tokens is not None)
    budget = documents or tokens or 0
    chosen = _choose(public, features, scores_N, costs_N, budget, diversity)
    return Selection(
        private=private,
        public=public,
        documents=sorted(chosen.tolist()),
        features=features,
        private_sample=private_sample,
        public_sample=public_sample,
        accuracy=measure(
            *(classifier.scores(sample.features_NxF, sample.folds_N) for sample in (private_sample, public_sample))
        ),
    )


def read_documents(corpus: Corpus, indices: Iterable[int]) -> list[np.ndarray]:
    """The beginnings of documents, without EOS: uint32 [length] each.

    Raises:
      UserError: an id is outside the vocabulary.
    """
    documents = []
    for index in indices:
        ids = np.asarray(corpus[index][:_TOKENS], np.uint32)
        if ids.max() >= corpus.vocab_size:
            corpus.refuse_ids()
        documents.append(ids[ids != corpus.eos_id])
    return documents


def fit(first_NxF: Matrix, second_MxF: Matrix) -> LogisticRegression:
    """Trains a classifier to tell two classes apart, which count the same, whatever their numbers of documents."""
    stack = functools.partial(sparse.vstack, format="csr") if sparse.issparse(first_NxF) else np.vstack
    features: Matrix = stack([first_NxF, second_MxF])
    labels = np.repeat([1, 0], [first_NxF.shape[0], second_MxF.shape[0]])
    dual = features.shape[1] > features.shape[0]  # the faster one
    model = LogisticRegression(class_weight="balanced", solver="liblinear", dual=dual, max_iter=1000, random_state=0)
    return model.fit(features, labels)


def measure(first_scores_N: np.ndarray, second_scores_M: np.ndarray) -> Accuracy:
    """How well log-odds tell two classes apart."""
    scores = np.concatenate([first_scores_N, second_scores_M])
    labels = np.repeat([1, 0], [len(first_scores_N), len(second_scores_M)])
    false_positives, true_positives, _ = roc_curve(labels, scores)
    return Accuracy(float((true_positives + 1 - false_positives).max() / 2), float(roc_auc_score(labels, scores)))


def diverse_order(features_MxF: Matrix, log_quality_M: np.ndarray, diversity: float) -> Iterator[int]:
    """Yields items so that each adds most to the log-determinant of the kernel of those before it.

    That is greedy maximum a posteriori inference for a determinantal point process, by a Cholesky factor to which each
    item adds a vector (Chen, Zhang and Zhou 2018, arXiv 1709.05135): k items take O(M k^2) time and O(M k) memory. Its
    kernel is

        L_ij = q_i q_j S_ij        S_ii = 1        S_ij = diversity * cosine_ij for other items

    Where no item is left that adds to the determinant, those of highest quality come first.

    Args:
      features_MxF: vectors of length 1.
      log_quality_M: log q.
      diversity: from 0, where quality alone decides, to 1.
    """
    count = len(log_quality_M)
    factor_KxM = np.empty((count, count))  # the system maps pages of it as they are written
    residual_M = np.ones(count)  # of S_ii, what the chosen items do not explain
    log_quality_M = log_quality_M.astype(np.float64)
    for step in range(count):
        best = int(np.argmax(2 * log_quality_M + np.log(np.maximum(residual_M, 1e-10))))
        yield best
        chosen_F = features_MxF[best]
        chosen_F = chosen_F.toarray().ravel() if sparse.issparse(chosen_F) else chosen_F
        similarity_M = diversity * (features_MxF @ chosen_F).astype(np.float64)
        similarity_M[best] = 1
        explained_M = factor_KxM[:step, best] @ factor_KxM[:step]
        factor_KxM[step] = (similarity_M - explained_M) / np.sqrt(max(residual_M[best], 1e-10))
        residual_M -= factor_KxM[step] ** 2
        log_quality_M[best] = -np.inf


def _choose(
    public: Corpus, features: Features, scores_N: np.ndarray, costs_N: np.ndarray, budget: int, diversity: float
) -> np.ndarray:
    """Chooses documents whose costs reach the budget; returns their indices, the best first."""
    ranking = np.argsort(-scores_N, kind="stable")
    if not diversity:
        return _reach(ranking, costs_N, budget)
    candidates = _reach(ranking, costs_N, _CANDIDATES * budget)
    num_shards = -(-len(candidates) // _SHARD)
    chosen: list[int] = []
    cost = 0
    for number in range(num_shards):
        # Every shard has documents of all ranks.
        shard = candidates[number::num_shards]
        features_MxF = features(read_documents(public, shard))
        for place in diverse_order(features_MxF, log_expit(scores_N[shard]), diversity):
            if cost >= budget * (number + 1) / num_shards:
                break
            chosen.append(int(shard[place]))
            cost += int(costs_N[shard[place]])
    rest = candidates[~np.isin(candidates, chosen)]
    return _reach(np.concatenate([np.asarray(chosen, np.int64), rest]), costs_N, budget)


def _reach(order: np.ndarray, costs_N: np.ndarray, budget: int) -> np.ndarray:
    """The first indices of an order whose costs reach the budget; all of them if they do not."""
    return order[: np.searchsorted(np.cumsum(costs_N[order]), budget) + 1]


def _score(
    public: Corpus, classifier: Classifier, features: Features, by_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The log-odds of each public document, float32 [N], and what it costs, int64 [N]: its tokens, or 1."""
    scores_N, costs_N = np.empty(len(public), np.float32), np.ones(len(public), np.int64)
    with progress_bar() as bar:
        for start in bar.track(range(0, len(public), _BATCH), description="public documents"):
            batch = range(start, min(start + _BATCH, len(public)))
            documents = read_documents(public, batch)
            scores_N[start : batch.stop] = classifier.scores(features(documents), _folds(documents))
            if by_tokens:
                costs_N[start : batch.stop] = [len(public[index]) for index in batch]
    return scores_N, costs_N


def _draw(corpus: Corpus, rng: np.random.Generator) -> np.ndarray:
    """Indices of a sample of a corpus, in its order."""
    return np.sort(rng.choice(len(corpus), min(len(corpus), SAMPLE), replace=False))


def _sample(corpus: Corpus, indices: np.ndarray, documents: Sequence[np.ndarray], features: Features) -> Sample:
    folds_N = _folds(documents)
    if len(set(folds_N.tolist())) == 1:
        raise UserError(f"{corpus.path}: its documents are copies of each other; give at least {_FEWEST} that differ")
    return Sample(indices, features(documents), folds_N)


def _folds(documents: Sequence[np.ndarray]) -> np.ndarray:
    """The fold of each document, a hash of its tokens: copies share a fold, so that none is scored as unseen."""
    return np.array([zlib.crc32(ids.tobytes()) % FOLDS for ids in documents])


def _check(private: Corpus, public: Corpus, documents: int | None, tokens: int | None, diversity: float) -> None:
    check_one_tokenizer([public, private])
    if private.digest == public.digest:
        raise UserError(f"{private.path}: is the public corpus itself; name the corpus of the owner's documents")
    for corpus in (private, public):
        if len(corpus) < _FEWEST:
            raise UserError(
                f"{corpus.path}: has {len(corpus)} documents, too few to learn from; give at least {_FEWEST}"
            )
    if (documents is None) == (tokens is None):
        raise UserError("either a number of documents or one of tokens says how much to choose; give one of the two")
    for name, wanted, most in (("documents", documents, len(public)), ("tokens", tokens, public.tokens)):
        if wanted is not None and not 1 <= wanted <= most:
            raise ArgumentError(name, wanted, f"{public.path} has {most:,}; give a number from 1 to that")
    if not 0 <= diversity <= 1:
        raise ArgumentError("diversity", diversity, "must be from 0, for similarity alone, to 1")
