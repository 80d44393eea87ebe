"""Which source each sequence of a run comes from: a closed form of weights, which may change from phase to phase."""

import bisect
import itertools
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Mixes the sequences of sources, so that every stretch of a phase has each source's share.

    The source with the largest weight gets every sequence at which its share of all so far, rounded, rises. The others
    share what it leaves in the same manner. With two sources, of the first n sequences each has its share to within
    half a sequence; with more, to within about one.

    Attributes:
      firsts: the first sequence of each phase.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float | Fraction]]]):
        """Takes phases: each one's first sequence, and the weight of each source, 0 or more. The first begins at 0."""
        self.firsts = [first for first, _ in phases]
        self._shares = [_shares(weights) for _, weights in phases]
        # Of each source, the sequences that it has before each phase.
        self._before = [[0] * len(phases[0][1])]
        for (start, stop), shares in zip(itertools.pairwise(self.firsts), self._shares[:-1], strict=True):
            self._before.append(_added(self._before[-1], shares, stop - start))

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a sequence of the run, and which of the source's sequences it is."""
        phase = bisect.bisect_right(self.firsts, index) - 1
        rest = index - self.firsts[phase]
        for source, numerator, denominator in self._shares[phase]:
            count = _rounded(rest * numerator, denominator)
            if _rounded((rest + 1) * numerator, denominator) > count:
                return source, self._before[phase][source] + count
            rest -= count
        raise AssertionError("the last source takes every sequence that is left")

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` sequences each source has."""
        phase = max(0, bisect.bisect_left(self.firsts, total) - 1)
        return _added(self._before[phase], self._shares[phase], total - self.firsts[phase])


def _shares(weights: Sequence[float | Fraction]) -> list[tuple[int, int, int]]:
    """(source, numerator, denominator): its share of what sources with larger weights leave, in that order."""
    order = sorted((source for source, weight in enumerate(weights) if weight), key=lambda source: -weights[source])
    left, shares = sum(Fraction(weights[source]) for source in order), []
    for source in order:
        share = Fraction(weights[source]) / left
        shares.append((source, share.numerator, share.denominator))
        left -= Fraction(weights[source])
    return shares


def _added(counts: Sequence[int], shares: Sequence[tuple[int, int, int]], total: int) -> list[int]:
    """The counts after `total` more sequences of a phase."""
    counts = list(counts)
    for source, numerator, denominator in shares:
        count = _rounded(total * numerator, denominator)
        counts[source] += count
        total -= count
    return counts


def _rounded(numerator: int, denominator: int) -> int:
    """The nearest integer to a fraction; halves are rounded up."""
    return (2 * numerator + denominator) // (2 * denominator)
