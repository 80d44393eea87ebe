"""Selectors: statistics, tables and evidence against plain loops, however text is cut, packed and batched."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from flexolmo_jax.model import selectors
from flexolmo_jax.model.selectors import BUCKETS, DECAY, NATS_PER_TOKEN, SELECTORS, SMOOTHING, NgramSelector
from tests.support import tiny

NGRAM = NgramSelector()
EOS = 7
ORDERS = {100_000: 1, 2048: 2, 257: 3}  # vocabulary: n
EXPERTS = 3
FAULTS = {
    "negative": {"counts": lambda counts: np.where(np.arange(BUCKETS) == 5, -1, counts)},
    "infinite": {"counts": lambda counts: np.where(np.arange(BUCKETS) == 5, np.inf, counts)},
    "not a number": {"counts": lambda counts: np.where(np.arange(BUCKETS) == 5, np.nan, counts)},
    "too many": {"counts": lambda counts: np.full(BUCKETS, 1e308)},
    "none": {"counts": np.zeros_like},
    "too few buckets": {"counts": lambda counts: counts[:-1]},
    "a matrix": {"counts": lambda counts: counts.reshape(2, -1)},
    "other documents": {"documents": lambda documents: documents + 1},
    "an unknown number of documents": {"documents": lambda documents: documents * np.nan},
    "several numbers of documents": {"documents": lambda documents: np.array([documents, 0])},
    "no documents": {"documents": None},
    "another leaf": {"mean": lambda _: np.ones(3)},
}


def sized(vocab_size):
    return dataclasses.replace(tiny.ARCHITECTURE, vocab_size=vocab_size)


def random_documents(vocab_size, seed=0, number=40):
    """Documents of 1 to 12 tokens, each terminated by EOS, as a corpus has them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, number)
    documents = [rng.integers(0, vocab_size - 1, length) for length in lengths]
    return [np.append(tokens + (tokens >= EOS), EOS).astype(np.uint32) for tokens in documents]


def bucket(tokens):
    """The bucket of one n-gram, with Python's integers: the last token is hashed first."""
    value = 0
    for token in reversed(tokens):
        value = (value * 0x9E3779B1 + int(token) + 1) % 2**32
    return value * 0x85EBCA6B % 2**32 // 2**16


def count_slowly(documents, order):
    """Every n-gram of a document that is read after one EOS, if it is long enough."""
    counts = np.zeros(BUCKETS, np.int64)
    for document in documents:
        tokens = [EOS, *document.tolist()]
        for end in range(1, len(tokens)):
            if end + 1 >= order:
                counts[bucket(tokens[end + 1 - order : end + 1])] += 1
    return counts


def random_statistics(seed, total=5000):
    """Counts of a random text, which leaves most buckets empty."""
    rng = np.random.default_rng(seed)
    counts = np.bincount(rng.integers(0, 300, total) ** 2 % BUCKETS, minlength=BUCKETS)
    return {"ngram/counts": counts, "ngram/documents": np.array(9)}


@pytest.fixture(scope="module")
def tables():
    """Random tables of three experts, the anchor's 0."""
    table = np.random.default_rng(0).normal(size=(BUCKETS, EXPERTS)).astype(np.float32)
    table[:, 0] = 0
    return {"log_ratio": table}


@pytest.mark.parametrize("block", [0, 1, 20, 10**9])
@pytest.mark.parametrize("vocab_size", ORDERS)
def test_counts_are_those_of_a_plain_loop_whatever_is_read_at_once(monkeypatch, vocab_size, block):
    monkeypatch.setattr(selectors, "BLOCK", block)
    documents, architecture = random_documents(vocab_size), sized(vocab_size)
    assert NGRAM.order(architecture) == ORDERS[vocab_size]
    assert NGRAM.context(architecture) == ORDERS[vocab_size] - 1
    found = NGRAM.statistics(iter(documents), architecture, EOS)
    np.testing.assert_array_equal(found["ngram/counts"], count_slowly(documents, ORDERS[vocab_size]))
    assert found["ngram/documents"] == len(documents)
    assert NGRAM.problem(found, len(documents)) is None


