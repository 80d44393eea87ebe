"""Batches on the devices: each process makes the sequences of its devices, in a background thread, and no others."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from flexolmo_jax.data.batches.pipeline import Batch, Batches

T = TypeVar("T")


class _Local(NamedTuple):
    """The sequences of a batch that a process needs.

    Attributes:
      numbers: which sequences of the batch, rising.
      arrays: these sequences, each array [numbers, length].
    """

    numbers: np.ndarray
    arrays: Batch


def placed_batches(
    batches: Batches, sharding: NamedSharding, numbers: Iterable[int], prefetch: int = 0
) -> Generator[dict[str, jax.Array], None, None]:
    """Yields global batches on the devices: int32 arrays [batch_size, length].

    Args:
      batches: that are taken from.
      sharding: of the arrays.
      numbers: which batches, in order.
      prefetch: how many are made ahead, in a background thread; 0: each is made when it is asked for.

    Raises:
      UserError: an id of a sequence that this process makes is outside the vocabulary.
    """
    shape = (batches.batch_size, batches.length)
    indices = sharding.addressable_devices_indices_map(shape).values()
    local = np.unique([np.arange(shape[0])[index[0]] for index in indices if index])

    def make(number: int) -> _Local:
        return _Local(local, batches.sequences((number * batches.batch_size + local).tolist()))

    for made in _ahead(make, numbers, prefetch):
        with jax.transfer_guard("allow"):
            placed: dict[str, jax.Array] = {
                name: jax.make_array_from_callback(shape, sharding, functools.partial(_shard, made.numbers, array))
                for name, array in made.arrays.items()
            }
        yield placed


def _shard(numbers: np.ndarray, array: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
    """What a device holds of an array, of which the process has the sequences `numbers`."""
    if index is None:
        return array
    start, stop, _ = index[0].indices(int(numbers[-1]) + 1)
    return array[slice(*np.searchsorted(numbers, (start, stop))), index[1]]


def _ahead(make: Callable[[int], T], numbers: Iterable[int], count: int) -> Iterator[T]:
    """Yields `make(number)` of each number, `count` of them made ahead by a thread."""
    if not count:
        yield from map(make, numbers)
        return
    pool, pending = ThreadPoolExecutor(1, thread_name_prefix="batches"), deque()
    try:
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
