"""Which tokens may be drawn, against sorting; and what a draw depends on."""

import jax
import numpy as np
import pytest
from scipy import special

from flexolmo_jax.inference.sampling import Sampling, keep_likeliest, sample

ROWS, VOCAB = 6, 40
keep = jax.jit(keep_likeliest)
draw = jax.jit(sample)


def logits(seed=0):
    return np.random.default_rng(seed).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)


def sorted_keep(row, top_k, top_p):
    """Walks down the sorted tokens until there are k, or their probability reaches p."""
    kept, order = np.full(len(row), -np.inf), np.argsort(-row)
    order = order[: top_k or len(row)]
    reached = 0.0
    for token, probability in zip(order, special.softmax(row[order].astype(np.float64)), strict=True):
        if reached < top_p or top_p == 1:
            kept[token] = row[token]
        reached += probability
    return kept


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-3, 50.0])
def test_likeliest_tokens_are_those_that_sorting_finds(scale):
    x = scale * logits()
    top_k, top_p = np.array([0, 1, 5, 0, 7, 39]), np.array([1.0, 1.0, 1.0, 0.6, 0.5, 0.99], np.float32)
    expected = [sorted_keep(*row) for row in zip(x, top_k, top_p, strict=True)]
    np.testing.assert_array_equal(keep(x, top_k, top_p), np.float32(expected))


def test_one_token_is_always_left_and_all_are_where_nothing_limits():
    x = logits()
    tiny = keep(x, np.zeros(ROWS, int), np.full(ROWS, 1e-9, np.float32))
    np.testing.assert_array_equal(np.isfinite(tiny).sum(-1), 1)
    np.testing.assert_array_equal(np.argmax(tiny, -1), np.argmax(x, -1))
    np.testing.assert_array_equal(keep(x, np.zeros(ROWS, int), np.ones(ROWS, np.float32)), x)


def test_equal_logits_stay_together():
    x = np.zeros((1, 8), np.float32)
    x[0, :3] = 1
    assert np.isfinite(keep(x, np.array([2]), np.ones(1, np.float32))).sum() == 3


def settings(temperature, top_k=0, top_p=1.0, seed=0, min_p=0.0, penalties=(1.0, 0.0, 0.0), rows=ROWS):
    limits = (np.float32(temperature), np.int32(top_k), np.float32(top_p), np.uint32(seed), np.float32(min_p))
    return Sampling(*(np.broadcast_to(value, rows).copy() for value in (*limits, *map(np.float32, penalties))))


def test_temperature_zero_takes_the_first_of_the_likeliest():
    x = logits()
    x[1, [7, 30]] = 99
    mixed = settings(np.where(np.arange(ROWS) < 3, 0, 1.0))
    chosen = np.asarray(draw(x, mixed, np.arange(ROWS)))
    np.testing.assert_array_equal(chosen[:3], np.argmax(x, -1)[:3])
    assert chosen[1] == 7


def test_draws_follow_temperature_and_limits():
    rows, temperature = 4096, 2.0
    x = np.repeat(logits()[:1], rows, axis=0)
    how = settings(temperature, 10, 0.9, seed=np.arange(rows), rows=rows)
    counts = np.bincount(draw(x, how, np.zeros(rows, int)), minlength=VOCAB)
    expected = rows * special.softmax(sorted_keep(x[0] / np.float32(temperature), 10, 0.9).astype(np.float64))
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    freedom = some.sum() - 1
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_a_draw_depends_on_its_seed_and_position_alone():
    x = np.repeat(logits()[:1], ROWS, axis=0) * 0.1
    how = settings(1.0, seed=np.array([1, 1, 2, 1, 5, 6]))
    position = np.array([4, 4, 4, 5, 4, 4])
    first = np.asarray(draw(x, how, position))
    assert first[0] == first[1]
    assert len(set(first.tolist())) > 2
    alone = np.asarray(draw(np.roll(x, 1, 0), Sampling(*(np.roll(v, 1) for v in how)), np.roll(position, 1)))
    np.testing.assert_array_equal(np.roll(alone, -1), first)


def test_draws_at_other_positions_are_independent():
    x = np.zeros((ROWS, VOCAB), np.float32)
    drawn = np.stack([draw(x, settings(1.0, seed=np.arange(ROWS)), np.full(ROWS, at)) for at in range(40)])
    assert min(len(set(column.tolist())) for column in drawn.T) > VOCAB / 4


def test_even_the_smallest_temperature_gives_a_token():
    x = logits() * 1e6
    np.testing.assert_array_equal(draw(x, settings(1e-40), np.zeros(ROWS, int)), np.argmax(x, -1))
