"""Public documents that are like an owner's: a planted domain is found, copies are passed over, nothing else leaves."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import models, pre_tokenizers

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.corpus_writer import copy_documents, write_corpus
from flexolmo_jax.data.curation import proxies
from flexolmo_jax.data.curation.disclosure import disclosure, disclosure_tables
from flexolmo_jax.data.curation.document_features import EmbeddingFeatures, NgramFeatures
from flexolmo_jax.data.curation.proxies import diverse_order, select_proxies
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer, byte_tokenizer
from flexolmo_jax.errors import UserError
from tests.support import small

COMMON, DOMAIN, SECRET = ([f"{name}{a}{b}" for a in "abcdefghij" for b in "abcdefgh"] for name in ("com", "dom", "sec"))
PLANTED = range(100, 320, 11)  # public documents of the domain
COPIES = PLANTED[5:10]  # near copies of the first of them


def word_tokenizer():
    vocabulary = ["<|endoftext|>", "unknown", *COMMON, *DOMAIN, *SECRET]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "unknown"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, eos_id=0)


def texts(rng, count, words, share, length=60):
    """Texts of common words, and of others with that share."""
    return [
        " ".join(rng.choice(words if rng.random() < share else COMMON) for _ in range(length)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The owner's corpus, of the domain with secret words; and a public one with a few documents of the domain."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("proxies")
    private = texts(rng, 60, [*DOMAIN, *SECRET], 0.5)
    public = texts(rng, 400, DOMAIN, 0.01)
    for place in PLANTED:
        (public[place],) = texts(rng, 1, DOMAIN, 0.4)
    for number, place in enumerate(COPIES):
        public[place] = public[COPIES[0]].rsplit(" ", 1)[0] + f" {COMMON[number]}"
    made = (write_corpus(folder / name, t, word_tokenizer()) for name, t in (("private", private), ("public", public)))
    return tuple(made)


def test_a_planted_domain_is_found(corpora):
    selection = select_proxies(*corpora, documents=len(PLANTED), diversity=0)
    assert selection.documents == [*PLANTED]
    assert selection.accuracy.auc > 0.9  # all but the planted ones are told apart
    assert selection.accuracy.accuracy > 0.9


def test_diversity_passes_copies_over(corpora):
    """Of the planted documents, all that differ are chosen, and a single one of the copies, before any other."""
    diverse, ranked = (set(select_proxies(*corpora, documents=18, diversity=d).documents) for d in (0.9, 0))
    assert len(diverse & set(PLANTED)) == len(PLANTED) - len(COPIES) + 1
    assert len(diverse & set(COPIES)) == 1
    assert len(ranked & set(COPIES)) > 1


def test_candidates_in_several_shards_are_as_many_as_wanted(corpora, monkeypatch):
    monkeypatch.setattr(proxies, "_SHARD", 15)
    documents = select_proxies(*corpora, documents=8).documents
    assert len(documents) == len(set(documents)) == 8
    assert set(documents) <= set(PLANTED)


@pytest.mark.parametrize("diversity", [0, 0.9])
@pytest.mark.parametrize(("tokens", "documents"), [(1, 1), (61, 1), (62, 2), (400 * 61, 400)])
def test_documents_are_chosen_until_they_have_the_tokens(corpora, diversity, tokens, documents):
    assert len(select_proxies(*corpora, tokens=tokens, diversity=diversity).documents) == documents


def test_documents_of_one_kind_cannot_be_told_apart(tmp_path):
    """Classifiers are measured on documents that they have not seen, or they would tell all of them."""
    rng = np.random.default_rng(0)
    same = [write_corpus(tmp_path / name, texts(rng, 150, DOMAIN, 0.3), word_tokenizer()) for name in ("a", "b")]
    accuracy = select_proxies(*same, documents=5).accuracy
    assert 0.35 < accuracy.accuracy < 0.65
    assert 0.35 < accuracy.auc < 0.65


def test_documents_that_were_learned_from_rank_like_others(tmp_path, monkeypatch):
    """No public document is scored by a classifier that has learned that it is public."""
    monkeypatch.setattr(proxies, "SAMPLE", 100)
    rng = np.random.default_rng(1)
    private, public = (
        write_corpus(tmp_path / name, texts(rng, count, DOMAIN, 0.3), word_tokenizer())
        for name, count in (("private", 100), ("public", 200))
    )
    selection = select_proxies(private, public, documents=60, diversity=0)
    assert 15 < len(set(selection.documents) & set(selection.public_sample.indices_N.tolist())) < 45


def test_only_public_documents_leave(corpora, tmp_path):
    private, public = corpora
    out = select_proxies(private, public, documents=30).write(tmp_path / "out")
    record = json.loads((out.path / "corpus.json").read_text())
    indices = record["source"]["documents"]
    assert record["source"] == {"digest": public.digest, "documents": sorted(set(indices))}
    assert [ids.tolist() for ids in out] == [public[index].tolist() for index in indices]
    # Whoever knows the indices and the public corpus makes the same directory, byte for byte.
    copy_documents(public, indices, tmp_path / "copy", card={"source": record["source"]})
    assert small.files(tmp_path / "out") == small.files(tmp_path / "copy")
    secret = {private.tokenizer().backend.token_to_id(word) for word in SECRET}
    assert secret & set(np.concatenate(list(private)).tolist())
    assert not secret & set(np.concatenate(list(out)).tolist())


def test_the_choice_is_deterministic(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(proxies, "SAMPLE", 40)  # which documents are learned from is drawn too
    for name in "ab":
        select_proxies(*map(Corpus.open, (corpus.path for corpus in corpora)), tokens=900).write(tmp_path / name)
    assert small.files(tmp_path / "a") == small.files(tmp_path / "b")


def slow_order(features_MxF, log_quality_M, diversity):
    """The greedy choice by determinants, one for each candidate."""
    kernel = diversity * features_MxF @ features_MxF.T
    np.fill_diagonal(kernel, 1)
    quality = np.exp(log_quality_M)
    kernel *= quality[:, None] * quality
    chosen = []
    while len(chosen) < len(kernel):
        rest = [item for item in range(len(kernel)) if item not in chosen]
        subsets = [np.ix_([*chosen, item], [*chosen, item]) for item in rest]
        chosen.append(rest[int(np.argmax([np.linalg.slogdet(kernel[subset])[1] for subset in subsets]))])
    return chosen


@pytest.mark.parametrize("diversity", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_choice_is_that_of_determinants(seed, diversity):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((25, 30)) + 1
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    log_quality = np.log(rng.uniform(0.2, 1, 25))
    expected = slow_order(features, log_quality, diversity)
    assert [*diverse_order(features, log_quality, diversity)] == expected
    assert [*diverse_order(sparse.csr_matrix(features), log_quality, diversity)] == expected
    assert (expected == np.argsort(-log_quality).tolist()) == (diversity == 0)


def test_items_that_add_nothing_come_by_quality():
    features = np.repeat(np.eye(2), 3, axis=0)  # two vectors, three times each
    log_quality = np.log([0.5, 0.9, 0.6, 0.4, 0.7, 0.8])
    assert [*diverse_order(features, log_quality, 1.0)] == [1, 5, 4, 2, 0, 3]


def test_ngram_features_are_those_of_scikit_learn(corpora):
    _, public = corpora
    documents = proxies.read_documents(public, range(40))
    words = [" ".join(map(str, ids)) for ids in documents]
    features = NgramFeatures.fit(documents)(documents)
    reference = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), sublinear_tf=True).fit_transform(words)
    assert features.dtype == np.float32
    np.testing.assert_allclose((features @ features.T).toarray(), (reference @ reference.T).toarray(), atol=0.01)


def test_documents_can_be_compared_by_embeddings(corpora, tmp_path):
    table = np.random.default_rng(0).standard_normal((corpora[1].vocab_size, 400))
    documents = [np.array([5, 6, 6]), np.array([], int)]
    features = EmbeddingFeatures(table, table[3])(documents)
    expected = (table[5] + 2 * table[6]) / 3 - table[3]
    np.testing.assert_allclose(features[0], expected / np.linalg.norm(expected))
    np.save(tmp_path / "table.npy", table)
    selection = select_proxies(*corpora, documents=len(PLANTED), diversity=0, embedder=tmp_path / "table.npy")
    assert len(set(selection.documents) & set(PLANTED)) >= 0.8 * len(PLANTED)


def test_the_report_says_what_the_list_reveals(corpora):
    selection = select_proxies(*corpora, documents=len(PLANTED), diversity=0)
    report = disclosure(selection)
    assert len(report["terms"]) == 20
    assert {term["term"] for term in report["terms"]} <= set(DOMAIN)
    assert all(term["list"] > term["public"] for term in report["terms"])
    assert report["stranger"]["auc"] > 0.95
    assert report["nearest"]["median"] > report["nearest"]["median_of_others"]
    assert report["nearest"]["near_copies"] == 0
    assert [len(table.columns) for table in disclosure_tables(report)] == [3, 3, 3]
    # A random list tells a stranger nothing.
    random = np.random.default_rng(0).choice([i for i in range(400) if i not in PLANTED], 40, replace=False)
    unrelated = disclosure(dataclasses.replace(selection, documents=sorted(random.tolist())))
    assert unrelated["stranger"]["auc"] < 0.8
    everything = disclosure(dataclasses.replace(selection, documents=[*range(400)]))
    assert everything["stranger"] is None
    assert everything["nearest"]["median_of_others"] is None
    assert len(disclosure_tables(everything)) == 3


def test_the_report_names_documents_that_the_owner_has_too(corpora, tmp_path):
    private, public = corpora
    tokenizer = public.tokenizer()
    copied = [tokenizer.decode(public[index]) for index in range(300)]
    copied[41] = tokenizer.decode(private[7])
    with_copy = write_corpus(tmp_path / "public", copied, tokenizer)
    nearest = disclosure(select_proxies(private, with_copy, documents=10))["nearest"]
    assert nearest["near_copies"] == 1
    assert (nearest["pairs"][0]["public"], nearest["pairs"][0]["private"]) == (41, 7)
    assert nearest["pairs"][0]["cosine"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": 401}, r"^documents=401: .*public has 400; give a number from 1 to that"),
        ({"documents": 0}, "^documents=0: "),
        ({"tokens": 400 * 61 + 1}, r"^tokens=24401: .*public has 24,400; "),
        ({}, "give one of the two"),
        ({"documents": 1, "tokens": 1}, "give one of the two"),
        ({"documents": 1, "diversity": 1.1}, "^diversity=1.1: must be from 0"),
    ],
)
def test_bad_arguments_are_refused(corpora, options, message):
    with pytest.raises(UserError, match=message):
        select_proxies(*corpora, **options)


def test_corpora_that_do_not_suit_are_refused(corpora, tmp_path):
    private, public = corpora
    other = write_corpus(tmp_path / "bytes", 30 * ["text"], byte_tokenizer())
    few = write_corpus(tmp_path / "few", texts(np.random.default_rng(0), 19, DOMAIN, 0.5), word_tokenizer())
    copies = write_corpus(tmp_path / "copies", 30 * [DOMAIN[0]], word_tokenizer())
    for first, second, message in (
        (other, public, "bytes: its tokenizer is not that of .*public"),
        (few, public, "few: has 19 documents, too few"),
        (private, few, "few: has 19 documents, too few"),
        (copies, public, "copies: its documents are copies of each other"),
        (public, public, "public: is the public corpus itself"),
    ):
        with pytest.raises(UserError, match=message):
            select_proxies(first, second, documents=5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            np.zeros((5, 3)),
            r"holds float64 \[5, 3\]; give a .npy of numbers \[tokens, dimensions\], with the 242 tokens",
        ),
        (np.zeros(300), r"holds float64 \[300\]"),
        (np.full((300, 2), np.nan), "holds numbers that are not finite"),
        (np.full((300, 2), None), "is no array"),
    ],
)
def test_bad_embeddings_are_refused(corpora, tmp_path, table, message):
    np.save(tmp_path / "table.npy", table)
    with pytest.raises(UserError, match=rf"^embedder={tmp_path}/table.npy: {message}"):
        select_proxies(*corpora, documents=5, embedder=tmp_path / "table.npy")
