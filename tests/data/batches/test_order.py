"""The order of sequences: permutations, and epochs against a slow count."""

import collections
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.batches.order import Order, permuted

SEEDS = st.tuples(st.integers(0, 2**32), st.integers(0, 100))


@given(st.integers(1, 300), SEEDS)
@settings(max_examples=50, deadline=None)
def test_each_index_is_permuted_to_another(count, seed):
    assert sorted(permuted(index, count, seed) for index in range(count)) == list(range(count))


def test_ranges_may_be_as_large_as_numbers_get():
    for count in (2**32, 10**15 + 37, 2**63):
        found = {permuted(index, count, (1,)) for index in range(200)}
        assert len(found) == 200
        assert max(found) < count
        assert max(found) > count * 0.9


def test_all_orders_are_equally_common():
    seeds = 6000
    orders = collections.Counter(tuple(permuted(index, 3, (seed,)) for index in range(3)) for seed in range(seeds))
    assert len(orders) == 6
    # Chi-squared with 5 degrees of freedom is below 25.7 in 9999 of 10,000 cases.
    assert sum((count - seeds / 6) ** 2 / (seeds / 6) for count in orders.values()) < 25.7


def test_neighbours_are_not_neighbours_afterwards():
    places = [permuted(index, 1000, (0,)) for index in range(1000)]
    steps = [abs(after - before) for before, after in itertools.pairwise(places)]
    assert 280 < sum(steps) / len(steps) < 390  # a third of the range


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 6), SEEDS)
@settings(max_examples=100, deadline=None)
def test_an_epoch_has_the_windows_that_begin_in_it(tokens, length, window, seed):
    order = Order(tokens, length, window, seed)
    epochs = collections.defaultdict(list)
    for sequence in range(12 * window):
        first_of_window = sequence // window * window * length
        epochs[first_of_window // tokens].append(sequence)
    del epochs[max(epochs)]  # it may be cut off
    place = 0
    for epoch, sequences in epochs.items():
        places = range(place, place + len(sequences))
        assert {order.epoch(index) for index in places} == {epoch}
        assert sorted(map(order, places)) == sequences
        place += len(sequences)


def test_epochs_and_seeds_have_different_orders():
    def epoch(number, *seed):
        order = Order(400, 4, 1, seed)
        return tuple(order(index) - 100 * number for index in range(100 * number, 100 * number + 100))

    orders = {epoch(number, seed, source) for number in range(3) for seed in range(3) for source in range(2)}
    assert len(orders) == 18
