"""`flexolmo statistics --epsilon`: noised leaves, what the card and `inspect` say, what is refused."""

import sys
from unittest import mock

import numpy as np
import pytest

from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.checkpoint.params import open_tree
from flexolmo_jax.checkpoint.statistics import open_statistics, read_statistics
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.model import privacy
from tests.support import small
from tests.support.small import assert_refused, flexolmo

DOCUMENTS = 40
NOISE_MULTIPLIER = privacy.noise_multiplier


@pytest.fixture(autouse=True)
def multiplier():
    """The noise of some epsilon; dp-accounting, which computes it, need not be installed."""
    with mock.patch.object(privacy, "noise_multiplier", return_value=2.5):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("private")
    rng = np.random.default_rng(0)
    small.corpus(home / "corpus", texts=[" ".join(rng.choice(["tar", "mast", "oar"], 20)) for _ in range(DOCUMENTS)])
    small.anchor(home / "anchor")
    small.contribution(home / "news", home / "anchor", seed=1, card={"documents": DOCUMENTS})
    return home


def statistics(home, source, out, *flags):
    return flexolmo("statistics", f"--source={source}", f"--data={home}/corpus", f"--out={out}", *flags)


def words(text):
    return " ".join(text.split())


def test_a_contribution_gets_noised_statistics_and_its_card_says_so(home, tmp_path):
    assert statistics(home, home / "news", tmp_path / "exact").status == 0
    assert statistics(home, home / "news", tmp_path / "out", "--epsilon=2", "--clip=16").status == 0
    manifest, exact = read_contribution(tmp_path / "out", strict=True), read_contribution(tmp_path / "exact")
    assert manifest.card == exact.card | {
        "statistics_privacy": {
            **{"mechanism": "gaussian", "unit": "document", "epsilon": 2.0, "delta": 1e-6},
            **{"clip": 16.0, "noise_multiplier": 2.5},
        }
    }
    assert manifest.leaves == exact.leaves
    noised, counts = (
        read_statistics(open_statistics(tmp_path / name, m)["news"], "ngram")
        for name, m in (("out", manifest), ("exact", exact))
    )
    assert noised["ngram/noise"] == 40.0
    assert noised["ngram/documents"] == counts["ngram/documents"] == DOCUMENTS
    assert not np.array_equal(noised["ngram/counts"], counts["ngram/counts"])


def test_an_anchor_gets_them_too_and_exact_ones_replace_them(home, tmp_path):
    before = read_model(home / "anchor")
    assert statistics(home, home / "anchor", tmp_path / "noised", "--epsilon=2").status == 0
    after = read_model(tmp_path / "noised", strict=True)
    assert after.anchor_digest == before.anchor_digest
    assert after.experts[0].card["statistics_privacy"]["epsilon"] == 2.0
    assert statistics(home, tmp_path / "noised", tmp_path / "exact").status == 0
    assert read_model(tmp_path / "exact").experts[0].card == before.experts[0].card
    assert set(open_tree(tmp_path / "exact" / "statistics")) == {"anchor/ngram/counts", "anchor/ngram/documents"}


def test_a_merge_takes_them_and_inspect_says_what_they_reveal(home, tmp_path):
    for source, out, *flags in (("anchor", "anchor"), ("news", "news", "--epsilon=2")):
        assert statistics(home, home / source, tmp_path / out, *flags).status == 0
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "merged", top_k=1, selection="ngram")
    for directory in ("news", "merged"):
        result = flexolmo("inspect", tmp_path / directory)
        assert result.status == 0, result
        assert "whoever has the tokenizer can test whether a sequence of words" in words(result.out)
        assert "news: by its owner's word, noised so that the text of one document" in words(result.out)
        assert "a factor of at most e^2" in words(result.out)
    assert "anchor: no guarantee" in words(result.out)
    assert "privacy" not in flexolmo("inspect", home / "news").out


def test_each_run_has_other_noise(home, tmp_path):
    digests = set()
    for name in "ab":
        assert statistics(home, home / "news", tmp_path / name, "--epsilon=2").status == 0
        digests.add(read_contribution(tmp_path / name).statistics["ngram/counts"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--epsilon=1000"], ["--epsilon=1000", "must be at least 0.1 and below 100"]),
        (["--epsilon=1", "--delta=0.05"], ["--delta=0.05", f"must be below 1 / {DOCUMENTS}"]),
        (["--epsilon=1", "--clip=0.5"], ["--clip=0.5", "must be at least 1 and below 65536"]),
    ],
)
def test_bad_values_are_refused(home, tmp_path, flags, expected):
    assert_refused(statistics(home, home / "news", tmp_path / "out", *flags), "statistics", *expected)
    assert not list(tmp_path.iterdir())


def test_without_dp_accounting_nothing_is_written(home, tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "noise_multiplier", NOISE_MULTIPLIER)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    result = statistics(home, home / "news", tmp_path / "out", "--epsilon=2")
    assert_refused(result, "statistics", "the package dp-accounting is needed", "install flexolmo-jax[privacy]")
    assert not list(tmp_path.iterdir())
