"""Batches against packing written out slowly, and against themselves after a resume."""

import itertools
import json

import numpy as np
import pytest

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.pipeline import evaluation_batches, training_batches
from flexolmo_jax.data.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.errors import UserError

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


def slow_sequences(documents, length):
    """Packs documents one token at a time; yields sequences {key: list}, the last one padded with zeros."""
    sequence, segment = {key: [] for key in KEYS}, 0
    for document in documents:
        segment, position, previous = segment + 1, 0, EOS
        for token in document:
            for key, value in zip(KEYS, (previous, token, segment, position), strict=True):
                sequence[key].append(value)
            previous, position = token, position + 1
            if len(sequence["tokens"]) == length:
                yield sequence
                sequence, segment, position = {key: [] for key in KEYS}, 1, 0
        if not sequence["tokens"]:
            segment = 0
    if sequence["tokens"]:
        yield {key: values + [0] * (length - len(values)) for key, values in sequence.items()}


def take_sequences(batches, count):
    """Returns `count` sequences of each key, int32 [count, length]."""
    taken = []
    while sum(len(batch["tokens"]) for batch in taken) < count:
        taken.append(next(batches))
    return {key: np.concatenate([batch[key] for batch in taken])[:count] for key in KEYS}


def assert_sequences_equal(got, expected):
    for key in KEYS:
        assert got[key].dtype == np.int32
        np.testing.assert_array_equal(got[key], expected[key], err_msg=key)


def split_at_eos(targets):
    ends = np.flatnonzero(targets == EOS) + 1
    return [tuple(document) for document in np.split(targets, ends)[:-1]]


@pytest.mark.parametrize(("length", "batch_size"), [(8, 3), (5, 4), (1, 50), (16, 1), (500, 2)])
def test_evaluation_batches_are_the_corpus_in_order(corpus, length, batch_size):
    batches = list(evaluation_batches(corpus, length, batch_size))
    expected = list(slow_sequences(corpus, length))
    assert len(batches) == -(-len(expected) // batch_size)
    assert all(batch[key].shape == (batch_size, length) for batch in batches for key in KEYS)
    got = take_sequences(iter(batches), len(batches) * batch_size)
    padding = {key: np.zeros((len(got[key]) - len(expected), length), np.int32) for key in KEYS}
    slow = {key: np.concatenate([[sequence[key] for sequence in expected], padding[key]]) for key in KEYS}
    assert_sequences_equal(got, slow)
    targets = got["targets"][got["segment_ids"] > 0]
    np.testing.assert_array_equal(targets, np.concatenate(list(corpus)))


def test_every_target_once_per_epoch_in_a_new_order(corpus):
    epochs = 3
    batches = training_batches([([corpus], 1.0)], LENGTH, 2, seed=0)
    targets = take_sequences(batches, -(-epochs * corpus.tokens // LENGTH))["targets"].ravel()
    documents = [tuple(document) for document in corpus]
    orders = [split_at_eos(targets[e * corpus.tokens : (e + 1) * corpus.tokens]) for e in range(epochs)]
    for order in orders:
        assert sorted(order) == sorted(documents)
    assert len({tuple(order) for order in [documents, *orders]}) == epochs + 1


@pytest.mark.parametrize("length", [LENGTH, 5, 100])
def test_training_sequences_are_packed_as_the_slow_version_packs(corpus, length):
    count = 2 * corpus.tokens // length
    batches = training_batches([([corpus], 1.0)], length, 4, seed=3)
    sequences = take_sequences(batches, count)
    # The order is the shuffle's; the rest of the last document, which these sequences cut, is never reached.
    targets = sequences["targets"].ravel()
    documents = [*split_at_eos(targets), targets[np.flatnonzero(targets == EOS)[-1] + 1 :]]
    slow = list(itertools.islice(slow_sequences(documents, length), count))
    assert_sequences_equal(sequences, {key: np.array([sequence[key] for sequence in slow]) for key in KEYS})


@pytest.mark.parametrize("fetched", range(24))
def test_resume_through_json_is_exact(corpus, lower, fetched):
    def start():
        return training_batches([([corpus], 1.0), ([lower, corpus], 2.0)], LENGTH, 1, seed=1)

    batches, resumed = start(), start()
    for _ in range(fetched):
        next(batches)
    state = json.dumps(batches.get_state())
    next(resumed)
    resumed.set_state(json.loads(state))
    assert json.dumps(resumed.get_state()) == state
    assert_sequences_equal(take_sequences(resumed, 30), take_sequences(batches, 30))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.8)])
def test_groups_share_the_sequences_by_weight(corpus, lower, weights):
    batches = training_batches([([corpus], weights[0]), ([lower], weights[1])], LENGTH, 5, seed=0)
    targets = take_sequences(batches, 200)["targets"]
    text = np.where(targets == EOS, 0, targets)
    is_lower = (text >= ord("a")).any(axis=1)
    is_upper = ((text > 0) & (text < ord("a"))).any(axis=1)
    assert (is_lower != is_upper).all()
    expected = np.arange(1, 201) * weights[1] / sum(weights)
    assert np.abs(np.cumsum(is_lower) - expected).max() <= 1


