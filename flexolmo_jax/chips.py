"""TPU chips and GPUs: what one JAX device of each computes, holds and moves, and the links between them.

Sources, as of 2026:

- [cloud] The pages of each TPU in Google Cloud's documentation, docs.cloud.google.com/tpu/docs/ and v4, v5e, v5p, v6e
  or tpu7x: FLOP/s, HBM, HBM bandwidth, torus.
- [book] "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus: bandwidth of a link, where a torus wraps around.
- [libtpu] What libtpu 0.0.42 says is available when a program does not fit: HBM that a program can use.
- [nvidia] NVIDIA's data sheets of H100 SXM, H200 SXM and of systems with eight of them (DGX, HGX): FLOP/s of dense
  matrices, HBM bandwidth, NVLink. Of the HBM, what PyTorch reports as a card's capacity: 79.1 and 139.8 GiB.

[cloud] gives a chip's interconnect over all its links and in both directions: 400 (v5e), 800 (v6e) or 1200 (v5p, TPU7x)
GB/s, thus 50 or 100 GB/s for each direction of each of 4 or 6 links; [book] gives 45 or 90, which are used here.
NVLink's 900 GB/s are those of both directions.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flexolmo_jax.errors import ArgumentError

_GIB = 2**30
GPU_MEMORY_FRACTION = 0.95  # of a GPU's HBM, for JAX: XLA_PYTHON_CLIENT_MEM_FRACTION; its default is 0.75
GPUS_OF_A_NODE = 8  # at most: those on one switch


class Chip(NamedTuple):
    """One JAX device of a kind: a GPU, a TPU chip, or half of one."""

    device_kind: str  # as in `jax.Device.device_kind`
    devices_per_chip: int  # JAX devices of a chip, among which all its numbers are divided here
    peak_flops: float  # bfloat16 FLOP/s
    hbm_bytes: int  # that a program can use
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s, one way; a chip has two links for each dimension of the torus, a GPU one
    torus_dimensions: int  # 2, or 3 with slices of cubes of 4 x 4 x 4 chips; 0 for GPUs

    @property
    def is_gpu(self) -> bool:
        return self.torus_dimensions == 0


CHIPS = {
    # [cloud] 275 TFLOP/s, 32 GiB, 1200 GB/s. Two cores are one device (libtpu's chip config "megacore").
    "v4": Chip("TPU v4", 1, 275e12, int(30.75 * _GIB), 1200e9, 45e9, 3),
    # [cloud] 197 TFLOP/s, 16 GB, 819 GB/s.
    "v5e": Chip("TPU v5 lite", 1, 197e12, int(15.75 * _GIB), 819e9, 45e9, 2),
    # [cloud] 459 TFLOP/s, 95 GiB, 2765 GB/s.
    "v5p": Chip("TPU v5", 1, 459e12, int(95.74 * _GIB), 2765e9, 90e9, 3),
    # [cloud] 918 TFLOP/s, 32 GB, 1638 GB/s.
    "v6e": Chip("TPU v6 lite", 1, 918e12, int(31.25 * _GIB), 1638e9, 90e9, 2),
    # [cloud] 2307 TFLOP/s, 192 GiB, 7380 GB/s. Each of its two chiplets is a device.
    "tpu7x": Chip("TPU7x", 2, 2307e12 / 2, int(94.75 * _GIB), 7380e9 / 2, 90e9 / 2, 3),
    # [nvidia] 989 TFLOP/s, 3.35 or 4.8 TB/s; NVLink 900 GB/s.
    "h100": Chip("NVIDIA H100 80GB HBM3", 1, 989e12, int(GPU_MEMORY_FRACTION * 79.1 * _GIB), 3350e9, 450e9, 0),
    "h200": Chip("NVIDIA H200", 1, 989e12, int(GPU_MEMORY_FRACTION * 139.8 * _GIB), 4800e9, 450e9, 0),
}

_NAME = re.compile(r"(\w+):(\d+(?:x\d+){0,2})")


def parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip of a topology, and how many there are along each dimension: (2, 4) of "v5e:2x4", (8,) of "h200:8".

    Raises:
      UserError: the name has another form, names no chip of the table, other dimensions than its torus has, or more
        GPUs than are in a node.
    """
    found = _NAME.fullmatch(topology)
    if not found:
        problem = "not a chip and the shape of its slice; give one such as v5e:2x4 or h200:8"
        raise ArgumentError("topology", topology, problem)
    name, shape = found[1], tuple(int(size) for size in found[2].split("x"))
    if name not in CHIPS:
        raise ArgumentError("topology", topology, f"no chip {name} is known; use one of {', '.join(CHIPS)}")
    chip = CHIPS[name]
    if chip.is_gpu and (len(shape) != 1 or not 0 < shape[0] <= GPUS_OF_A_NODE):
        problem = f"a node has 1 to {GPUS_OF_A_NODE} GPUs, as in {name}:8; several are not planned"
        raise ArgumentError("topology", topology, problem)
    if not chip.is_gpu and (len(shape) != chip.torus_dimensions or 0 in shape):
        example = f"{name}:{'4x4' if chip.torus_dimensions == 2 else '2x2x4'}"
        problem = f"a slice of {name} has {chip.torus_dimensions} sizes above 0, as in {example}"
        raise ArgumentError("topology", topology, problem)
    return chip, shape


def wraps(chip: Chip, torus: Sequence[int]) -> tuple[bool, ...]:
    """Which dimensions of a slice close to rings: those of 16 on a 2D torus, all of whole cubes on a 3D one [book]."""
    if chip.torus_dimensions == 3:
        return (all(size % 4 == 0 for size in torus),) * 3
    return tuple(size == 16 for size in torus)


def group_bandwidth(chip: Chip, torus: Sequence[int], devices: Sequence[Any]) -> float:
    """What each device of a group within a slice can send to its neighbors in the group, in bytes/s.

    Each dimension of the torus in which the group extends gives two links where the group closes to a ring, and else
    one, which is all that the ends of a line have. Devices of one chip count one link, though they are closer. A GPU
    has its one link to the switch, whatever the group.

    Args:
      chip: the kind of chip.
      torus: chips along each dimension of the slice.
      devices: the group, as JAX describes them (`coords`, which may have more dimensions than the torus).
    """
    if chip.is_gpu:
        return chip.link_bandwidth
    links = 0
    places = zip(*(device.coords[: len(torus)] for device in devices), strict=True)
    for size, wrapped, along in zip(torus, wraps(chip, torus), places, strict=True):
        extent = len(set(along))
        links += (2 if wrapped and extent == size else 1) if extent > 1 else 0
    return max(links, 1) * chip.link_bandwidth


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device, by what JAX calls it; None for one that is not in the table."""
    return next((chip.peak_flops for chip in CHIPS.values() if chip.device_kind == device_kind), None)
