"""N-grams of token ids: 64-bit hashes of them, and n-grams that repeat at once."""

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Returns hashes of all n-grams of `ids` [S] in their order: uint64 [S - n + 1], or [0] if `ids` is shorter.

    The time does not depend on n: sums of BASE**i * term[i] from the beginning are differenced, and each difference is
    divided by BASE**(its position). Different n-grams have the same hash with a probability of about 2**-64.
    """
    if len(ids) < n:
        return np.zeros(0, np.uint64)
    terms = _mix((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms * _powers(_BASE, len(ids)))])
    return _mix((sums[n:] - sums[:-n]) * _powers(_INVERSE, len(ids) - n + 1))


def most_repeats(ids: np.ndarray, max_n: int, at_least: int = 2) -> tuple[int, int] | None:
    """Finds the n-gram of at most `max_n` tokens that follows itself most often in `ids` [S].

    In a stretch of L tokens in which each equals the one n before, an n-gram occurs 1 + L // n times in succession.

    Returns:
      The number of times and n, of the shortest of n-grams that occur as often; None if it is less than `at_least`.
    """
    most = None
    for n in range(1, min(max_n, len(ids) - 1) + 1):
        equal = ids[n:] == ids[:-n]
        if np.count_nonzero(equal) >= (at_least - 1) * n:  # otherwise no run is long enough, which is fast to see
            times = 1 + _longest_run(equal) // n
            if times >= at_least:
                most, at_least = (times, n), times + 1
    return most


def _powers(base: int, count: int) -> np.ndarray:
    """Returns base**0, base**1, ... modulo 2**64: uint64 [count]."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers)


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads each bit over all: the finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _longest_run(flags: np.ndarray) -> int:
    """Returns the length of the longest run of True in `flags` [S], fast where there are few."""
    positions = np.flatnonzero(flags)
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    return int(np.diff(starts, append=len(positions)).max(initial=0))
