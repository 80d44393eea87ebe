"""Differential privacy of statistics: sensitivity, scale of the noise, projection, words."""

import sys
from unittest import mock

import numpy as np
import pytest
from scipy import optimize, stats

from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.model import privacy
from flexolmo_jax.model.privacy import Privacy, add_noise, bounded, make_privacy, noise_multiplier, project
from flexolmo_jax.model.selectors import BUCKETS, SELECTORS
from tests.support.small import ARCHITECTURE, byte_tokenizer

RNG = np.random.default_rng(0)
NGRAM = SELECTORS["ngram"]
EOS = byte_tokenizer().eos_id
WITHOUT_NOISE = Privacy(epsilon=1.0, delta=1e-6, clip=8.0, noise_multiplier=0.0)


def documents(count, longest=300):
    """Random documents, some of one token repeated, whose counts have large norms."""
    sizes = RNG.integers(1, longest, count)
    return [np.append(RNG.integers(0, RNG.choice([1, 5, 200]), size), EOS) for size in sizes]


def exact_sums(texts, clip=8.0):
    """Sums before noise and projection."""
    taken = []
    guarantee = Privacy(1.0, 1e-6, clip, 1.0)
    with mock.patch.object(privacy, "add_noise", lambda sums, stddev: taken.append(sums) or np.ones(sums.size)):
        NGRAM.private_statistics(texts, ARCHITECTURE, EOS, guarantee)
    return taken[0] * privacy.UNIT


@pytest.mark.parametrize("clip", [1.0, 8.0, 100.0])
def test_a_document_changes_the_sums_by_at_most_clip(clip):
    texts = documents(30)
    for i in range(len(texts)):
        change = np.linalg.norm(exact_sums(texts, clip) - exact_sums(texts[:i] + texts[i + 1 :], clip))
        assert 0 < change <= clip
    assert max(np.linalg.norm(exact_sums([text], clip)) for text in texts) == pytest.approx(clip, rel=1e-3)


def test_the_order_of_documents_does_not_matter():
    texts = documents(20)
    np.testing.assert_array_equal(exact_sums(texts), exact_sums(texts[::-1]))


def test_documents_that_are_not_clipped_have_the_counts_of_exact_statistics():
    texts = documents(20)
    expected = NGRAM.statistics(texts, ARCHITECTURE, EOS)
    np.testing.assert_array_equal(exact_sums(texts, clip=2.0**15), expected["ngram/counts"])
    assert NGRAM.private_statistics(texts, ARCHITECTURE, EOS, WITHOUT_NOISE)["ngram/documents"] == 20


def test_clipping_keeps_the_proportions_of_a_document():
    counts = np.array([30, 40])
    np.testing.assert_allclose(bounded(counts, 10.0) * privacy.UNIT, [6, 8], atol=2 * privacy.UNIT)
    np.testing.assert_array_equal(bounded(counts, 50.0) * privacy.UNIT, counts)


def test_noise_is_gaussian_of_the_stated_deviation_and_drawn_once_for_each_sum():
    drawn = []

    def gauss(mean, stddev):
        drawn.append((mean, stddev))
        return 0.25 * len(drawn)

    with mock.patch.object(privacy, "GAUSS", gauss):
        noised = add_noise(np.array([65536, 0, 1]), 3.0)
    np.testing.assert_array_equal(noised, [1.25, 0.5, 0.75 + 2.0**-16])
    assert drawn == [(0.0, 3.0)] * 3
    real = add_noise(np.zeros(4000, np.int64), 5.0)
    assert stats.kstest(real, stats.norm(0, 5.0).cdf).pvalue > 1e-6


def test_noise_is_new_each_time_whatever_seeds_are_set():
    taken = []
    for _ in range(2):
        np.random.seed(0)
        taken.append(add_noise(np.zeros(10, np.int64), 1.0))
    assert not np.array_equal(*taken)


def test_the_deviation_is_the_multiplier_times_clip():
    with mock.patch.object(privacy, "add_noise", side_effect=lambda sums, stddev: sums + stddev) as noise:
        found = NGRAM.private_statistics(documents(3), ARCHITECTURE, EOS, Privacy(1.0, 1e-6, 8.0, 2.5))
    assert noise.call_args.args[1] == found["ngram/noise"] == 20.0


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_projection_is_the_closest_valid_vector(scale):
    noised = 1 + scale * RNG.standard_normal(12)
    noised += max(0, 1 - noised.sum())
    solution = optimize.minimize(
        lambda x: np.sum((x - noised) ** 2),
        np.full(12, noised.sum() / 12),
        jac=lambda x: 2 * (x - noised),
        bounds=[(0, None)] * 12,
        constraints={"type": "eq", "fun": lambda x: x.sum() - noised.sum()},
    )
    np.testing.assert_allclose(project(noised, 1e9), solution.x, atol=1e-4 * scale)


def test_valid_sums_are_projected_to_themselves():
    values = RNG.random(50)
    np.testing.assert_allclose(project(values, 1e9), values, rtol=1e-12)