@pytest.mark.parametrize("vocab_size", ORDERS)
def test_a_document_without_text_has_no_n_gram_but_its_eos(vocab_size):
    order = ORDERS[vocab_size]
    found = NGRAM.statistics([np.array([EOS], np.uint16)], sized(vocab_size), EOS)
    np.testing.assert_array_equal(found["ngram/counts"], count_slowly([np.array([EOS])], order))
    assert found["ngram/counts"].sum() == (order < 3)


@pytest.mark.parametrize("vocab_size", ORDERS)
def test_statistics_are_sums(vocab_size):
    """Those of two corpora add up to those of both together."""
    corpora = [random_documents(vocab_size, seed) for seed in (0, 1)]
    both = NGRAM.statistics(itertools.chain(*corpora), sized(vocab_size), EOS)
    first, second = (NGRAM.statistics(corpus, sized(vocab_size), EOS) for corpus in corpora)
    for leaf, expected in both.items():
        np.testing.assert_array_equal(first[leaf] + second[leaf], expected)


def test_tables_are_the_closed_form():
    statistics = [random_statistics(seed) for seed in range(EXPERTS)]
    (found,) = NGRAM.tables(statistics).values()
    assert found.dtype == np.float32
    assert {"log_ratio": found.shape} == NGRAM.table_shapes(EXPERTS)
    logs = []
    for leaves in statistics:
        counts = leaves["ngram/counts"].astype(np.float64)
        logs.append(np.log(counts + SMOOTHING) - np.log(counts.sum() + SMOOTHING * BUCKETS))
    assert not found[:, 0].any()
    for i in (1, 2):
        expected = NATS_PER_TOKEN * (logs[i] - logs[0])
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-6, atol=1e-6)


def test_an_owners_table_does_not_depend_on_the_others():
    statistics = [random_statistics(seed) for seed in range(EXPERTS)]
    (every,), (second,) = NGRAM.tables(statistics).values(), NGRAM.tables(statistics[::2]).values()
    np.testing.assert_array_equal(every[:, ::2], second)


@pytest.mark.parametrize("fault", FAULTS)
def test_statistics_that_are_not_valid_have_a_problem(fault):
    statistics = random_statistics(0)
    assert NGRAM.problem(statistics, 9) is None
    for leaf, change in FAULTS[fault].items():
        value = statistics.pop(f"ngram/{leaf}", None)
        if change:
            statistics[f"ngram/{leaf}"] = change(value)
    assert "ngram/" in (NGRAM.problem(statistics, 9) or "")


def test_noised_counts_are_valid_and_documents_need_not_be_known():
    statistics = random_statistics(0) | {"ngram/counts": np.full(BUCKETS, 0.25, np.float32)}
    assert NGRAM.problem(statistics, None) is None
    assert NGRAM.problem(statistics, 9) is None


def evidence_of(document, tables, order):
    """Of one document, in a plain loop in float64."""
    evidence, result = np.zeros(EXPERTS), []
    for end in range(len(document)):
        evidence = evidence * DECAY
        if end >= order - 1:
            evidence = evidence + tables["log_ratio"][bucket(document[end - order + 1 : end + 1])]
        result.append(evidence)
    return np.array(result)


def advance(vocab_size, tables, tokens, positions, is_token=None, state=None):
    """`selectors.advance`, from the start where no state is given."""
    if state is None:
        state = selectors.new_state(NGRAM, sized(vocab_size), len(tokens), EXPERTS)
    evidence, state = JITTED(NGRAM, tables, state, tokens, positions, is_token)
    return np.asarray(evidence), state


JITTED = jax.jit(selectors.advance, static_argnums=0)
LENGTHS = [[9, 1, 2, 13], [2, 20, 3], [25]]


