"""Packing against a plain best fit, and against what it may never do: pad, or lose a token."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.batches.packing import PACKINGS, PackedStream, best_fit, packing_report
from flexolmo_jax.data.batches.stream import Stream
from tests.support.memory_corpora import memory_corpus, random_corpus


@st.composite
def windows(draw):
    """(sizes of documents, length, count) of a window, the last document cut off at its end."""
    length, count = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    sizes, left = [], length * count
    while left:
        sizes.append(min(left, draw(st.integers(1, 2 * length))))
        left -= sizes[-1]
    return sizes, length, count


def arranged(sizes, length, count):
    ends = list(itertools.accumulate(sizes))
    return ends, best_fit(ends, length, count)


@given(windows())
@settings(max_examples=200, deadline=None)
def test_every_token_is_in_one_sequence_and_none_is_padded(window):
    sizes, length, count = window
    ends, sequences = arranged(sizes, length, count)
    assert [sum(stop - start for start, stop in spans) for spans in sequences] == [length] * count
    tokens = sorted(token for spans in sequences for start, stop in spans for token in range(start, stop))
    assert tokens == list(range(length * count))
    for start, stop in itertools.chain(*sequences):
        assert not any(start < end < stop for end in ends), "a span holds tokens of two documents"


@given(windows())
@settings(max_examples=200, deadline=None)
def test_documents_go_where_a_plain_best_fit_puts_them(window):
    sizes, length, count = window
    ends, sequences = arranged(sizes, length, count)
    chunks = []
    for end, size in zip(ends, sizes, strict=True):
        chunks += [(at, min(at + length, end)) for at in range(end - size, end, length)]
    # A plain version: look at every sequence for the one that fits best.
    room, placed, unplaced = [length] * count, set(), []
    for start, stop in sorted(chunks, key=lambda chunk: -(chunk[1] - chunk[0])):
        fits = [free for free in room if free >= stop - start]
        if fits:
            room[room.index(min(fits))] -= stop - start
            placed.add((start, stop))
        else:
            unplaced.append((start, stop))
    found = set(itertools.chain(*sequences))
    assert placed <= found
    assert not set(unplaced) & found, "what fits nowhere is cut"
    assert sum(room) == sum(stop - start for start, stop in unplaced)
    # No more cuts than chunks to cut and gaps to fill make necessary.
    assert len(found) - len(placed) <= len(unplaced) + sum(free > 0 for free in room)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 50),
    st.sampled_from(sorted(PACKINGS)),
)
@settings(max_examples=100, deadline=None)
def test_the_report_counts_as_a_look_at_every_token_does(corpora_sizes, length, packing):
    rng = np.random.default_rng(0)
    corpora = [random_corpus(rng, sizes, files=2) for sizes in corpora_sizes]
    report = packing_report(corpora, length, packing)
    packed = PackedStream(Stream(corpora), length, packing)
    holder = {}
    for sequence in range(-(-report.tokens // length) + packed.window):
        for start, stop in packed.spans(sequence):
            holder |= dict.fromkeys(range(start, stop), sequence)
    documents = [document for corpus in corpora for document in corpus]
    starts = itertools.accumulate(map(len, documents), initial=0)
    cut = [
        len(document)
        for start, document in zip(starts, documents, strict=False)
        if len({holder[start + place] for place in range(len(document))}) > 1
    ]
    assert (report.documents, report.tokens) == (len(documents), sum(map(len, documents)))
    assert (report.cut_documents, report.cut_tokens, report.padding) == (len(cut), sum(cut), 0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_report_of_first_tokens_is_that_of_a_corpus_which_ends_there(packing):
    whole, beginning = (random_corpus(np.random.default_rng(0), [7] * count) for count in (600, 512))
    limit = beginning.tokens  # whole windows
    assert limit % (8 * 64) == 0
    assert packing_report([whole], 8, packing, limit) == packing_report([beginning], 8, packing)


def test_best_fit_cuts_far_fewer_documents():
    sizes = np.random.default_rng(1).geometric(1 / 60, 5000)
    corpus = random_corpus(np.random.default_rng(2), sizes.tolist())
    cut = {packing: packing_report([corpus], 256, packing).cut_documents for packing in PACKINGS}
    assert cut["concatenate"] > 900
    assert cut["best_fit"] < cut["concatenate"] / 5


def test_a_window_is_no_longer_than_the_stream():
    for tokens, length, window in ((1000, 10, 64), (635, 10, 63), (19, 10, 1), (5, 10, 1)):
        corpus = memory_corpus([[[1] * (tokens - 1)]])
        assert PackedStream(Stream([corpus]), length, "best_fit").window == window


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_reads_no_tokens(packing, monkeypatch):
    corpus = random_corpus(np.random.default_rng(0), [30] * 50)
    monkeypatch.delitem(corpus.__dict__, "_arrays")
    packed = PackedStream(Stream([corpus]), 20, packing)
    assert sum(stop - start for start, stop in packed.spans(5)) == 20
    assert "_arrays" not in corpus.__dict__
