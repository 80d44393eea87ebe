"""What benchmarks/selection.py compares: policies, and the evidence by which they select an expert."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.model.selectors import BUCKETS, NATS_PER_TOKEN, SMOOTHING, NgramSelector, Statistics

WINDOW = 32  # tokens of a mean that the discriminant's covariances are of
SHRINKAGE = 1e-3  # share of the mean variance that is added to each variance

# (evidence [batch, length, experts] of each token, bool [experts]) -> log of the unnormalized weights
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]


def decay(rate: float) -> Policy:
    """Evidence is a sum in which older tokens count less, by this factor for each token."""

    def weights(evidence: np.ndarray, is_on: np.ndarray) -> np.ndarray:
        totals = np.where(is_on, evidence, -np.inf)
        for t in range(1, evidence.shape[1]):
            totals[:, t] += np.where(is_on, rate * totals[:, t - 1], 0)
        return totals

    return weights


def fixed_share(rate: float) -> Policy:
    """The posterior of a hidden Markov model that changes to a random expert at this rate for each token."""

    def weights(evidence: np.ndarray, is_on: np.ndarray) -> np.ndarray:
        evidence = np.where(is_on, evidence, -np.inf)
        likelihood = np.exp(evidence - evidence.max(axis=-1, keepdims=True))
        prior = posterior = is_on / is_on.sum()
        posteriors = np.empty_like(evidence)
        for t in range(evidence.shape[1]):
            joint = ((1 - rate) * posterior + rate * prior) * likelihood[:, t]
            posteriors[:, t] = posterior = joint / joint.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            return np.log(posteriors)

    return weights


def change_detection(threshold: float) -> Policy:
    """Evidence is a sum since the last change. Page's test finds changes, one for each expert against the chosen one.

    Where the evidence for an expert has risen by the threshold, in nats over that for the chosen one, there was a
    change where the rise began.
    """

    def weights(evidence: np.ndarray, is_on: np.ndarray) -> np.ndarray:
        total, rise, totals = np.zeros_like(evidence[:, 0]), np.zeros_like(evidence[:, 0]), np.empty_like(evidence)
        for t in range(evidence.shape[1]):
            chosen, new = np.where(is_on, total, -np.inf).argmax(axis=-1)[:, None], evidence[:, t]
            rise = np.maximum(rise + new - np.take_along_axis(new, chosen, axis=-1), 0)
            rise = np.where(is_on & (np.arange(rise.shape[-1]) != chosen), rise, 0)
            is_change = rise.max(axis=-1, keepdims=True) > threshold
            total, rise = np.where(is_change, rise, total + new), np.where(is_change, 0, rise)
            totals[:, t] = total
        return np.where(is_on, totals, -np.inf)

    return weights


# Evidence, [batch, length, experts] for each token, 0 for the anchor


class Ngrams(NgramSelector):
    """The selector with n-grams of another order, or smoothed towards public text by so many of its tokens."""

    def __init__(self, n: int, public_tokens: float = 0):
        """Sets both; 0: smoothed by equal counts, as the selector does it."""
        self.n, self.public_tokens = n, public_tokens

    def order(self, architecture: Any) -> int:
        """As given."""
        return self.n

    def tables(self, statistics: Sequence[Statistics]) -> dict[str, np.ndarray]:
        """As the selector's, unless smoothed towards public text."""
        if not self.public_tokens:
            return super().tables(statistics)
        counts = np.stack([s["ngram/counts"] for s in statistics], axis=1).astype(np.float64)
        public = _probability(counts[:, :1])
        owners = (counts + self.public_tokens * public) / (counts.sum(axis=0) + self.public_tokens)
        ratio = np.log(owners / public)
        ratio[:, 0] = 0
        return {"log_ratio": (NATS_PER_TOKEN * ratio).astype(np.float32)}

    def evidence(self, statistics: Sequence[Statistics], tokens_BxS: np.ndarray) -> np.ndarray:
        """The evidence of each token."""
        has_context_BxS = np.broadcast_to(np.arange(tokens_BxS.shape[1]) >= self.n - 1, tokens_BxS.shape)
        tokens_BxT = np.pad(tokens_BxS, ((0, 0), (self.n - 1, 0)))
        tables = {name: jnp.asarray(table) for name, table in self.tables(statistics).items()}
        return np.asarray(self.token_evidence(tables, tokens_BxT, has_context_BxS), np.float64)  # pyright: ignore


def typical_evidence(statistics: Sequence[Statistics]) -> np.ndarray:
    """What a token of each owner's text has for that owner, mean [experts]; each n-gram without its own count."""
    public, typical = _probability(statistics[0]["ngram/counts"]), [0.0]
    for owner in statistics[1:]:
        counts = owner["ngram/counts"].astype(np.float64)
        others = np.maximum(counts - 1 + SMOOTHING, SMOOTHING) / (counts.sum() - 1 + SMOOTHING * BUCKETS)
        typical.append(NATS_PER_TOKEN * float(np.sum(counts / counts.sum() * np.log(others / public))))
    return np.array(typical)


def discriminant(sums: Sequence[np.ndarray], covariance: str) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminants between each owner's text and public text.

    Args:
      sums: for each expert, the anchor first: [windows, d_model], means of hidden states of `WINDOW` tokens.
      covariance: "pooled" of all owners, "public", or "pair" (the owner's and the public one).

    Returns:
      (directions [d_model, experts], offsets [experts]): x @ directions + offsets is the evidence of a token.
    """
    means, covariances = [m.mean(axis=0) for m in sums], [np.cov(m.T, bias=True) for m in sums]
    directions, offsets = [np.zeros_like(means[0])], [0.0]
    for mean, owner in zip(means[1:], covariances[1:], strict=True):
        parts = {"pooled": covariances, "public": covariances[:1], "pair": [owner, covariances[0]]}[covariance]
        matrix = np.mean(parts, axis=0)
        np.fill_diagonal(matrix, matrix.diagonal() + SHRINKAGE * matrix.diagonal().mean())
        # A sum over WINDOW tokens is WINDOW times their mean.
        directions.append(np.linalg.solve(matrix, mean - means[0]) / WINDOW)
        offsets.append(float(-directions[-1] @ (mean + means[0]) / 2))
    return np.stack(directions, axis=1), np.array(offsets)


def _probability(counts: np.ndarray) -> np.ndarray:
    return (counts + SMOOTHING) / (counts.sum() + SMOOTHING * BUCKETS)
