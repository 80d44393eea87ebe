"""How long a step takes at best, by what its devices compute, read and send.

FLOPs are those of `model.flops`, and what the backward pass computes again. For HBM the assumption is that matmuls,
attention and residual sums read their operands and write their results once, in the dtype of the computation; that an
expert's gate and up are both read for their product; that the rows of stacked experts are copied to them and back; and
that all else is fused with these. So a device moves in a step of A parts, T tokens on the device in all,

    blocks        A P     of each weight; twice that where it is gathered first
    head          2 A     for each chunk of the length in which the loss is computed, and A where it is gathered first
    embedding     A       where it is gathered first; T rows are read and written
    gradients     2 A     of what is trained, before sums over devices; and of the device's own part in float32, where
                          A > 1; of the head 2 A more for each chunk, in float32
    optimizer     8       of its own part in float32: gradient (for the norm, and again), parameter and two moments
                          read, the latter three written
    activations   T (P + 1) for each operand and result: once forward, twice backward, once more where computed again
    logits        T       in float32, written and read; their gradient written and read twice

where P is 3 for what `recomputed_parts` says, and else 2: forward and backward. `block_work` says what is added where
stacked experts are computed in blocks or tiles of rows, as on GPUs.

Sources of rates and of what collectives send: `chips` and `collectives`.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.model.flops import recomputed_flops, recomputed_parts, train_step_flops
from flexolmo_jax.model.kernels.grouped_matmul import MOSAIC_TILE, block_tokens, mosaic_fits
from flexolmo_jax.model.loss import chunk_length
from flexolmo_jax.planning.chips import Chip, group_bandwidth
from flexolmo_jax.planning.collectives import ICI, Collective
from flexolmo_jax.planning.memory import device_bytes
from flexolmo_jax.training.run import Program

FLOAT32 = 4  # bytes


class Roofline(NamedTuple):
    """What a device does in a step, and the seconds it takes at the rates of its chip.

    Attributes:
      flops: FLOPs that the step needs, on this device.
      recomputed_flops: those computed again for the backward pass.
      idle_flops: those of blocks, or tiles, of experts' rows that no token needs.
      hbm_bytes: bytes that go through its memory.
      sent_bytes: bytes that it sends to other devices; None where the program does not compile.
      compute_seconds: all of these FLOPs at the chip's bfloat16 rate.
      hbm_seconds: bytes at the bandwidth of its memory.
      network_seconds: collectives at the bandwidth of the links they go over; None as `sent_bytes`.
    """

    flops: float
    recomputed_flops: float
    idle_flops: float
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
    idle, copied = block_work(config, program)
    moved = hbm_bytes(config, program) + copied
    sent = None if found is None else sum(one.runs * one.bytes_sent for one in found)
    seconds = None if found is None else sum(network_seconds(one, program, chip, torus) for one in found)
    compute_seconds, hbm_seconds = (flops + again + idle) / chip.peak_flops, moved / chip.hbm_bandwidth
    return Roofline(flops, again, idle, moved, sent, compute_seconds, hbm_seconds, seconds)


def network_seconds(one: Collective, program: Program, chip: Chip, torus: Sequence[int]) -> float:
    """Seconds that all runs of a collective take, without latency."""
    bandwidth = chip.dcn_bandwidth
    if one.network == ICI:
        devices = program.mesh.devices.flat
        bandwidth = group_bandwidth(chip, torus, [devices[place] for place in one.group])
    return one.runs * one.bytes_sent / bandwidth


def block_work(config: ConfigDict, program: Program) -> tuple[float, float]:
    """What a device does in a step for blocks, or tiles, of stacked experts' rows (`grouped_matmul`) beyond their need.

    For each matmul a block reads its kernel, writes it and reads it again. For the kernel's gradient its product is
    written, the sum so far read and written, and both are read to write their sum, in float32. Of m rows of an expert
    there are m / b + 1 / 2 blocks of b rows on average, but at least one. Tiles of the kernels for Hopper copy nothing,
    and all but the first expert begin in the middle of one.

    Returns:
      (FLOPs, bytes that go through its memory); zeros where experts are computed in another way.
    """
    model, parts, ways = program.model, config.data.grad_accum_steps, program.num_shards
    arch, layout, dispatch = model.architecture, model.layout, model.compute.dispatch
    if layout.kind != "stacked" or layout.top_k == layout.num_experts or dispatch not in ("blocks", "mosaic"):
        return 0.0, 0.0
    experts = layout.num_experts // ways("experts")
    rows = program.device_tokens // parts * layout.top_k
    room = program.device_tokens // parts * ways("experts") * min(layout.top_k, experts)
    kernels = (experts, arch.d_model, arch.d_ff // ways("mlp"))
    kernel = math.prod(kernels[1:])
    products = 2 + ("experts" in recomputed_parts(config.compute.remat, layout))
    trained = "blocks/moe/experts/gate" in program.trainable
    times = parts * arch.num_layers * 3  # gate, up, down
    if dispatch == "mosaic" and mosaic_fits(room, rows, kernels, config.compute.dtype):
        visited = room + (experts - 1) * MOSAIC_TILE
        return float(times * 2 * kernel * products * (visited - rows)), 0.0
    size = block_tokens(rows, experts)
    blocks = experts * max(1.0, rows / experts / size + 1 / 2)
    idle = 2 * kernel * (products + trained) * (blocks * size - rows)
    # Once for each expert its kernel is counted as a weight.
    copied = kernel * (3 * blocks - experts) * products * jnp.dtype(config.compute.dtype).itemsize
    copied += kernel * blocks * 6 * FLOAT32 * trained
    return float(times * idle), float(times * copied)


def hbm_bytes(config: ConfigDict, program: Program) -> float:
    """Bytes that go through a device's memory in a step, as the head of this module says."""
    model, parts = program.model, config.data.grad_accum_steps
    width = jnp.dtype(config.compute.dtype).itemsize
    chunks = -(-config.data.sequence_length // chunk_length(model.compute.platform))
    again = recomputed_parts(config.compute.remat, model.layout)
    head = "embedding" if model.architecture.tied_embeddings else "head"
    axes, moved = model.logical_axes(), 0.0
    for path, leaf in (program.state.trainable | program.frozen).items():
        # What is split over d_model lies so to save memory alone: it is gathered to be computed with.
        used = [None if axis in ("embed", "expert_embed") else axis for axis in axes[path]]
        lies = NamedSharding(program.mesh, sharding.partition_spec(used, config.sharding_rules))
        size = width * math.prod(lies.shard_shape(leaf.shape))
        is_gathered = size > width * math.prod(leaf.sharding.shard_shape(leaf.shape))
        if path.startswith("blocks/"):
            passes = 2 + (("experts" if path.startswith("blocks/moe/") else "projections") in again)
            moved += parts * passes * size * (1 + is_gathered)
        else:
            moved += parts * size * ((2 * chunks if path == head else 0) + is_gathered)
        if path in program.trainable:
            moved += 2 * parts * size
            moved += 2 * parts * chunks * size * FLOAT32 / width if path == head else 0
    own = device_bytes(program.state.trainable)
    moved += (2 * parts * own if parts > 1 else 0) + 8 * own
    return moved + program.device_tokens * _token_bytes(program, width, again)


def _token_bytes(program: Program, width: int, again: Collection[str]) -> float:
    """Bytes that go through a device's memory for a token in a step, besides weights."""
    arch, layout, ways = program.model.architecture, program.model.layout, program.num_shards
    heads, keys = arch.d_model / ways("heads"), 2 * arch.num_kv_heads * arch.head_dim / ways("heads")
    hidden, vocabulary = arch.d_ff / ways("mlp"), arch.vocab_size / ways("vocab")
    expert = 2 * (arch.d_model + hidden) + (2 * hidden + arch.d_model)
    copies = 4 * arch.d_model if layout.kind == "stacked" else 0
    elements = {
        "projections": (3 * arch.d_model + heads + keys) + (heads + arch.d_model),
        "attention": (heads + keys) + heads,
        "experts": layout.top_k * (expert + copies),  # of a pair both compute, of an anchor itself
    }
    block = 3 * 2 * 3 * arch.d_model + sum((3 + (part in again)) * size for part, size in elements.items())
    embedding_and_head = 2 * arch.d_model + 3 * arch.d_model
    logits = vocabulary * (2 * FLOAT32 + 3 * width)
    return width * (arch.num_layers * block + embedding_and_head) + logits
