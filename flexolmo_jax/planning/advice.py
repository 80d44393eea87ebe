"""What to change about a step, from what it needs and what bounds it."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from flexolmo_jax.model.decoder import REMAT_POLICIES
from flexolmo_jax.planning.compilation import Memory

_GIB = 2**30
_FULL = 0.9  # share of a device's memory that a plan should fill at most
_POLICIES = tuple(REMAT_POLICIES)  # each keeps less than the one before it


def advice(config: ConfigDict, mesh: Mapping[str, int], memory: Memory, bound: str) -> list[str]:
    """Sentences for a team that plans a run; the first says whether the step fits.

    Args:
      config: the configuration; changes are to its keys, as in "config.data.grad_accum_steps=2".
      mesh: {axis: devices along it}.
      memory: what a device must hold.
      bound: "arithmetic", "HBM" or "interconnect", whichever takes longest.
    """
    sizes = f"{memory.peak / _GIB:,.2f} of {memory.available / _GIB:,.2f} GiB"
    if not memory.fits:
        return [f"does not fit: {sizes}; try {' or '.join(_to_fit(config, mesh, memory) or ['more devices'])}"]
    return [f"fits: {sizes}", f"bound by {bound}"]


def _to_fit(config: ConfigDict, mesh: Mapping[str, int], memory: Memory) -> list[str]:
    """Changes with which a step needs less of a device, those that cost least first."""
    changes = []
    if config.compute.frozen_dtype == "float32" and memory.frozen > 0.05 * memory.available:
        changes.append("config.compute.frozen_dtype=bfloat16")
    if mesh["data"] > 1:
        changes.append(f"config.mesh.data=1 config.mesh.fsdp={mesh['data'] * mesh['fsdp']}")
    elif memory.state > 0.7 * memory.available:
        devices = math.ceil(math.log2(math.prod(mesh.values()) * memory.state / (0.5 * memory.available)))
        return [*changes, f"{2**devices} devices"]
    accumulate = config.data.grad_accum_steps
    # Of a micro-batch, on each device.
    sequences = config.data.batch_size // accumulate // (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    # Of more micro-batches, the gradient stays, and the other temporaries shrink.
    room = _FULL * memory.available - memory.state - memory.batch - memory.trained
    factors = (factor for factor in range(2, sequences + 1) if sequences % factor == 0)
    factor = next((f for f in factors if memory.temporaries - memory.trained <= f * room), None)
    if factor:
        changes.append(f"config.data.grad_accum_steps={accumulate * factor}")
    policies = _POLICIES[_POLICIES.index(config.compute.remat) + 1 :]
    if policies:
        both = f"config.data.grad_accum_steps={accumulate * sequences} " if not factor and sequences > 1 else ""
        changes.append(f"{both}config.compute.remat={policies[0]}")
    return changes
