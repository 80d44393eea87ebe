"""Which tokens may be drawn, against sorting; and what a draw depends on."""

import jax
import numpy as np
import pytest
from scipy import special

from flexolmo_jax.inference.sampling import Sampling, mask_logits, penalize, sample, score

SEQUENCES, VOCAB = 6, 40
keep = jax.jit(mask_logits)
draw = jax.jit(sample)


def logits(seed=0):
    return np.random.default_rng(seed).normal(0, 3, (SEQUENCES, VOCAB)).astype(np.float32)


def sorted_keep(sequence, top_k, top_p):
    """Walks down the sorted tokens until there are k, or their probability reaches p."""
    kept, order = np.full(len(sequence), -np.inf), np.argsort(-sequence)
    order = order[: top_k or len(sequence)]
    reached = 0.0
    for token, probability in zip(order, special.softmax(sequence[order].astype(np.float64)), strict=True):
        if reached < top_p or top_p == 1:
            kept[token] = sequence[token]
        reached += probability
    return kept


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-3, 50.0])
def test_top_tokens_are_those_that_sorting_finds(scale):
    x = scale * logits()
    top_k, top_p = np.array([0, 1, 5, 0, 7, 39]), np.array([1.0, 1.0, 1.0, 0.6, 0.5, 0.99], np.float32)
    expected = [sorted_keep(*sequence) for sequence in zip(x, top_k, top_p, strict=True)]
    np.testing.assert_array_equal(keep(x, top_k, top_p), np.float32(expected))


def test_one_token_is_always_left_and_all_are_where_nothing_limits():
    x = logits()
    tiny = keep(x, np.zeros(SEQUENCES, int), np.full(SEQUENCES, 1e-9, np.float32))
    np.testing.assert_array_equal(np.isfinite(tiny).sum(-1), 1)
    np.testing.assert_array_equal(np.argmax(tiny, -1), np.argmax(x, -1))
    np.testing.assert_array_equal(keep(x, np.zeros(SEQUENCES, int), np.ones(SEQUENCES, np.float32)), x)


def test_equal_logits_stay_together():
    x = np.zeros((1, 8), np.float32)
    x[0, :3] = 1
    assert np.isfinite(keep(x, np.array([2]), np.ones(1, np.float32))).sum() == 3


def settings(temperature, top_k=0, top_p=1.0, seed=0, min_p=0.0, penalties=(1.0, 0.0, 0.0), sequences=SEQUENCES):
    limits = (np.float32(temperature), np.int32(top_k), np.float32(top_p), np.uint32(seed), np.float32(min_p))
    return Sampling(*(np.broadcast_to(value, sequences).copy() for value in (*limits, *map(np.float32, penalties))))


def test_temperature_zero_takes_the_first_of_the_top():
    x = logits()
    x[1, [7, 30]] = 99
    mixed = settings(np.where(np.arange(SEQUENCES) < 3, 0, 1.0))
    chosen = np.asarray(draw(x, mixed, np.arange(SEQUENCES)))
    np.testing.assert_array_equal(chosen[:3], np.argmax(x, -1)[:3])
    assert chosen[1] == 7


def test_draws_follow_temperature_and_limits():
    sequences, temperature = 4096, 2.0
    x = np.repeat(logits()[:1], sequences, axis=0)
    options = settings(temperature, 10, 0.9, seed=np.arange(sequences), sequences=sequences)
    counts = np.bincount(draw(x, options, np.zeros(sequences, int)), minlength=VOCAB)
    expected = sequences * special.softmax(sorted_keep(x[0] / np.float32(temperature), 10, 0.9).astype(np.float64))
    assert (counts[expected == 0] == 0).all()
    some = expected > 0
    freedom = some.sum() - 1
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_a_draw_depends_on_its_seed_and_position_alone():
    x = np.repeat(logits()[:1], SEQUENCES, axis=0) * 0.1
    options = settings(1.0, seed=np.array([1, 1, 2, 1, 5, 6]))
    position = np.array([4, 4, 4, 5, 4, 4])
    first = np.asarray(draw(x, options, position))
    assert first[0] == first[1]
    assert len(set(first.tolist())) > 2
    alone = np.asarray(draw(np.roll(x, 1, 0), Sampling(*(np.roll(v, 1) for v in options)), np.roll(position, 1)))
    np.testing.assert_array_equal(np.roll(alone, -1), first)


