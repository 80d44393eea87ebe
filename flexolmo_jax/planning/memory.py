"""What a device must hold for a step."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flexolmo_jax.training.run import Program


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
    def state(self) -> int:
        """Bytes of what a step takes besides the batch."""
        return self.trained + self.frozen + self.optimizer

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def memory(program: Program, peak: int, available: int) -> Memory:
    """Divides the peak of a program, in bytes, by what takes it."""
    held = [device_bytes(part) for part in (program.state.trainable, program.frozen, program.state.optimizer)]
    batch = device_bytes(program.batch)
    return Memory(*held, batch, max(0, peak - sum(held) - batch), peak, available)


def kept_bytes(config: ConfigDict, program: Program) -> dict[str, int]:
    """About what a device keeps of a part's forward pass for its backward pass, by what is computed again.

    Counted are each block's input and, by policy, what attention gathers, the products of the experts and of the
    projections, and what lies between them; and all of this of the one block at work. Stacked experts have as many rows
    as could come to a device.

    Returns:
      {policy of `decoder.REMAT_POLICIES`: bytes}.
    """
    arch, layout, ways = program.model.architecture, program.model.layout, program.num_shards
    width, hidden = arch.d_model, arch.d_ff // ways("mlp")
    heads, keys = width // ways("heads"), 2 * arch.num_kv_heads * arch.head_dim // ways("heads")
    stacked = layout.kind == "stacked"
    rows = ways("experts") * min(layout.top_k, layout.num_experts // ways("experts")) if stacked else layout.top_k
    experts = rows * (2 * hidden + width) + stacked * rows * width  # stacked ones with their inputs
    elements = {
        "full": width,
        "kernels": heads + stacked * experts,
        "feed_forward": (not stacked) * experts,
        "dots": heads + keys + width,
        "none": 6 * width + rows * hidden,
    }
    tokens = program.device_tokens // config.data.grad_accum_steps
    itemsize = jnp.dtype(config.compute.dtype).itemsize
    totals = dict(zip(elements, itertools.accumulate(elements.values()), strict=True))
    return {p: tokens * itemsize * (arch.num_layers * t + totals["none"]) for p, t in totals.items()}


def device_bytes(arrays: Any) -> int:
    """Bytes that each device holds of a tree of arrays, without the padding of their layout."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )
