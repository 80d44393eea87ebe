"""Shared n-grams against sets of tuples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.curation.contamination import HeldOutNgrams, Match

DOCUMENTS = st.lists(st.lists(st.integers(0, 2), max_size=12).map(lambda ids: np.array(ids, np.uint16)), max_size=8)


def ngrams(ids, n):
    return {tuple(ids[i : i + n].tolist()) for i in range(len(ids) - n + 1)}


def shares(held_out, training, n):
    """Of each held-out document the share of n-grams in training documents, computed from sets."""
    in_training = set().union(*(ngrams(ids, n) for ids in training))
    return [len(ngrams(ids, n) & in_training) / max(1, len(ngrams(ids, n))) for ids in held_out]


def keep_uncontaminated(index, training, limit):
    """The training documents without a marked n-gram, as the command keeps them."""
    index.mark(limit)
    kept = []
    for ids in training:
        if index.match(ids) is None:
            kept.append(ids)
        else:
            index.remove(ids)
    return kept


def counted(held_out, training, n):
    index = HeldOutNgrams(held_out, n)
    for ids in training:
        index.add(ids)
    return index


@given(DOCUMENTS, DOCUMENTS, st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_shares_are_those_of_sets(held_out, training, n):
    index = HeldOutNgrams(held_out, n)
    for ids in training:
        shared = set().union(*(ngrams(document, n) for document in held_out)) & ngrams(ids, n)
        assert index.add(ids) == bool(shared)
    assert index.shares.tolist() == shares(held_out, training, n)
    assert index.sizes.tolist() == [len(ngrams(ids, n)) for ids in held_out]
    for count, ids in enumerate(training, 1):
        index.remove(ids)
        assert index.shares.tolist() == shares(held_out, training[count:], n)


@given(DOCUMENTS, DOCUMENTS, st.integers(1, 4), st.sampled_from([0, 0.25, 0.5, 0.7, 1]))
@settings(max_examples=50, deadline=None)
def test_no_share_is_above_the_limit_without_the_documents_that_match(held_out, training, n, limit):
    index = counted(held_out, training, n)
    above = {i for i, share in enumerate(index.shares) if share > limit}
    kept = keep_uncontaminated(index, training, limit)
    assert index.shares.tolist() == shares(held_out, kept, n)
    assert all(share <= limit for share in shares(held_out, kept, n))
    assert len(kept) == len(training) or above
    if limit == 0:
        held = set().union(*(ngrams(ids, n) for ids in held_out))
        assert [ids.tolist() for ids in kept] == [ids.tolist() for ids in training if not ngrams(ids, n) & held]


def test_a_copied_document_costs_its_copies_not_all_that_share_a_licence():
    rng = np.random.default_rng(0)
    licence = np.arange(100, dtype=np.uint16)
    bodies = rng.integers(1000, 60_000, (60, 150)).astype(np.uint16)
    documents = [np.concatenate([licence, body]) for body in bodies]
    held_out, training = documents[:1], documents[1:]
    index = counted(held_out, training, 13)
    assert index.shares[0] == pytest.approx(88 / 238)  # of the licence alone
    assert len(keep_uncontaminated(index, training, 0.5)) == 59
    training.insert(20, bodies[0])
    index = counted(held_out, training, 13)
    assert index.shares[0] == pytest.approx((88 + 138) / 238)
    index.mark(0.5)
    matches = {i: match for i, ids in enumerate(training) if (match := index.match(ids))}
    assert matches == {20: Match(0, pytest.approx(138 / 238))}


def test_a_document_in_many_others_is_found_though_none_holds_much_of_it():
    ids = np.random.default_rng(1).integers(0, 60_000, 200).astype(np.uint16)
    training = [ids[start : start + 20] for start in range(0, 200, 20)]  # 8 of its 188 n-grams each
    index = counted([ids], training, 13)
    assert index.shares[0] == pytest.approx(80 / 188)
    assert len(keep_uncontaminated(index, training, 0.3)) == 7
    assert index.shares[0] == pytest.approx(56 / 188)


def test_the_match_is_the_contaminated_document_that_is_held_most():
    first, second, third = np.random.default_rng(2).integers(0, 60_000, (3, 100)).astype(np.uint16)
    index = HeldOutNgrams([first, second, third], 13)
    ids = np.concatenate([first[:70], second[:90], third[:20]])
    assert index.add(ids)
    index.mark(0.5)
    assert index.match(ids) == Match(1, pytest.approx(78 / 88))
    index = counted([first, second, third], [ids, third], 13)
    index.mark(0.99)
    assert index.match(ids) is None or index.match(ids).document == 2


def test_short_documents_have_no_ngrams():
    index = counted([np.arange(12, dtype=np.uint16)], [np.arange(20, dtype=np.uint16)], 13)
    assert (index.sizes.tolist(), index.shares.tolist()) == ([0], [0])
    assert HeldOutNgrams([], 13).add(np.arange(20, dtype=np.uint16)) is False
