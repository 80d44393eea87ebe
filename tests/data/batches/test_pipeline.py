"""Batches against packing written out slowly, and against themselves made by other processes."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.batches.mixture import Mixture
from flexolmo_jax.data.batches.packing import PACKINGS
from flexolmo_jax.data.batches.pipeline import EvaluationBatches, Source, TrainingBatches
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.errors import UserError
from tests.support.memory_corpora import random_corpus

EOS = 256
KEYS = ("tokens", "targets", "segment_ids", "positions")
LENGTH = 8
# With EOS: shorter than a sequence, exactly one or two sequences, and longer.
SIZES = [2, 7, 30, 15, 1, 7, 5, 23, 9, 7, 3, 7]


def make_corpus(path, first: str, sizes=SIZES) -> Corpus:
    """Makes documents of the given sizes, in which every byte is between `first` and 31 bytes later."""
    texts = ["".join(chr(ord(first) + (5 * i + j) % 31) for j in range(size)) for i, size in enumerate(sizes)]
    return write_corpus(path, texts, byte_tokenizer(), tokens_per_file=40)


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus", "A")


@pytest.fixture
def lower(tmp_path):
    return make_corpus(tmp_path / "lower", "a", [11, 4, 19])


def assert_sequences_equal(got, expected):
    for key in KEYS:
        assert got[key].dtype == np.int32
        np.testing.assert_array_equal(got[key], expected[key], err_msg=key)


def training(*groups, length=LENGTH, batch_size=2, seed=0, packing="concatenate"):
    """Batches of groups of (corpora, weight)."""
    sources = [Source(str(index), corpora) for index, (corpora, _) in enumerate(groups)]
    mixture = Mixture([(0, [weight for _, weight in groups])])
    return TrainingBatches(sources, mixture, length, batch_size, seed, packing)


def slow_stream(corpora):
    """Of each token of the corpora: (the token, the one before it or EOS, whether a document begins with it)."""
    documents = [document.tolist() for corpus in corpora for document in corpus]
    return [
        (token, document[place - 1] if place else EOS, place == 0)
        for document in documents
        for place, token in enumerate(document)
    ]


def slow_sequence(stream, start, length):
    """The sequence that begins at a token of an endless stream, one token at a time: {key: list}."""
    sequence, segment, position = {key: [] for key in KEYS}, 0, 0
    for place in range(start, start + length):
        token, previous, begins = stream[place % len(stream)]
        if begins or place == start:
            segment, position = segment + 1, 0
        for key, value in zip(KEYS, (previous, token, segment, position), strict=True):
            sequence[key].append(value)
        position += 1
    return sequence


@pytest.mark.parametrize(("length", "batch_size"), [(8, 3), (5, 4), (1, 50), (16, 1), (500, 2)])
def test_evaluation_batches_are_the_corpus_in_order(corpus, length, batch_size):
    batches = list(EvaluationBatches(corpus, length, batch_size))
    stream = slow_stream([corpus])
    count = -(-len(stream) // length)
    assert len(batches) == -(-count // batch_size)
    assert all(batch[key].shape == (batch_size, length) for batch in batches for key in KEYS)
    got = {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}
    expected = {key: np.zeros((len(batches) * batch_size, length), np.int32) for key in KEYS}
    for number in range(count):
        size = min(length, len(stream) - number * length)
        for key, values in slow_sequence(stream, number * length, size).items():
            expected[key][number, :size] = values
    assert_sequences_equal(got, expected)
    targets = got["targets"][got["segment_ids"] > 0]
    np.testing.assert_array_equal(targets, np.concatenate(list(corpus)))


SIZES_OF_CORPORA = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=10), min_size=1, max_size=3)


@given(SIZES_OF_CORPORA, st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_concatenated_sequences_are_those_of_the_slow_version_each_once_an_epoch(sizes, length, files, seed):
    rng = np.random.default_rng(seed)
    corpora = [random_corpus(rng, of_corpus, files) for of_corpus in sizes]
    stream = slow_stream(corpora)
    batches = training((corpora, 1.0), length=length, seed=seed)
    left = [slow_sequence(stream, start, length) for start in range(0, 3 * len(stream), length)]
    expected = sorted(list(sequence.values()) for sequence in left)
    got = batches.sequences(range(len(left)))
    assert sorted([got[key][place].tolist() for key in KEYS] for place in range(len(left))) == expected


@given(SIZES_OF_CORPORA, st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_best_fit_sequences_have_each_token_once_an_epoch_in_segments_of_documents(sizes, length, files, seed):
    rng = np.random.default_rng(seed)
    corpora = [random_corpus(rng, of_corpus, files) for of_corpus in sizes]
    stream = slow_stream(corpora)
    window = min(64, max(1, len(stream) // length))
    windows = -(-2 * len(stream) // (window * length))
    got = training((corpora, 1.0), length=length, seed=seed, packing="best_fit").sequences(range(windows * window))
    assert (got["segment_ids"] > 0).all()
    tokens = collections.Counter(stream[place % len(stream)][:2] for place in range(windows * window * length))
    assert collections.Counter(zip(got["targets"].ravel(), got["tokens"].ravel(), strict=True)) == tokens
    starts = np.diff(got["segment_ids"], axis=1, prepend=0)
    assert set(np.unique(starts)) <= {0, 1}
    np.testing.assert_array_equal(got["positions"] == 0, starts == 1)
    within = starts[:, 1:] == 0
    np.testing.assert_array_equal(got["tokens"][:, 1:][within], got["targets"][:, :-1][within])
    assert (got["targets"][:, :-1][within] != EOS).all(), "a segment has tokens of two documents"
    np.testing.assert_array_equal(np.diff(got["positions"], axis=1)[within], 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_have_the_same_documents_in_another_order(corpus, packing):
    batches = training(([corpus], 1.0), length=1, packing=packing)
    size = corpus.tokens
    epochs = [batches.sequences(range(number * size, (number + 1) * size))["targets"].ravel() for number in range(3)]
    whole = np.concatenate(list(corpus))
    assert all(sorted(epoch) == sorted(whole) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [whole, *epochs]}) == 4


@st.composite
def restarts(draw):
    """Numbers of processes, and how many batches each of these runs takes."""
    return draw(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4)), min_size=1, max_size=5))


@given(SIZES_OF_CORPORA, st.integers(1, 30), restarts(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_runs_on_other_numbers_of_processes_have_the_same_batches(sizes, length, runs, seed):
    """Mixed, packed data; every start has nothing but the number of the step before it."""
    rng = np.random.default_rng(seed)
    corpora = [random_corpus(rng, of_corpus) for of_corpus in sizes]

    def start():
        sources = [Source(str(index), [corpus]) for index, corpus in enumerate(corpora)]
        weights = list(range(1, len(corpora) + 1))
        mixture = Mixture([(0, weights), (19, weights[::-1])])
        return TrainingBatches(sources, mixture, length, 8, seed, "best_fit")

    alone, step = start(), 0
    for processes, count in runs:
        of_processes = [start() for _ in range(processes)]
        for number in range(step, step + count):
            each = 8 // processes
            shards = [
                batches.sequences(range(8 * number + each * index, 8 * number + each * (index + 1)))
                for index, batches in enumerate(of_processes)
            ]
            assert_sequences_equal(
                {key: np.concatenate([shard[key] for shard in shards]) for key in KEYS}, alone.batch(number)
            )
        step += count


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.8)])
def test_sources_share_the_sequences_by_weight(corpus, lower, weights):
    batches = training(([corpus], weights[0]), ([lower], weights[1]), batch_size=5)
    targets = batches.sequences(range(200))["targets"]
    text = np.where(targets == EOS, 0, targets)
    is_lower = (text >= ord("a")).any(axis=1)
    is_upper = ((text > 0) & (text < ord("a"))).any(axis=1)
    assert (is_lower != is_upper).all()
    expected = np.arange(1, 201) * weights[1] / sum(weights)
    assert np.abs(np.cumsum(is_lower) - expected).max() <= 0.5 + 1e-9
    count = int(is_lower.sum())
    assert batches.taken(40) == {
        "0": ((200 - count) * LENGTH, (200 - count) * LENGTH / corpus.tokens),
        "1": (count * LENGTH, count * LENGTH / lower.tokens),
    }


def test_the_seed_decides(corpus):
    def sequences(seed, batch_size=2):
        batches = training(([corpus], 1.0), batch_size=batch_size, seed=seed)
        made = [batches.batch(number) for number in range(20 // batch_size)]
        return {key: np.concatenate([batch[key] for batch in made]) for key in KEYS}

    assert_sequences_equal(sequences(0), sequences(0))
    assert_sequences_equal(sequences(0), sequences(0, batch_size=5))
    assert (sequences(0)["targets"] != sequences(1)["targets"]).any()


def test_sources_with_the_same_data_have_different_orders(corpus):
    targets = training(([corpus], 1.0), ([corpus], 1.0)).sequences(range(30))["targets"]
    assert (targets[::2] != targets[1::2]).any()


def test_a_single_document_repeats(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["abc"], byte_tokenizer())
    assert training(([corpus], 1.0), length=4).batch(0)["tokens"].tolist() == [[EOS, 97, 98, 99]] * 2
    longer = training(([corpus], 1.0), length=10).batch(0)
    assert longer["segment_ids"].tolist() == [[1] * 4 + [2] * 4 + [3] * 2, [1] * 2 + [2] * 4 + [3] * 4]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_file_that_does_not_end_with_eos_ends_its_last_document(corpus, packing):
    """As such a file of another program may."""
    damage(corpus, {-1: 65}, file=0)
    batches = training(([Corpus.open(corpus.path)], 1.0), length=1, packing=packing)
    made = batches.sequences(range(corpus.tokens))
    counts = collections.Counter(zip(made["tokens"].ravel().tolist(), made["targets"].ravel().tolist(), strict=True))
    stream = np.concatenate([np.fromfile(corpus.path / file["name"], corpus.dtype) for file in corpus.files])
    begins = np.cumsum([file["tokens"] for file in corpus.files])[0]
    before = np.roll(stream, 1)
    before[begins] = EOS
    assert counts == collections.Counter(zip(before.tolist(), stream.tolist(), strict=True))


@pytest.mark.parametrize("sources", [[], [Source("none", [])]])
def test_no_corpus(sources):
    with pytest.raises(UserError, match="no corpus"):
        TrainingBatches(sources, Mixture([(0, [1])]), LENGTH, 1)


def test_tokenizers_must_agree(corpus, tmp_path):
    backend = byte_tokenizer().backend
    backend.add_tokens(["extra"])
    other = write_corpus(tmp_path / "other", ["text"], Tokenizer(backend, EOS))
    with pytest.raises(UserError, match=f"^{other.path}: its tokenizer is not that of {corpus.path}"):
        training(([corpus], 1.0), ([other], 1.0))


def test_text_of_a_corpus_is_read_by_offset(corpus):
    whole = np.concatenate(list(corpus))
    ends = np.cumsum([len(document) for document in corpus])
    file_starts = np.cumsum([0, *(file["tokens"] for file in corpus.files)])[:-1]
    assert len(file_starts) > 2
    for start, stop in itertools.combinations(range(0, corpus.tokens + 1, 3), 2):
        np.testing.assert_array_equal(corpus.read(start, stop), whole[start:stop])
        np.testing.assert_array_equal(corpus.document_ends(start, stop), ends[(ends > start) & (ends <= stop)])
        found = file_starts[(file_starts >= start) & (file_starts < stop)]
        np.testing.assert_array_equal(corpus.file_starts(start, stop), found)


def damage(corpus, ids, file=1):
    """Writes ids {place: id} into a token file, by default the second one, without changing its size."""
    tokens = np.memmap(corpus.path / f"tokens-{file:05}.npy", corpus.dtype.newbyteorder("<"), "r+")
    for place, id_ in ids.items():
        tokens[place] = id_
    tokens.flush()


@pytest.mark.parametrize("id_", [257, 60_000, 65_535])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_ids_outside_the_vocabulary_are_refused(corpus, lower, kind, id_):
    def start():
        if kind == "evaluation":
            return EvaluationBatches(corpus, LENGTH, 2)
        return training(([lower], 1.0), ([lower, corpus], 1.0))

    start().sequences(range(20))
    damage(corpus, {3: id_})
    with pytest.raises(UserError) as caught:
        start().sequences(range(100))
    assert str(caught.value).startswith(
        f"{corpus.path}/tokens-00001.npy: damaged: the id {id_} at offset 3 (in tokens)"
    )


def test_ids_of_32_bits_are_refused_too(tmp_path):
    """Those above 2**31 are negative in a batch."""
    backend = byte_tokenizer().backend
    backend.add_tokens([f"<{i}>" for i in range(70_000)])
    corpus = write_corpus(tmp_path / "corpus", ["text", "more text"], Tokenizer(backend, EOS), tokens_per_file=3)
    assert corpus.dtype == np.uint32
    EvaluationBatches(corpus, LENGTH, 2).batch(0)
    for id_ in (70_300, 2**31 + 5, 2**32 - 1):
        damage(corpus, {2: id_})
        with pytest.raises(UserError, match=f"tokens-00001.npy: damaged: the id {id_} at offset 2"):
            EvaluationBatches(corpus, LENGTH, 2).batch(0)


def test_an_eos_outside_the_vocabulary_is_refused(corpus):
    description = json.loads((corpus.path / "corpus.json").read_text())
    (corpus.path / "corpus.json").write_text(json.dumps(description | {"eos_id": 300}))
    with pytest.raises(UserError, match="has no token 300"):
        EvaluationBatches(Corpus.open(corpus.path), LENGTH, 2)
