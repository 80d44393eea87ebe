"""Mixtures: counts in closed form against counting, and shares."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.batches.mixture import Mixture

WEIGHTS = st.lists(st.floats(0, 1000).filter(lambda weight: weight == 0 or weight > 1e-3), min_size=3, max_size=3)
PHASES = st.lists(st.tuples(st.integers(1, 60), WEIGHTS.filter(any)), min_size=1, max_size=4)


@given(PHASES)
@settings(max_examples=100, deadline=None)
def test_each_source_gives_its_sequences_one_after_another(lengths):
    firsts = [sum(length for length, _ in lengths[:index]) for index in range(len(lengths))]
    mixture = Mixture([(first, weights) for first, (_, weights) in zip(firsts, lengths, strict=True)])
    counts = [0, 0, 0]
    for index in range(sum(length for length, _ in lengths) + 20):
        assert mixture.counts(index) == counts
        source, number = mixture.locate(index)
        assert number == counts[source]
        counts[source] += 1


@given(PHASES)
@settings(max_examples=100, deadline=None)
def test_every_phase_has_its_own_shares(lengths):
    firsts = [sum(length for length, _ in lengths[:index]) for index in range(len(lengths))]
    mixture = Mixture([(first, weights) for first, (_, weights) in zip(firsts, lengths, strict=True)])
    for first, (length, weights) in zip(firsts, lengths, strict=True):
        for size in range(1, length + 1):
            counts = [b - a for a, b in zip(mixture.counts(first), mixture.counts(first + size), strict=True)]
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - size * weight / sum(weights)) <= 1.25
                assert weight or not count


@pytest.mark.parametrize("share", [Fraction("0.15"), 0.5, 0.01, Fraction(1, 3)])
def test_of_two_sources_each_has_its_share_in_every_interval(share):
    mixture = Mixture([(0, [1 - share, share])])
    counts = [mixture.counts(total)[1] for total in range(1001)]
    assert max(abs(count - total * share) for total, count in enumerate(counts)) <= 0.5
    if counts[1000] == 1000 * share:
        return
    assert share == Fraction(1, 3)


def test_shares_stay_exact_far_into_a_run():
    sources = [2370.0, 201.9, 158.0, 102.2, 83.0, 58.6, 20.3, 9.9]
    mixture = Mixture([(0, sources)])
    total = 10**15
    for count, weight in zip(mixture.counts(total), sources, strict=True):
        assert abs(count - total * Fraction(weight) / sum(map(Fraction, sources))) <= 1
    source, number = mixture.locate(total)
    assert number == mixture.counts(total)[source]
