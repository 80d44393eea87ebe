"""Hashes of n-grams against the n-grams themselves, and repetitions against a search of every place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.curation.ngrams import most_repeats, ngram_hashes

DOCUMENTS = st.lists(st.integers(0, 3), max_size=40).map(lambda ids: np.array(ids, np.uint16))


def plain_ngrams(ids, n):
    return [tuple(ids[i : i + n].tolist()) for i in range(len(ids) - n + 1)]


def plain_repeats(ids, max_n):
    """The most times that an n-gram follows itself, and the shortest such n."""
    most = (1, 1)
    for n in range(1, max_n + 1):
        for start in range(len(ids) - n + 1):
            times = 1
            while (ids[start + times * n : start + (times + 1) * n].tolist()) == ids[start : start + n].tolist():
                times += 1
            if times > most[0]:
                most = (times, n)
    return most


@given(DOCUMENTS, DOCUMENTS, st.integers(1, 14))
@settings(max_examples=50, deadline=None)
def test_ngrams_have_the_same_hash_exactly_if_they_are_equal(first, second, n):
    ngrams = plain_ngrams(first, n) + plain_ngrams(second, n)
    hashes = np.concatenate([ngram_hashes(first, n), ngram_hashes(second, n)]).tolist()
    assert len(hashes) == len(ngrams)
    assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))


def test_hashes_depend_neither_on_place_nor_dtype():
    ids = np.random.default_rng(0).integers(0, 60_000, 50_000)
    hashes = ngram_hashes(ids.astype(np.uint16), 13)
    np.testing.assert_array_equal(hashes[49_000:], ngram_hashes(ids[49_000:].astype(np.uint32), 13))
    assert hashes.dtype == np.uint64
    assert len(set(hashes.tolist())) == len(hashes)


def test_hashes_have_even_bits():
    # Of n-grams that differ little: ids that count up. A bit of 10,000 random hashes is set 5,000 +- 50 times.
    hashes = ngram_hashes(np.arange(10_004, dtype=np.uint16), 5)
    bits = [np.count_nonzero(hashes >> np.uint64(bit) & np.uint64(1)) for bit in range(64)]
    assert 4_700 < min(bits) <= max(bits) < 5_300


@given(DOCUMENTS, st.integers(1, 5), st.integers(2, 4))
@settings(max_examples=50, deadline=None)
def test_repeats_are_those_of_a_search_of_every_place(ids, max_n, at_least):
    expected = plain_repeats(ids, max_n)
    assert most_repeats(ids, max_n, at_least) == (expected if expected[0] >= at_least else None)


@pytest.mark.parametrize("n", range(1, 15))
@pytest.mark.parametrize("times", [31, 32])
def test_ngrams_of_at_most_13_tokens_that_repeat_32_times_are_found(n, times):
    around = np.arange(1000, 1100, dtype=np.uint16)
    ids = np.concatenate([around, np.tile(np.arange(n, dtype=np.uint16), times), around])
    assert most_repeats(ids, 13, 32) == ((32, n) if times == 32 and n <= 13 else None)
