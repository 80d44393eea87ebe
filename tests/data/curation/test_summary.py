"""What `flexolmo inspect` tells of a corpus, against counts of a plain loop."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.corpus_writer import write_corpus
from flexolmo_jax.data.curation import summary
from flexolmo_jax.data.curation.summary import count_duplicates, count_lengths, samples
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from tests.support.small import flexolmo

TEXTS = ["a", "bb", "bb", "x" * 300, "\x1b[31m red\n\nlines", "bb", "y" * 6]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", TEXTS, byte_tokenizer(), tokens_per_file=10)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=20), st.integers(1, 300), st.integers(1, 5))
def test_lengths_are_counted_by_powers_of_two(tmp_path_factory, lengths, tokens_per_file, chunk):
    texts = ["x" * length for length in lengths]
    path = tmp_path_factory.mktemp("lengths") / "corpus"
    corpus = write_corpus(path, texts, byte_tokenizer(), tokens_per_file=tokens_per_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "_CHUNK_TOKENS", chunk)
        documents, tokens = count_lengths(corpus)
    expected = collections.Counter(len(bin(length + 1)) - 3 for length in lengths)
    assert {int(i): int(documents[i]) for i in np.flatnonzero(documents)} == expected
    assert tokens.sum() == corpus.tokens
    assert all(documents[i] << i <= tokens[i] < documents[i] << i + 1 for i in expected)


def test_exact_duplicates_are_counted(corpus):
    assert count_duplicates(corpus) == len(TEXTS) - len(set(TEXTS)) == 2


def test_samples_are_short_lines(corpus):
    found = samples(corpus, 3)
    assert list(found) == ["document 0", "document 3", "document 6"]
    assert found["document 3"] == "x" * 160 + "..."
    assert samples(corpus, 100)["document 4"] == "\ufffd[31m red lines"
    assert samples(corpus, 0) == {}


def test_the_command_describes_a_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n{"text": ""}\n{"text": 5}\n')
    flags = [f"--input={tmp_path}/a.jsonl", f"--out={tmp_path}/corpus", "--license=CC0-1.0", "--on_error=skip"]
    assert flexolmo("tokenize", *flags).status == 0
    result = flexolmo("inspect", f"{tmp_path}/corpus")
    assert (result.status, result.err) == (0, "")
    for words in ("CC0-1.0", "1 (50.00% of documents)", "empty: 1, no text: 1", f"1: {tmp_path}/a.jsonl", "hold"):
        assert words in result.out
    assert "| 4 to 7               |         2 | 100.0% |      8 | 100.0% | ##" in result.out
    lines = flexolmo("inspect", f"{tmp_path}/corpus", "--nocheck", "--samples=0").out
    assert "duplicates" not in lines
    assert "document 0" not in lines