@pytest.mark.parametrize("vocab_size", ORDERS)
def test_evidence_is_that_of_a_plain_loop_over_each_packed_document(tables, vocab_size):
    batch = tiny.random_batch(LENGTHS, 25, vocab_size=vocab_size)
    found, _ = advance(vocab_size, tables, batch["tokens"], batch["positions"])
    assert found.shape == (3, 25, EXPERTS)
    assert found.dtype == np.float32
    for i, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            expected = evidence_of(batch["tokens"][i, document], tables, ORDERS[vocab_size])
            np.testing.assert_allclose(found[i, document], expected, atol=1e-5)
            start += length


@pytest.mark.parametrize("sizes", [[1] * 10 + [2, 12], [16, 8], [2, 1, 1, 12, 8]], ids=str)
@pytest.mark.parametrize("vocab_size", [100_000, 257])
def test_however_a_sequence_is_cut_its_evidence_has_the_same_bits(tables, vocab_size, sizes):
    batch = tiny.random_batch([[10, 14]], 24, vocab_size=vocab_size)
    tokens, positions = batch["tokens"], batch["positions"]
    expected, last = advance(vocab_size, tables, tokens, positions)
    state, found, start = None, [], 0
    for size in sizes:
        chunk = slice(start, start + size)
        part, state = advance(vocab_size, tables, tokens[:, chunk], positions[:, chunk], None, state)
        found.append(part)
        start += size
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    jax.tree.map(np.testing.assert_array_equal, state, last)


@pytest.mark.parametrize("vocab_size", [100_000, 257])
def test_padding_and_other_sequences_change_no_bit(tables, vocab_size):
    """Prompts of several lengths, padded, read in chunks; each as it is alone, and its state too."""
    lengths = np.array([16, 2, 12, 0, 1])
    tokens = np.random.default_rng(1).integers(0, vocab_size, (5, 24), dtype=np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    state, found = None, []
    for start in range(0, 24, 8):
        chunk = slice(start, start + 8)
        is_token = positions[:, chunk] < lengths[:, None]
        part, state = advance(vocab_size, tables, tokens[:, chunk], positions[:, chunk], is_token, state)
        found.append(part)
    found = np.concatenate(found, axis=1)
    for i, length in enumerate(lengths):
        alone = tokens[i : i + 1, :length], positions[i : i + 1, :length]
        if length:
            expected, last = advance(vocab_size, tables, *alone)
            np.testing.assert_array_equal(found[i, :length], expected[0])
        else:
            last = selectors.new_state(NGRAM, sized(vocab_size), 1, EXPERTS)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y[0]), state, last)


def test_evidence_forgets():
    """What was read a hundred tokens ago weighs less than a twentieth of what is read now."""
    table = np.zeros((BUCKETS, EXPERTS), np.float32)
    table[bucket([1]), 1], table[bucket([2]), 2] = 1, 1
    tokens = np.repeat([[1] * 200 + [2] * 100], 1, axis=0).astype(np.int32)
    found, _ = advance(100_000, {"log_ratio": table}, tokens, np.arange(300, dtype=np.int32)[None])
    assert found[0, 199, 1] == pytest.approx(1 / (1 - DECAY), rel=0.01)
    assert found[0, 299, 1] < found[0, 299, 2] / 20
    switch = int(np.argmax(found[0, 200:, 2] > found[0, 200:, 1]))
    assert switch < 32


@pytest.mark.parametrize(
    ("selection", "selector", "router"),
    [("router", None, True), ("ngram", "ngram", False), ("router+ngram", "ngram", True)],
)
def test_a_selection_names_what_plays_a_part(selection, selector, router):
    assert selection in selectors.SELECTIONS
    assert selectors.selector_of(selection) is (SELECTORS[selector] if selector else None)
    assert selectors.uses_router(selection) == router
    statistics = [random_statistics(seed) for seed in range(EXPERTS)]
    leaves = selectors.derived_leaves(selection, statistics)
    assert leaves.keys() == ({"selector/log_ratio"} if selector else set())
    assert all(map(selectors.is_derived, leaves))
    assert selectors.derived_leaves(selection, statistics[:1]) == {}
    assert not selectors.is_derived(selectors.LOG_SCALE)
