"""`flexolmo select-proxies`: a corpus of public documents, a report that stays, or one line of an error."""

import json
import sys
from unittest import mock

import numpy as np
import pytest

from flexolmo_jax.data.corpus import Corpus
from tests.support import small
from tests.support.small import assert_refused, flexolmo, with_defaults


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Corpora of the bytes of words: the owner's have one word, of which some public documents have a little."""
    home, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(0)

    def texts(count, share):
        return [" ".join(rng.choice(["river", "stone", "cloud", "zebra"], 30, p=share)) for _ in range(count)]

    small.corpus(home / "news", texts(30, [0.1, 0.2, 0.2, 0.5]))
    small.corpus(home / "public", [*texts(50, [0.4, 0.3, 0.3, 0]), *texts(10, [0.2, 0.2, 0.2, 0.4])])
    return home


def test_makes_a_corpus_and_a_report_and_prints_both(home, tmp_path):
    flags = [f"--own={home}/news", f"--public={home}/public", f"--out={tmp_path}/out", "--documents=8"]
    result = flexolmo("select-proxies", *flags, f"--report={tmp_path}/kept/report.json")
    assert (result.status, result.err) == (0, "")
    *tables, copies, classifier, summary = result.out.splitlines()
    corpus = Corpus.open(tmp_path / "out")
    assert summary == f"{tmp_path}/out: 8 documents, {corpus.tokens:,} tokens, of 60 documents of {home}/public"
    assert classifier.startswith("classifier, on unseen documents: accuracy ")
    assert copies.startswith("near copies of the owner's documents")
    assert any(line.startswith("| zebra ") for line in tables)
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert report["terms"][0]["term"] == "zebra"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "corpus.json",
        "tokenizer.json",
        "tokens-00000.ends",
        "tokens-00000.npy",
    ]
    assert json.loads((tmp_path / "out/corpus.json").read_text())["source"]["documents"] >= [50]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--documents=61"], ["--documents=61", "public has 60"]),
        (["--tokens=10", "--documents=1"], ["--documents or --tokens", "give one of the two"]),
        ([], ["--documents or --tokens", "give one of the two"]),
        (["--documents=5", "--diversity=2"], ["--diversity=2", "must be from 0"]),
        (["--documents=5", "--own={home}/nosuch"], ["--own=", "nosuch", "no such directory"]),
        (["--documents=5", "--public={home}/news"], ["--own=", "is the public corpus itself"]),
        (["--documents=5", "--out={home}"], ["--out=", "exists already"]),
        (["--documents=5", "--report={out}/report.json"], ["--report=", "lies in --out, which is shipped"]),
        (["--documents=5", "--embedder={home}/nosuch"], ["nosuch", "no such file"]),
        (["--documents=5", "--embedder={home}/news/corpus.json"], ["--embedder=", "is no array"]),
    ],
)
def test_refuses_bad_input(home, tmp_path, arguments, words):
    arguments = [argument.format(home=home, out=tmp_path / "out") for argument in arguments]
    flags = with_defaults(arguments, f"--own={home}/news", f"--public={home}/public", f"--out={tmp_path}/out")
    assert_refused(flexolmo("select-proxies", *flags), "select-proxies", *words)
    assert not list(tmp_path.iterdir())


def test_names_the_extra_that_it_needs(home, tmp_path):
    flags = [f"--own={home}/news", f"--public={home}/public", f"--out={tmp_path}/out", "--documents=8"]
    with mock.patch.dict(sys.modules, {"flexolmo_jax.data.curation.proxies": None}):
        assert_refused(flexolmo("select-proxies", *flags), "select-proxies", "pip install 'flexolmo-jax[data]'")
