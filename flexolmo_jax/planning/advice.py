"""What to change about a step, from what it needs and what bounds it."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from flexolmo_jax.model.architecture import Layout
from flexolmo_jax.model.decoder import REMAT_POLICIES
from flexolmo_jax.planning.compilation import Memory

if TYPE_CHECKING:
    from flexolmo_jax.planning.plan import Roofline

_GIB = 2**30
_FULL = 0.9  # share of a device's memory that a plan should fill at most
_POLICIES = tuple(REMAT_POLICIES)  # each keeps less than the one before it


def advice(
    config: ConfigDict, mesh: Mapping[str, int], slices: int, layout: Layout, memory: Memory, roofline: "Roofline"
) -> list[str]:
    """Sentences for a team that plans a run; the first says whether the step fits.

    Args:
      config: the configuration; changes are to its keys, as in "config.data.grad_accum_steps=2".
      mesh: {axis: devices along it}.
      slices: number of slices that these make up.
      layout: how the model's experts are laid out.
      memory: what a device must hold.
      roofline: what bounds the step.
    """
    sizes = f"{memory.peak / _GIB:,.2f} of {memory.available / _GIB:,.2f} GiB"
    if not memory.fits:
        return [f"does not fit: {sizes}; try {' or '.join(_to_fit(config, mesh, slices, memory) or ['more devices'])}"]
    limits = {
        "arithmetic": roofline.compute_seconds,
        "HBM": roofline.hbm_seconds or 0.0,
        "interconnect": roofline.network_seconds or 0.0,
    }
    bound = max(limits, key=lambda name: limits[name])
    changes = _to_speed_up(config, mesh, layout, memory, bound)
    sentences = [f"fits: {sizes}", f"bound by {bound}"]
    return sentences + (["may be faster with " + " or ".join(changes)] if changes else [])


def _to_fit(config: ConfigDict, mesh: Mapping[str, int], slices: int, memory: Memory) -> list[str]:
    """Changes with which a step needs less of a device, those that cost least first."""
    changes = []
    if config.compute.frozen_dtype == "float32" and memory.frozen > 0.05 * memory.available:
        changes.append("config.compute.frozen_dtype=bfloat16")
    if mesh["data"] > slices:  # replicas are for slices alone
        changes.append(f"config.mesh.data={slices} config.mesh.fsdp={mesh['data'] // slices * mesh['fsdp']}")
    elif memory.state > 0.7 * memory.available:
        devices = math.ceil(math.log2(math.prod(mesh.values()) * memory.state / (0.5 * memory.available)))
        return [*changes, f"{2**devices} devices"]
    sequences = _sequences(config, mesh)
    factors = [f for f in _divisors(sequences)[1:] if _needed(memory, f) <= _FULL * memory.available]
    if factors:
        changes.append(f"config.data.grad_accum_steps={config.data.grad_accum_steps * factors[0]}")
    policies = _POLICIES[_POLICIES.index(config.compute.remat) + 1 :]
    if policies:
        fewest = (
            ""
            if factors or sequences == 1
            else (f"config.data.grad_accum_steps={config.data.grad_accum_steps * sequences} ")
        )
        changes.append(f"{fewest}config.compute.remat={policies[0]}")
    if not changes and mesh["fsdp"] % 2 == 0:
        changes.append(f"config.mesh.fsdp={mesh['fsdp'] // 2} config.mesh.tensor={2 * mesh['tensor']}")
    return changes


def _to_speed_up(config: ConfigDict, mesh: Mapping[str, int], layout: Layout, memory: Memory, bound: str) -> list[str]:
    """Changes that relieve what bounds a step, where memory allows."""
    accumulate, remat = config.data.grad_accum_steps, _POLICIES.index(config.compute.remat)
    if bound == "arithmetic":
        # "none" recomputes no matmul less than "dots"; each policy may keep as much again.
        if remat > 1 and _needed(memory, 1 / 2) <= _FULL * memory.available:
            return [f"config.compute.remat={_POLICIES[remat - 1]}"]
        return []
    changes = []
    if accumulate > 1:
        # Weights are gathered and read once for each micro-batch, however large it is.
        factor = _divisors(accumulate)[1]
        if _needed(memory, 1 / factor) <= _FULL * memory.available:
            changes.append(f"config.data.grad_accum_steps={accumulate // factor}")
    if bound == "interconnect":
        factor = _divisors(mesh["tensor"])[1] if mesh["tensor"] > 1 else 1
        if factor > 1 and _sequences(config, mesh) % factor == 0:
            fewer = mesh["tensor"] // factor
            changes.append(f"config.mesh.tensor={fewer} config.mesh.fsdp={mesh['fsdp'] * factor}")
        along = math.gcd(layout.num_experts, mesh["fsdp"])
        if layout.kind == "stacked" and mesh["expert"] == 1 and along > 1:
            changes.append(f"config.mesh.expert={along} config.mesh.fsdp={mesh['fsdp'] // along}")
    return changes


def _needed(memory: Memory, factor: float) -> float:
    """About the bytes of a step with `factor` times as many micro-batches: the gradient stays, the rest scales."""
    rest = max(0, memory.temporaries - memory.trained)
    return memory.state + memory.batch + memory.trained + rest / factor


def _sequences(config: ConfigDict, mesh: Mapping[str, int]) -> int:
    """Sequences of a micro-batch that a device has."""
    return config.data.batch_size // config.data.grad_accum_steps // (mesh["data"] * mesh["fsdp"] * mesh["expert"])


def _divisors(number: int) -> list[int]:
    """All divisors of a number, in ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
