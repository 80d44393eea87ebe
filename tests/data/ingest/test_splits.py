"""Splits of documents by a hash of their text."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.ingest.splits import Splits, parse_splits
from flexolmo_jax.errors import UserError

SHARES = {"train": "0.9", "validation": "0.07", "test": "0.03"}
TEXT = "train:0.9,validation:0.07,test:0.03"


def test_reads_names_and_shares_in_order():
    splits = parse_splits(TEXT)
    assert list(splits.shares.items()) == list(SHARES.items())
    assert parse_splits("all:1").index("any text") == 0


@settings(deadline=None)
@given(st.text())
def test_the_rule_is_that_of_the_documentation(text):
    """Docs/formats.md, in floating point, which is exact enough unless a hash is within 2**-50 of a bound."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"flexolmo").digest()
    place = sum(byte << (8 * i) for i, byte in enumerate(digest)) / 2.0**64
    expected = 0 if place < 0.9 else 1 if place < 0.97 else 2
    assert parse_splits(TEXT).index(text) == expected


def test_known_documents_stay_where_they_are():
    splits = parse_splits("train:.5,test:.5")
    assert [splits.index(text) for text in ("", "a", "b", "naïve", "a\n")] == [1, 1, 0, 0, 1]
    assert [parse_splits("train:.5,test:.5", "other").index(text) for text in ("", "a", "b", "naïve", "a\n")] != [
        splits.index(text) for text in ("", "a", "b", "naïve", "a\n")
    ]


def test_shares_are_what_is_drawn():
    splits, counts = parse_splits(TEXT), [0, 0, 0]
    for number in range(5000):
        counts[splits.index(f"document {number}")] += 1
    for count, share in zip(counts, SHARES.values(), strict=True):
        mean = 5000 * float(share)
        assert abs(count - mean) < 5 * (mean * (1 - float(share))) ** 0.5


@settings(deadline=None)
@given(st.text())
def test_a_smaller_first_share_only_moves_documents_out_of_it(text):
    before, after = parse_splits("train:0.9,test:0.1"), parse_splits("train:0.8,test:0.2")
    assert before.index(text) <= after.index(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", r"'train' is not NAME:SHARE"),
        ("train:0.5,", r"'' is not NAME:SHARE"),
        ("train:1.5", r"'train:1.5' is not NAME:SHARE"),
        ("train:-0.5,test:1.5", "is not NAME:SHARE"),
        ("train:1,test:0.0", "'test:0.0' is not NAME:SHARE"),
        ("../train:1", "is not NAME:SHARE"),
        (".:1", "is not NAME:SHARE"),
        ("train:0.9,test:0.2", "its shares add up to 1.1, not 1"),
        ("a:0.5,a:0.5", "names 'a' twice"),
    ],
)
def test_refuses_what_makes_no_sense(text, message):
    with pytest.raises(UserError, match=f"^split={text}: .*{message}"):
        parse_splits(text)


@pytest.mark.parametrize("key", ["", "x" * 65])
def test_refuses_a_key_that_blake2_does_not_take(key):
    with pytest.raises(UserError, match=r"split_key=.*1 to 64 bytes"):
        parse_splits("all:1", key)


def test_shares_that_are_no_binary_fractions_add_up():
    splits = Splits({str(i): "0.1" for i in range(10)})
    assert {splits.index(str(number)) for number in range(500)} == set(range(10))
