"""What a device must hold for a step."""

import math
from typing import Any, NamedTuple

import jax

from flexolmo_jax.planning.program import Program


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
      trained: parameters that are trained.
      frozen: parameters that are not.
      optimizer: the optimizer's state.
      batch: tokens, targets, segment ids and positions.
      temporaries: the rest of the peak: activations, gradients, gathered parameters, the program itself.
      peak: what the program needs at most, as the compiler says.
      available: what the device has.
    """

    trained: int
    frozen: int
    optimizer: int
    batch: int
    temporaries: int
    peak: int
    available: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def memory(program: Program, peak: int, available: int) -> Memory:
    """Divides the peak of a program, in bytes, by what takes it."""
    held = [device_bytes(part) for part in (program.state.trainable, program.frozen, program.state.optimizer)]
    batch = device_bytes(program.batch)
    return Memory(*held, batch, max(0, peak - sum(held) - batch), peak, available)


def device_bytes(arrays: Any) -> int:
    """Bytes that each device holds of a tree of arrays, without the padding of their layout."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )
