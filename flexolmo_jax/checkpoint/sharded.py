"""Leaves that are sharded over several processes, none of which can read all of it alone."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax.checkpoint.digests import Index


class Held:
    """Some ranges of an array, in the memory of this process.

    Attributes:
      shape: of the whole array.
      dtype: of its values.
    """

    def __init__(self, array: jax.Array, ranges: Sequence[tuple[Index, bool]]):
        """Gathers ranges of an array that all processes have; all call this with the same ranges, in the same order.

        Args:
          array: sharded over the devices of all processes.
          ranges: each with whether this process keeps it. They do not overlap.
        """
        self.shape, self.dtype = array.shape, array.dtype
        gathered = ((index, range_of(array, index), keeps) for index, keeps in ranges)
        self._ranges = [(index, np.asarray(values)) for index, values, keeps in gathered if keeps]

    def __getitem__(self, index: Sequence[slice | int]) -> np.ndarray:
        """A range within one of those that are kept; an integer drops its axis."""
        asked = tuple(slice(at, at + 1) if isinstance(at, int) else at for at in index)
        kept, values = next((kept, values) for kept, values in self._ranges if _contains(kept, asked))
        drops = tuple(axis for axis, at in enumerate(index) if isinstance(at, int))
        within = tuple(slice(at.start - by.start, at.stop - by.start) for at, by in zip(asked, kept, strict=True))
        return values[within].squeeze(drops)


def is_held_elsewhere(source: Any) -> bool:
    """Whether a source is an array of which other processes hold a part."""
    return isinstance(source, jax.Array) and not (source.is_fully_addressable or source.is_fully_replicated)


def range_of(array: jax.Array, index: Index) -> np.ndarray:
    """A range of an array, the same in all processes; the devices hold no more than the range beside their shards."""
    starts = np.array([at.start for at in index], np.int32)
    gathered = _gather(array, starts, tuple(at.stop - at.start for at in index), array.sharding)
    return np.asarray(gathered.addressable_data(0))


@functools.partial(jax.jit, static_argnames=("lengths", "sharding"))
def _gather(array: jax.Array, starts: jax.Array, lengths: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """The range of `lengths` from `starts` on, replicated.

    Each device takes what it holds of the range, and zeros for the rest; the sum over shards is the range. It adds
    bits, not numbers: a sum of floats would lose the sign of zeros.
    """
    mesh = sharding.mesh
    spec = (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))
    axes = [() if of is None else (of,) if isinstance(of, str) else tuple(of) for of in spec]
    bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")

    def local(shard, starts):
        values = jax.lax.bitcast_convert_type(shard, bits).astype(jnp.uint32)
        is_here = jnp.ones((), bool)
        for axis, length in enumerate(lengths):
            place = 0
            for name in axes[axis]:
                place = place * mesh.shape[name] + jax.lax.axis_index(name)
            at = starts[axis] + jnp.arange(length) - place * shard.shape[axis]
            shape = [1] * array.ndim
            shape[axis] = length
            is_here = is_here & ((at >= 0) & (at < shard.shape[axis])).reshape(shape)
            values = jnp.take(values, jnp.clip(at, 0, shard.shape[axis] - 1), axis=axis)
        values = jnp.where(is_here, values, 0)
        return jax.lax.psum(values, tuple(name for of in axes for name in of))

    gather = jax.shard_map(
        local, mesh=mesh, in_specs=(sharding.spec, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False
    )
    return jax.lax.bitcast_convert_type(gather(array, starts).astype(bits), array.dtype)


def _contains(outer: Index, inner: Index) -> bool:
    return all(by.start <= at.start and at.stop <= by.stop for by, at in zip(outer, inner, strict=True))
