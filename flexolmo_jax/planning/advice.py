"""What to change about a step, from what it needs and what bounds it."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from flexolmo_jax.planning.memory import Memory
from flexolmo_jax.planning.roofline import Roofline

_GIB = 2**30
ROOMY = 0.9  # share of a device's memory that a plan should fill at most
FAR = 4  # times too many temporaries, beyond which keeping less does not help alone
LESS_KEPT = {"none": ("kernels", "full"), "dots": ("kernels", "full"), "kernels": ("full",)}  # of remat


def advice(config: ConfigDict, mesh: Mapping[str, int], memory: Memory, roofline: Roofline | None) -> list[str]:
    """What follows for a team that plans a run, a sentence each; the first says whether the step fits.

    Args:
      config: the configuration.
      mesh: {axis: devices along it}.
      memory: what a device must hold.
      roofline: what bounds the step; None where it does not fit.
    """
    sizes = f"{memory.peak / _GIB:,.2f} of {memory.available / _GIB:,.2f} GiB"
    if not memory.fits:
        changes = _for_memory(config, mesh, memory)
        return [f"does not fit: {sizes}; " + (f"try {' or '.join(changes)}" if changes else "try a larger slice")]
    said = [f"fits: {sizes}"]
    if roofline is None:
        return said
    limits = {
        "arithmetic": roofline.compute_seconds,
        "memory bandwidth": roofline.hbm_seconds,
        "the interconnect": roofline.network_seconds or 0.0,
    }
    bound = max(limits, key=limits.get)
    said.append(f"bound by {bound}: {', '.join(f'{name} {seconds:.3g} s' for name, seconds in limits.items())}")
    changes = _for_speed(config, mesh, memory, roofline, bound)
    if changes:
        said.append("may be faster with " + " or ".join(changes))
    return said


def _for_memory(config: ConfigDict, mesh: Mapping[str, int], memory: Memory) -> list[str]:
    """Changes that let a step need less of a device, those that cost least first."""
    changes = []
    state = memory.trained + memory.frozen + memory.optimizer
    if config.compute.frozen_dtype == "float32" and memory.frozen > 0.05 * memory.available:
        changes.append("--config.compute.frozen_dtype=bfloat16")
    if mesh["data"] > 1:
        changes.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh['data'] * mesh['fsdp']}")
    elif state > 0.7 * memory.available:
        devices = math.ceil(math.log2(math.prod(mesh.values()) * state / (0.5 * memory.available)))
        return [*changes, f"a slice of {2**devices} devices"]
    less_kept = [f"--config.compute.remat={how}" for how in LESS_KEPT.get(config.compute.remat, ())]
    rows = config.data.batch_size // config.data.accumulate // _row_ways(mesh)
    # Temporaries grow with the rows of a part, or nearly so.
    parts = excess = memory.temporaries / max(ROOMY * memory.available - state, 1)
    enough = [factor for factor in range(2, rows + 1) if rows % factor == 0]
    if enough:
        parts = next((factor for factor in enough if factor >= parts), rows)
        accumulate = f"--config.data.accumulate={config.data.accumulate * parts}"
        split = less_kept[:1] if memory.temporaries / parts + state > ROOMY * memory.available else []
        changes.append(" ".join([accumulate, *split]))
    if excess < FAR or not enough:
        changes += less_kept
    if not (enough or less_kept) and mesh["fsdp"] % 2 == 0:
        changes.append(f"--config.mesh.fsdp={mesh['fsdp'] // 2} --config.mesh.tensor={2 * mesh['tensor']}")
    return changes


def _for_speed(
    config: ConfigDict, mesh: Mapping[str, int], memory: Memory, roofline: Roofline, bound: str
) -> list[str]:
    """Changes that relieve what bounds a step, where memory allows."""
    changes = []
    room = ROOMY * memory.available - memory.peak
    if bound == "arithmetic":
        if roofline.recomputed_flops and room > memory.temporaries:
            changes.append("--config.compute.remat=dots")
        return changes
    if config.data.accumulate > 1 and room > memory.temporaries:
        # Weights are gathered and read once for each part, however many rows it has.
        changes.append(f"--config.data.accumulate={config.data.accumulate // _smallest_factor(config.data.accumulate)}")
    if bound == "the interconnect":
        if mesh["tensor"] > 1:
            fewer = mesh["tensor"] // _smallest_factor(mesh["tensor"])
            changes.append(f"--config.mesh.tensor={fewer} --config.mesh.fsdp={mesh['fsdp'] * mesh['tensor'] // fewer}")
        experts = config.mixture.num_experts
        if experts > 1 and mesh["expert"] == 1 and math.gcd(experts, mesh["fsdp"]) > 1:
            along = math.gcd(experts, mesh["fsdp"])
            changes.append(f"--config.mesh.expert={along} --config.mesh.fsdp={mesh['fsdp'] // along}")
    return changes


def _row_ways(mesh: Mapping[str, int]) -> int:
    return mesh["data"] * mesh["fsdp"] * mesh["expert"]


def _smallest_factor(number: int) -> int:
    """The smallest factor above 1 of a number above 1."""
    return next(factor for factor in range(2, number + 1) if number % factor == 0)
