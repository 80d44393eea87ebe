"""Differential privacy of statistics: bounded documents, Gaussian noise, a projection (docs/privacy.md).

What a document adds to a vector of sums is scaled down to an L2 norm of at most `clip`. So the sums with a document and
those with an empty one in its place differ by at most `clip`, and Gaussian noise of a standard deviation of
`noise_multiplier * clip` in each sum makes them (epsilon, delta)-differentially private. What is computed from the
noised sums alone is as private as they are.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from flexolmo_jax.errors import ArgumentError, UserError

CARD_KEY = "statistics_privacy"  # of the data card
MECHANISM, PRIVACY_UNIT = "gaussian", "document"
EPSILONS, DELTAS, CLIPS = (0.1, 100), (1e-10, 0.1), (1.0, 2.0**16)  # at least, below
# Sums and noise are multiples of this. All sums are then exact, and the low bits of floating-point noise, which depend
# on what it is added to, do not get out.
UNIT = 2.0**-16
OUTLYING = 5  # standard deviations, which noise alone hardly exceeds
# The generator of the operating system: whoever knows the seed of noise can remove it.
GAUSS = random.SystemRandom().gauss


@dataclasses.dataclass(frozen=True)
class Privacy:
    """A guarantee for one release of statistics, and the noise that it takes.

    Attributes:
      epsilon: how much a document may change the probability of what is released: by a factor of e^epsilon.
      delta: the probability with which it may change more.
      clip: L2 norm of a document's counts above which they are scaled down to it.
      noise_multiplier: standard deviation of the noise in each sum, divided by `clip`.
    """

    epsilon: float
    delta: float
    clip: float
    noise_multiplier: float

    @property
    def stddev(self) -> float:
        """The standard deviation of the noise in each sum."""
        return self.noise_multiplier * self.clip

    def card(self) -> dict[str, Any]:
        """What the data card says under `CARD_KEY`."""
        return {"mechanism": MECHANISM, "unit": PRIVACY_UNIT, **dataclasses.asdict(self)}

    def release(self, documents: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
        """The sums of documents' counts, bounded, noised and projected, float64 [size]; each call is another release.

        Args:
          documents: of each, (indices, positive counts there); no index twice in a document.
          size: length of the vector.
        """
        sums = np.zeros(size, np.int64)
        for indices, counts in documents:
            sums[indices] += bounded(counts, self.clip)
        return project(add_noise(sums, self.stddev), self.stddev)


def make_privacy(epsilon: float, delta: float, clip: float, documents: int, section: str = "") -> Privacy | None:
    """The guarantee that was asked for; None without one (epsilon 0).

    Args:
      epsilon: as in `Privacy`, or 0.
      delta: as in `Privacy`.
      clip: as in `Privacy`.
      documents: how many are summed.
      section: of the configuration, where these are keys of it ("config.publish."); errors name it.

    Raises:
      ArgumentError: a value is out of its bounds, or a delta gives no protection to so many documents.
      UserError: dp-accounting is not installed.
    """
    if not epsilon:
        return None
    bounds = {"epsilon": (epsilon, EPSILONS), "delta": (delta, DELTAS), "clip": (clip, CLIPS)}
    for name, (value, (low, high)) in bounds.items():
        if not low <= value < high:
            or_none = " (0: no noise)" if name == "epsilon" else ""
            raise ArgumentError(section + name, value, f"must be at least {low:g} and below {high:g}{or_none}")
    if delta * documents >= 1:
        problem = f"must be below 1 / {documents}, the number of documents, or one of them may be disclosed"
        raise ArgumentError(section + "delta", delta, problem)
    return Privacy(epsilon, delta, clip, noise_multiplier(epsilon, delta))


def privacy_words(card: Any) -> str:
    """What a data card says under `CARD_KEY`, in plain words; it may say anything, or nothing (None)."""
    try:
        guarantee = Privacy(**{field.name: float(card[field.name]) for field in dataclasses.fields(Privacy)})
    except (KeyError, TypeError, ValueError):
        return "no guarantee" if card is None else f"not understood ({card})"
    return (
        f"by its owner's word, noised so that the text of one document changes the probability of what is published by "
        f"a factor of at most e^{guarantee.epsilon:g}, but for a probability of {guarantee.delta:g}"
    )


def noise_multiplier(epsilon: float, delta: float) -> float:
    """The standard deviation of Gaussian noise for one release of sums that a document changes by at most 1.

    Raises:
      UserError: dp-accounting is not installed.
    """
    try:
        import dp_accounting  # pyright: ignore[reportMissingImports]
        from dp_accounting import pld, rdp  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"epsilon={epsilon:g}: the package dp-accounting is needed to compute the noise ({error}); install "
            "flexolmo-jax[privacy], or give epsilon=0 for statistics without noise"
        ) from error

    def calibrate(make_accountant: Callable[[], Any], **options: Any) -> float:
        return dp_accounting.calibrate_dp_mechanism(
            make_accountant, dp_accounting.GaussianDpEvent, epsilon, delta, **options
        )

    # Renyi DP gives an upper bound at once, up to a tenth too large; privacy loss distributions are exact.
    high = calibrate(rdp.RdpAccountant)
    bracket = dp_accounting.ExplicitBracketInterval(high / 2, high)
    step = min(1e-2, epsilon / 100)  # of losses, rounded up
    return calibrate(
        lambda: pld.PLDAccountant(value_discretization_interval=step), bracket_interval=bracket, tol=1e-3 * high
    )


def bounded(counts: np.ndarray, clip: float) -> np.ndarray:
    """Counts in multiples of `UNIT`, int64, scaled and rounded down to an L2 norm of at most `clip`."""
    norm = np.linalg.norm(counts)
    # A little less, so that no rounding error exceeds the bound.
    scale = 1.0 if norm <= clip else clip / norm * (1 - 2.0**-40)
    return np.floor(counts * (scale / UNIT)).astype(np.int64)


def add_noise(sums: np.ndarray, stddev: float) -> np.ndarray:
    """Sums (int64 [size], multiples of `UNIT`) with Gaussian noise of that standard deviation in each, float64."""
    noise = np.array([GAUSS(0.0, stddev) for _ in range(sums.size)])
    return (sums + np.rint(noise / UNIT).astype(np.int64)) * UNIT


def project(noised: np.ndarray, stddev: float) -> np.ndarray:
    """The closest vector that is valid: no negative element, and the same sum; it is max(noised - t, 0) for some t.

    The noise of the sum can exceed all text: the sum is at least that of what stands out of noise of `stddev`.
    """
    total = max(noised.sum(), noised[noised > OUTLYING * stddev].sum(), UNIT)
    descending = np.sort(noised)[::-1]
    thresholds = (np.cumsum(descending) - total) / np.arange(1, noised.size + 1)
    above = np.flatnonzero(descending > thresholds)[-1]
    return np.maximum(noised - thresholds[above], 0)
