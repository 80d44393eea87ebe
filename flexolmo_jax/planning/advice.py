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
    changes = _to_speed_up(config, memory, bound)
    sentences = [f"fits: {sizes}", f"bound by {bound}"]
    return sentences + (["may be faster with " + " or ".join(changes)] if changes else [])


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
    accumulate, sequences = config.data.grad_accum_steps, _sequences(config, mesh)
    factor = next((f for f in _divisors(sequences)[1:] if _has_room(memory, f)), None)
    if factor:
        changes.append(f"config.data.grad_accum_steps={accumulate * factor}")
    policies = _POLICIES[_POLICIES.index(config.compute.remat) + 1 :]
    if policies:
        is_not_enough = not factor and sequences > 1
        both = f"config.data.grad_accum_steps={accumulate * sequences} " if is_not_enough else ""
        changes.append(f"{both}config.compute.remat={policies[0]}")
    if not changes and mesh["fsdp"] % 2 == 0:
        changes.append(f"config.mesh.fsdp={mesh['fsdp'] // 2} config.mesh.tensor={2 * mesh['tensor']}")
    return changes


def _to_speed_up(config: ConfigDict, memory: Memory, bound: str) -> list[str]:
    """Changes that relieve what bounds a step, where memory allows."""
    accumulate, remat = config.data.grad_accum_steps, _POLICIES.index(config.compute.remat)
    if bound == "arithmetic":
        # "none" recomputes no matmul less than "dots"; each policy may keep as much again.
        return [f"config.compute.remat={_POLICIES[remat - 1]}"] if remat > 1 and _has_room(memory, 1 / 2) else []
    # Weights are gathered and read once for each micro-batch, however large it is.
    if accumulate > 1 and _has_room(memory, 1 / (factor := _divisors(accumulate)[1])):
        return [f"config.data.grad_accum_steps={accumulate // factor}"]
    return []


def _has_room(memory: Memory, factor: float) -> bool:
    """Whether `factor` times as many micro-batches probably fit: the gradient stays, the rest scales."""
    rest = max(0, memory.temporaries - memory.trained)
    return memory.state + memory.batch + memory.trained + rest / factor <= _FULL * memory.available


def _sequences(config: ConfigDict, mesh: Mapping[str, int]) -> int:
    """Sequences of a micro-batch that a device has."""
    return config.data.batch_size // config.data.grad_accum_steps // (mesh["data"] * mesh["fsdp"] * mesh["expert"])


def _divisors(number: int) -> list[int]:
    """All divisors of a number, in ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
