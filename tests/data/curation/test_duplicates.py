"""Duplicates against comparisons of all pairs of documents."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.curation.duplicates import DIGEST, document_digest, first_occurrences, near_duplicates
from flexolmo_jax.errors import ArgumentError


def changed_here_and_there(ids, share, rng):
    """A copy in which a share of the tokens is replaced, each by itself."""
    copy = ids.copy()
    places = rng.choice(len(ids), round(share * len(ids)), replace=False)
    copy[places] = rng.integers(50_000, 60_000, len(places))
    return copy


def changed_in_one_place(ids, share, rng):
    """A copy in which a share of the tokens is replaced, one after the other."""
    copy, length = ids.copy(), round(share * len(ids))
    start = rng.integers(0, len(ids) - length)
    copy[start : start + length] = rng.integers(50_000, 60_000, length)
    return copy


def shingles(ids):
    return {tuple(ids[i : i + 5].tolist()) for i in range(len(ids) - 4)}


def jaccard(first, second):
    return len(shingles(first) & shingles(second)) / len(shingles(first) | shingles(second))


def random_documents(rng, count, length=400):
    return [rng.integers(0, 50_000, length).astype(np.uint16) for _ in range(count)]


def found(documents, threshold=0.8):
    """{index: (original, similarity)} of the near-duplicates."""
    results = list(near_duplicates(documents, range(len(documents)), threshold))
    assert len(results) == len(documents)
    return {duplicate.index: duplicate[1:] for duplicate in results if duplicate is not None}


@given(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1))
@settings(max_examples=50, deadline=None)
def test_the_first_occurrence_is_the_first_equal_document(documents):
    digests = np.array([document_digest(np.array(ids, np.uint16)) for ids in documents], DIGEST)
    assert first_occurrences(digests).tolist() == [documents.index(ids) for ids in documents]


def test_digests_do_not_depend_on_the_dtype():
    ids = np.array([1, 2, 60_000])
    assert document_digest(ids.astype(np.uint16)) == document_digest(ids.astype(np.uint32))
    assert document_digest(np.array([1], np.uint16)) != document_digest(np.array([1, 0], np.uint16))


@pytest.mark.parametrize(
    ("change", "share", "similar"),
    [
        (changed_in_one_place, 0.05, True),  # similarity about 0.89
        (changed_in_one_place, 0.3, False),  # 0.53
        (changed_here_and_there, 0.01, True),  # 0.90
        (changed_here_and_there, 0.05, False),  # 0.64: each token is in five shingles
        (changed_here_and_there, 0.3, False),  # 0.09
    ],
)
def test_changed_copies_are_found_if_they_are_similar_enough(change, share, similar):
    rng = np.random.default_rng(0)
    originals = random_documents(rng, 100)
    copies = [change(ids, share, rng) for ids in originals]
    duplicates = found(originals + copies)
    assert set(duplicates) == (set(range(100, 200)) if similar else set())
    for index, (original, similarity) in duplicates.items():
        assert original == index - 100
        assert similarity == pytest.approx(jaccard(originals[original], copies[original]))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_no_other_documents_are_found_and_nearly_all_at_the_threshold(threshold):
    rng = np.random.default_rng(1)
    originals = random_documents(rng, 200)
    # Of similarities about the threshold: as many of 400 tokens are replaced as give it.
    lengths = 396 * (1 - threshold) / (1 + threshold) - 4 + rng.integers(-3, 4, len(originals))
    copies = [changed_in_one_place(ids, length / 400, rng) for ids, length in zip(originals, lengths, strict=True)]
    similar = {200 + i for i, pair in enumerate(zip(originals, copies, strict=True)) if jaccard(*pair) >= threshold}
    assert 50 < len(similar) < 150
    duplicates = set(found(originals + copies, threshold))
    assert duplicates <= similar
    assert len(duplicates) >= 0.96 * len(similar)


def test_the_first_of_similar_documents_stays_and_drops_those_like_it():
    rng = np.random.default_rng(2)
    (ids,) = random_documents(rng, 1)
    chain = [ids]
    for start in (0, 40, 80, 120):
        chain.append(chain[-1].copy())
        chain[-1][start : start + 30] = rng.integers(50_000, 60_000, 30)
    # Neighbours have a similarity of 0.84. The third is far from the first, so that it stays; the fourth is like it.
    assert {index: original for index, (original, _) in found(chain).items()} == {1: 0, 3: 2}
    assert jaccard(chain[0], chain[2]) < 0.8


def test_the_most_similar_of_those_that_stay_is_named():
    rng = np.random.default_rng(3)
    (ids,) = random_documents(rng, 1)
    first, second, third = ids.copy(), ids.copy(), ids.copy()
    first[:50] = rng.integers(50_000, 60_000, 50)
    third[:10] = rng.integers(50_000, 60_000, 10)
    second[300:] = rng.integers(50_000, 60_000, 100)
    documents = [first, second, ids, third]
    assert jaccard(first, ids) < 0.8
    assert {index: original for index, (original, _) in found([first, ids, third]).items()} == {2: 1}
    assert set(found(documents)) == {3}


def test_many_similar_documents_do_not_hide_one_that_is_similar_enough():
    rng = np.random.default_rng(4)
    (ids,) = random_documents(rng, 1)
    template = [changed_in_one_place(ids, 0.17, rng) for _ in range(60)]  # similar to each other, but not enough
    copy = changed_in_one_place(template[30], 0.02, rng)
    kept = set(range(60)) - set(found(template))
    assert 30 in kept
    assert len(kept) > 20
    assert found([*template, copy])[60][0] == 30


def test_short_documents_have_no_near_duplicates():
    ids = np.arange(4, dtype=np.uint16)
    assert found([ids, ids, np.arange(5, dtype=np.uint16), np.arange(5, dtype=np.uint16)]) == {3: (2, 1.0)}


def test_long_documents_are_sketched_in_chunks(monkeypatch):
    rng = np.random.default_rng(5)
    documents = random_documents(rng, 20) * 2
    expected = found(documents)
    monkeypatch.setattr("flexolmo_jax.data.curation.duplicates._UPDATE_SHINGLES", 7)
    assert found(documents) == expected == {20 + i: (i, 1.0) for i in range(20)}


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ArgumentError, match=r"near=0.8: .*rensa.*flexolmo-jax\[dedup\]"):
        next(near_duplicates([], [], 0.8))