def test_corpora_of_a_group_are_one_set(corpus, lower):
    total = corpus.tokens + lower.tokens
    batches = training_batches([([corpus, lower], 1.0)], LENGTH, 1, seed=0)
    targets = take_sequences(batches, -(-total // LENGTH))["targets"].ravel()[:total]
    assert sorted(split_at_eos(targets)) == sorted(tuple(document) for document in [*corpus, *lower])


def test_the_seed_decides(corpus):
    def sequences(seed, batch_size=2):
        batches = training_batches([([corpus], 1.0)], LENGTH, batch_size, seed)
        taken = take_sequences(batches, 20)
        return taken

    assert_sequences_equal(sequences(0), sequences(0))
    assert_sequences_equal(sequences(0), sequences(0, batch_size=5))
    assert (sequences(0)["targets"] != sequences(1)["targets"]).any()
    # The second epoch of one seed is not the first of the next.
    second = training_batches([([corpus], 1.0)], 1, 1, seed=0)
    take_sequences(second, corpus.tokens)
    epoch = split_at_eos(take_sequences(second, corpus.tokens)["targets"].ravel())
    first = training_batches([([corpus], 1.0)], 1, 1, seed=1)
    assert epoch != split_at_eos(take_sequences(first, corpus.tokens)["targets"].ravel())


def test_a_single_document_repeats(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["abc"], byte_tokenizer())
    batches = training_batches([([corpus], 1.0)], 4, 2, seed=0)
    assert next(batches)["tokens"].tolist() == [[EOS, 97, 98, 99]] * 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_errors(corpus, weight):
    with pytest.raises(UserError, match=f"{corpus.path} has weight {weight}; give a positive number"):
        training_batches([([corpus], 1.0), ([corpus], weight)], LENGTH, 1, seed=0)


@pytest.mark.parametrize("corpora", [[], [([], 1.0)]])
def test_no_corpus(corpora):
    with pytest.raises(UserError, match="no corpus"):
        training_batches(corpora, LENGTH, 1, seed=0)


def test_tokenizers_must_agree(corpus, tmp_path):
    backend = byte_tokenizer().backend
    backend.add_tokens(["extra"])
    other = write_corpus(tmp_path / "other", ["text"], Tokenizer(backend, EOS))
    with pytest.raises(UserError, match=f"^{other.path}: its tokenizer is not that of {corpus.path}"):
        training_batches([([corpus], 1.0), ([other], 1.0)], LENGTH, 1, seed=0)


def damage(corpus, ids):
    """Writes ids {place: id} into the second token file, without changing its size."""
    tokens = np.memmap(corpus.path / "tokens-00001.npy", corpus.dtype.newbyteorder("<"), "r+")
    for place, id_ in ids.items():
        tokens[place] = id_
    tokens.flush()


@pytest.mark.parametrize("id_", [257, 60_000, 65_535])
@pytest.mark.parametrize("batches", [training_batches, evaluation_batches])
def test_ids_outside_the_vocabulary_are_refused(corpus, lower, batches, id_):
    def start():
        if batches is evaluation_batches:
            return evaluation_batches(corpus, LENGTH, 2)
        return training_batches([([lower], 1.0), ([lower, corpus], 1.0)], LENGTH, 2, seed=0)

    for _ in range(10):
        next(start())
    damage(corpus, {3: id_})
    iterator = start()
    with pytest.raises(UserError) as caught:
        list(itertools.islice(iterator, 100))
    assert str(caught.value).startswith(
        f"{corpus.path}/tokens-00001.npy: damaged: the id {id_} at offset 3 (in tokens)"
    )


def test_ids_of_32_bits_are_refused_too(tmp_path):
    """Those above 2**31 are negative in a batch."""
    backend = byte_tokenizer().backend
    backend.add_tokens([f"<{i}>" for i in range(70_000)])
    corpus = write_corpus(tmp_path / "corpus", ["text", "more text"], Tokenizer(backend, EOS), tokens_per_file=3)
    assert corpus.dtype == np.uint32
    next(evaluation_batches(corpus, LENGTH, 2))
    for id_ in (70_300, 2**31 + 5, 2**32 - 1):
        damage(corpus, {2: id_})
        with pytest.raises(UserError, match=f"tokens-00001.npy: damaged: the id {id_} at offset 2"):
            next(evaluation_batches(corpus, LENGTH, 2))


def test_an_eos_outside_the_vocabulary_is_refused(corpus):
    description = json.loads((corpus.path / "corpus.json").read_text())
    (corpus.path / "corpus.json").write_text(json.dumps(description | {"eos_id": 300}))
    with pytest.raises(UserError, match="has no token 300"):
        evaluation_batches(Corpus.open(corpus.path), LENGTH, 2)
