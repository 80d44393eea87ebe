"""How long a step takes at best, by what its devices compute, read and send.

FLOPs are those of `model.flops`, and what the backward pass computes again. For HBM the assumption is that each matmul,
attention and residual sum reads its operands and writes its result once, in the dtype of the computation, and that all
else is fused with these. So a device moves in a step of A parts, each of them with P passes over the weights (forward,
backward, and one more where the forward is computed again), T tokens on the device in all:

    weights       A P     of what it computes with; twice that, where they are gathered first
    gradients     2 A     of what it trains, before sums over devices; and of its own part in float32, where A > 1
    optimizer     8       of its own part in float32: gradient (for the norm, and again), parameter and two moments
                          read, the latter three written
    activations   T (P + 1) for each operand and result: once forward, twice backward, once more where computed again

Sources of rates and of what collectives send: `chips` and `collectives`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.model.flops import recomputed_flops, train_step_flops
from flexolmo_jax.planning.chips import Chip, group_bandwidth
from flexolmo_jax.planning.collectives import ICI, Collective
from flexolmo_jax.planning.memory import device_bytes
from flexolmo_jax.planning.program import Program


class Roofline(NamedTuple):
    """What a device does in a step, and the seconds it takes at the rates of its chip.

    Attributes:
      flops: FLOPs that the step needs, on this device.
      recomputed_flops: those computed again for the backward pass.
      hbm_bytes: bytes that go through its memory.
      sent_bytes: bytes that it sends to other devices; None where the program does not compile.
      compute_seconds: FLOPs at the chip's bfloat16 rate.
      hbm_seconds: bytes at the bandwidth of its memory.
      network_seconds: collectives at the bandwidth of the links they go over; None as `sent_bytes`.
    """

    flops: float
    recomputed_flops: float
    hbm_bytes: float
    sent_bytes: float | None
    compute_seconds: float
    hbm_seconds: float
    network_seconds: float | None

    @property
    def at_best(self) -> float:
        """Seconds of a step where computing, reading and sending overlap perfectly."""
        return max(self.compute_seconds, self.hbm_seconds, self.network_seconds or 0.0)

    @property
    def at_worst(self) -> float:
        """Seconds of a step at these rates where nothing overlaps."""
        return self.compute_seconds + self.hbm_seconds + (self.network_seconds or 0.0)


def roofline(
    config: ConfigDict,
    program: Program,
    chip: Chip,
    torus: Sequence[int],
    found: Sequence[Collective] | None,
) -> Roofline:
    """Estimates a step of a program.

    Args:
      config: its configuration.
      program: the program.
      chip: the kind of its devices.
      torus: chips along each dimension of a slice.
      found: its collectives, or None where it does not compile.
    """
    model, devices = program.model, program.mesh.size
    shape = (config.data.batch_size, config.data.sequence_length)
    flops = train_step_flops(model.architecture, model.layout, program.trainable, *shape) / devices
    again = recomputed_flops(model.architecture, model.layout, config.compute.remat, *shape) / devices
    moved = hbm_bytes(config, program)
    sent = None if found is None else sum(one.runs * one.bytes_sent for one in found)
    seconds = None if found is None else sum(network_seconds(one, program, chip, torus) for one in found)
    return Roofline(flops, again, moved, sent, (flops + again) / chip.peak_flops, moved / chip.hbm_bandwidth, seconds)


def network_seconds(one: Collective, program: Program, chip: Chip, torus: Sequence[int]) -> float:
    """Seconds that all runs of a collective take, without latency."""
    bandwidth = chip.dcn_bandwidth
    if one.network == ICI:
        devices = program.mesh.devices.flat
        bandwidth = group_bandwidth(chip, torus, [devices[place] for place in one.group])
    return one.runs * one.bytes_sent / bandwidth


def hbm_bytes(config: ConfigDict, program: Program) -> float:
    """Bytes that go through a device's memory in a step, as the head of this module says."""
    parts, passes = config.data.accumulate, 2 + (config.compute.remat not in ("none", "dots"))
    width = jnp.dtype(config.compute.dtype).itemsize
    axes, weights, gradients = program.model.logical_axes(), 0, 0
    for path, leaf in (program.state.trainable | program.frozen).items():
        # What is split over d_model lies so to save memory alone: it is gathered to be computed with.
        used = [None if axis in ("embed", "expert_embed") else axis for axis in axes[path]]
        lies = NamedSharding(program.mesh, sharding.partition_spec(used, config.sharding_rules))
        size = width * math.prod(lies.shard_shape(leaf.shape))
        gathered = size > width * math.prod(leaf.sharding.shard_shape(leaf.shape))
        weights += size * (2 if gathered else 1)
        gradients += size * (path in program.trainable)
    own = device_bytes(program.state.trainable)
    rows = program.batch["tokens"]
    tokens = math.prod(rows.sharding.shard_shape(rows.shape))
    return (
        parts * (passes * weights + 2 * gradients)
        + (2 * parts * own if parts > 1 else 0)
        + 8 * own
        + tokens * width * (passes + 1) * _activations(config, program)
    )


def _activations(config: ConfigDict, program: Program) -> float:
    """Elements that a token's matmuls, attention and residual sums read and write on a device in the forward pass."""
    arch, layout = program.model.architecture, program.model.layout

    def split(size: int, axis: str) -> float:
        return size / sharding.ways(program.mesh, sharding.partition_spec((axis,), config.sharding_rules)[0])

    width, vocabulary = arch.d_model, split(arch.vocab_size, "vocab")
    heads = split(arch.d_model, "heads")
    keys = split(2 * arch.num_kv_heads * arch.head_dim, "heads")
    hidden = split(arch.d_ff, "mlp")
    attention = 3 * width + 2 * (heads + keys) + heads + (heads + width)
    expert = 2 * (width + hidden) + (hidden + width)
    residual = 2 * 3 * width
    computed = layout.top_k  # of a pair both, of an anchor itself
    return arch.num_layers * (attention + computed * expert + residual) + width + vocabulary
