"""Batches ahead of time: the same, in order, and nothing that outlasts the run."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.errors import UserError
from flexolmo_jax.training.inputs import placed_batches


class Numbered:
    """Batches of eight sequences of four tokens, which are the number of the sequence."""

    batch_size, length = 8, 4

    def __init__(self, damaged: int = -1):
        """One batch may be damaged."""
        self.made, self._damaged = [], damaged

    def sequences(self, numbers):
        """Remembers what was asked for."""
        self.made.append(list(numbers))
        if numbers[0] // 8 == self._damaged:
            raise UserError("damaged")
        return {"tokens": np.repeat(np.array(numbers, np.int32)[:, None], 4, axis=1) * 10 + np.arange(4)}


def sharding(*axes):
    devices = np.array(jax.devices()).reshape(4, 2)
    return NamedSharding(Mesh(devices, ("data", "tensor")), PartitionSpec(*axes))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches") and thread.is_alive()]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("axes", [("data",), (("data", "tensor"),), ("data", "tensor"), ("tensor", "data"), ()])
def test_the_same_batches_are_placed_and_each_is_made_once(axes, prefetch):
    batches = Numbered()
    placed = list(placed_batches(batches, sharding(*axes), range(2, 7), prefetch))
    expected = [np.arange(8 * number, 8 * number + 8)[:, None] * 10 + np.arange(4) for number in range(2, 7)]
    for found, array in zip(placed, expected, strict=True):
        np.testing.assert_array_equal(found["tokens"], array)
        assert found["tokens"].sharding == sharding(*axes)
    assert batches.made == [list(range(8 * number, 8 * number + 8)) for number in range(2, 7)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_with_the_batch_that_has_it(prefetch):
    placed = placed_batches(Numbered(damaged=2), sharding("data"), range(4), prefetch)
    assert [int(next(placed)["tokens"][0, 0]) for _ in range(2)] == [0, 80]
    with pytest.raises(UserError, match="damaged"):
        next(placed)


def test_no_more_are_made_than_asked_for_and_the_thread_ends():
    batches = Numbered()
    placed = placed_batches(batches, sharding("data"), range(100), 2)
    next(placed)
    (thread,) = threads()
    placed.close()
    thread.join(10)
    assert not threads()
    assert len(batches.made) <= 3