def test_what_stands_out_of_the_noise_is_kept_even_if_the_sum_is_negative():
    noised = np.concatenate([[500.0, 300.0], -np.ones(2000)])
    np.testing.assert_allclose(project(noised, 10.0), np.concatenate([[500.0, 300.0], np.zeros(2000)]))


def test_what_is_shipped_is_valid_even_if_noise_has_outweighed_all_text():
    for deviation in (1.0, 1e3, 1e6):
        found = NGRAM.private_statistics(documents(3), ARCHITECTURE, EOS, Privacy(1.0, 1e-6, 8.0, deviation))
        assert found["ngram/counts"].dtype == np.float64
        assert NGRAM.problem(found, 3) is None
        assert "documents" in NGRAM.problem(found, 4)
        public = NGRAM.statistics(documents(5), ARCHITECTURE, EOS)
        assert np.isfinite(NGRAM.tables([public, found])["log_ratio"]).all()


@pytest.mark.parametrize("noise", [np.array(-1.0), np.array(np.nan), np.array(np.inf), np.ones(3)])
def test_an_invalid_deviation_is_refused(noise):
    statistics = NGRAM.statistics(documents(3), ARCHITECTURE, EOS)
    assert "ngram/noise" in NGRAM.problem({**statistics, "ngram/noise": noise}, 3)


def test_counts_are_as_they_are_without_noise_and_those_of_public_text_where_noise_hides_them():
    public = {"ngram/counts": np.full(BUCKETS, 4)}
    counts = np.zeros(BUCKETS)
    counts[0], counts[1] = 1e6, 10.0
    exact, noiseless, noised, hidden = (
        NGRAM.tables([public, {"ngram/counts": counts, **more}])["log_ratio"][:, 1]
        for more in ({}, *({"ngram/noise": np.array(noise)} for noise in (0.0, 1e3, 1e12)))
    )
    np.testing.assert_array_equal(exact, noiseless)
    assert noised[0] == pytest.approx(exact[0], rel=0.01)
    assert exact[1] > exact[2] + 1  # 10 and 0, of which noise leaves no difference
    np.testing.assert_allclose(noised[1:], noised[2], rtol=1e-3)
    np.testing.assert_allclose(hidden, 0, atol=1e-6)


def gaussian_delta(multiplier, epsilon):
    """The delta of the Gaussian mechanism, in closed form (Balle and Wang, 2018)."""
    half, shift = 1 / (2 * multiplier), epsilon * multiplier
    return stats.norm.cdf(half - shift) - np.exp(epsilon) * stats.norm.cdf(-half - shift)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-10), (1.0, 1e-6), (99.0, 1e-10), (0.1, 0.1), (100.0, 0.1)])
def test_the_multiplier_is_the_closed_form_of_the_gaussian_mechanism(epsilon, delta):
    pytest.importorskip("dp_accounting")
    exact = optimize.brentq(lambda multiplier: gaussian_delta(multiplier, epsilon) - delta, 1e-2, 1e5)
    assert exact * (1 - 1e-6) <= noise_multiplier(epsilon, delta) <= exact * 1.01


@pytest.mark.parametrize(
    ("changes", "argument", "words"),
    [
        ({"epsilon": 200.0}, "epsilon", "must be at least 0.1 and below 100 (0: no noise)"),
        ({"epsilon": -1.0}, "epsilon", "must be at least"),
        ({"epsilon": float("nan")}, "epsilon", "must be at least"),
        ({"delta": 0.0}, "delta", "must be at least"),
        ({"delta": 1e-3}, "delta", "must be below 1 / 1000"),
        ({"clip": 0.0}, "clip", "must be at least"),
    ],
)
def test_values_out_of_bounds_are_refused(changes, argument, words):
    values = {"epsilon": 1.0, "delta": 1e-6, "clip": 8.0, "documents": 1000} | changes
    with pytest.raises(ArgumentError) as caught:
        make_privacy(**values, section="config.publish.")
    assert caught.value.argument == f"config.publish.{argument}"
    assert words in caught.value.problem


def test_no_epsilon_is_no_privacy():
    assert make_privacy(0.0, 1e-6, 8.0, 1000) is None


def test_without_dp_accounting_the_error_says_what_to_install():
    with mock.patch.dict(sys.modules, {"dp_accounting": None}), pytest.raises(UserError) as caught:
        make_privacy(1.0, 1e-6, 8.0, 1000)
    assert "\n" not in str(caught.value)
    assert "flexolmo-jax[privacy]" in str(caught.value)


def test_a_card_is_put_in_plain_words_and_no_card_can_break_them():
    card = Privacy(2.0, 1e-6, 8.0, 2.2).card()
    assert card == {
        **{"mechanism": "gaussian", "unit": "document"},
        **{"epsilon": 2.0, "delta": 1e-6, "clip": 8.0, "noise_multiplier": 2.2},
    }
    assert "e^2, but for a probability of 1e-06" in privacy.privacy_words(card)
    assert privacy.privacy_words(None) == "no guarantee"
    for wrong in (3, "word", [], {**card, "epsilon": "much"}, {"epsilon": 1}):
        assert "not understood" in privacy.privacy_words(wrong)