def test_draws_at_other_positions_are_independent():
    x = np.zeros((SEQUENCES, VOCAB), np.float32)
    drawn = np.stack([draw(x, settings(1.0, seed=np.arange(SEQUENCES)), np.full(SEQUENCES, at)) for at in range(40)])
    assert min(len(set(column.tolist())) for column in drawn.T) > VOCAB / 4


def test_even_the_smallest_temperature_gives_a_token():
    x = logits() * 1e6
    np.testing.assert_array_equal(draw(x, settings(1e-40), np.zeros(SEQUENCES, int)), np.argmax(x, -1))


def draws_of(x, options, count=300):
    """The tokens that come up in that many draws of each sequence."""
    return [
        set(column) for column in np.stack([draw(x, options, np.full(SEQUENCES, at)) for at in range(count)]).T.tolist()
    ]


def test_min_p_leaves_what_is_probable_enough_next_to_the_top():
    """As transformers: of what top-k and top-p leave, at the temperature that is asked for."""
    x, temperature = logits(3) * 0.5, 2.0
    min_p = np.array([0, 0.1, 0.3, 0.9, 1.0, 0.3], np.float32)
    options = settings(temperature, top_k=[0, 0, 0, 0, 0, 3], seed=np.arange(SEQUENCES), min_p=min_p)
    probability = special.softmax(x.astype(np.float64) / temperature, axis=-1)
    for sequence, drawn in enumerate(draws_of(x, options)):
        allowed = set(np.flatnonzero(probability[sequence] >= min_p[sequence] * probability[sequence].max()))
        if sequence == 5:
            allowed &= set(np.argsort(-x[sequence])[:3])
        assert drawn <= allowed
        assert len(drawn) == len(allowed) or sequence == 0
    assert len(draws_of(x, options)[0]) > 15


PENALTIES = [(1.0, 0.0, 0.0), (1.5, 0.0, 0.0), (0.5, 0.0, 0.0), (1.0, 0.75, 0.0), (1.0, 0.0, -0.5), (1.25, 0.5, 0.25)]


def plain_penalties(sequence, prompt, written, repetition, presence, frequency):
    """Token by token."""
    sequence = sequence.astype(np.float64)
    for token in range(len(sequence)):
        if token in [*prompt, *written]:
            sequence[token] = sequence[token] / repetition if sequence[token] > 0 else sequence[token] * repetition
        sequence[token] -= written.count(token) * frequency + (token in written) * presence
    return sequence


def written_sequences():
    """(tokens by position, where continuations start, positions of last tokens); what lies beyond is left over."""
    rng = np.random.default_rng(5)
    tokens, start = rng.integers(0, VOCAB, (SEQUENCES, 24)), np.array([3, 1, 8, 5, 12, 6])
    return tokens, start, start - 1 + np.array([4, 0, 9, 12, 2, 17])


def test_penalties_are_those_of_a_plain_loop():
    x, (tokens, start, position) = logits(1), written_sequences()
    penalized = jax.jit(penalize)(x, settings(0, penalties=np.transpose(PENALTIES)), tokens, start, position)
    for sequence, values in enumerate(PENALTIES):
        ids = tokens[sequence].tolist()
        expected = plain_penalties(
            x[sequence], ids[: start[sequence]], ids[start[sequence] : position[sequence] + 1], *values
        )
        np.testing.assert_allclose(penalized[sequence], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(penalized[0], x[0])


def test_repetition_penalty_and_min_p_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    x, (tokens, start, position) = logits(2), written_sequences()
    for sequence in range(SEQUENCES):
        ids = torch.tensor(tokens[sequence : sequence + 1, : position[sequence] + 1])
        expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(x[sequence : sequence + 1]))
        found = penalize(x, settings(0, penalties=(1.7, 0.0, 0.0)), tokens, start, position)
        np.testing.assert_allclose(found[sequence], expected[0], rtol=1e-6)
    kept = transformers.MinPLogitsWarper(0.2)(None, torch.tensor(x * 0.5)).isfinite().numpy()
    for sequence, drawn in enumerate(draws_of(x * 0.5, settings(1.0, seed=np.arange(SEQUENCES), min_p=0.2))):
        assert drawn == set(np.flatnonzero(kept[sequence]))


def test_scores_are_log_probabilities_and_the_top_tokens():
    x, token = logits(4), np.arange(SEQUENCES)
    found = jax.jit(score, static_argnums=2)(x, token, 5)
    expected = special.log_softmax(x.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found.logprob, expected[np.arange(SEQUENCES), token], atol=1e-5)
    order = np.argsort(-x, axis=-1)[:, :5]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top_logprob, np.take_along_axis(expected, order, axis=-1), atol=1e-5)
