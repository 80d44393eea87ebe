"""What to change about a step, from what it needs and what bounds it."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from flexolmo_jax.model.architecture import Layout
from flexolmo_jax.model.decoder import REMAT_POLICIES
from flexolmo_jax.planning.memory import Memory
from flexolmo_jax.planning.roofline import Roofline

_GIB = 2**30
ROOMY = 0.9  # share of a device's memory that a plan should fill at most
POLICIES = tuple(REMAT_POLICIES)  # each keeps less than the one before it


def advice(
    config: ConfigDict,
    mesh: Mapping[str, int],
    slices: int,
    layout: Layout,
    memory: Memory,
    kept: Mapping[str, int],
    roofline: Roofline | None,
) -> list[str]:
    """What follows for a team that plans a run, a sentence each; the first says whether the step fits.

    Args:
      config: the configuration.
      mesh: {axis: devices along it}.
      slices: how many slices these are of.
      layout: how the model's experts are laid out.
      memory: what a device must hold.
      kept: {policy of rematerialisation: about what it keeps, in bytes}, as from `memory.kept_bytes`.
      roofline: what bounds the step; None where it does not fit.
    """
    sizes = f"{memory.peak / _GIB:,.2f} of {memory.available / _GIB:,.2f} GiB"
    if not memory.fits:
        changes = _for_memory(config, mesh, slices, memory, kept)
        return [f"does not fit: {sizes}; " + (f"try {' or '.join(changes)}" if changes else "try more devices")]
    said = [f"fits: {sizes}"]
    if roofline is None:
        return said
    limits = {
        "arithmetic": roofline.compute_seconds,
        "HBM": roofline.hbm_seconds,
        "interconnect": roofline.network_seconds or 0.0,
    }
    bound = max(limits, key=limits.get)
    said.append(f"bound by {bound}")
    changes = _for_speed(config, mesh, layout, memory, kept, bound)
    if changes:
        said.append("may be faster with " + " or ".join(changes))
    return said


def _for_memory(
    config: ConfigDict, mesh: Mapping[str, int], slices: int, memory: Memory, kept: Mapping[str, int]
) -> list[str]:
    """Changes that let a step need less of a device, those that cost least first."""
    changes = []
    if config.compute.frozen_dtype == "float32" and memory.frozen > 0.05 * memory.available:
        changes.append("--config.compute.frozen_dtype=bfloat16")
    if mesh["data"] > slices:  # between slices go copies alone
        changes.append(f"--config.mesh.data={slices} --config.mesh.fsdp={mesh['data'] // slices * mesh['fsdp']}")
    elif memory.state > 0.7 * memory.available:
        devices = math.ceil(math.log2(math.prod(mesh.values()) * memory.state / (0.5 * memory.available)))
        return [*changes, f"{2**devices} devices"]
    rows = _rows(config, mesh)
    fewest = rows + 1
    for remat in POLICIES[POLICIES.index(config.compute.remat) :]:
        parts = _divisors(rows)
        parts = [part for part in parts if _needed(config, memory, kept, remat, part) <= ROOMY * memory.available]
        if parts and parts[0] < fewest:  # to compute more again is worth fewer parts alone
            fewest = parts[0]
            changes.append(_flags(config, remat, fewest))
    if not changes and mesh["fsdp"] % 2 == 0:
        tensor = f"--config.mesh.fsdp={mesh['fsdp'] // 2} --config.mesh.tensor={2 * mesh['tensor']}"
        changes.append(" ".join(filter(None, [_flags(config, POLICIES[-1], rows), tensor])))
    return changes


def _for_speed(
    config: ConfigDict,
    mesh: Mapping[str, int],
    layout: Layout,
    memory: Memory,
    kept: Mapping[str, int],
    bound: str,
) -> list[str]:
    """Changes that relieve what bounds a step, where memory allows."""

    def fits(remat: str, part: float) -> bool:
        return _needed(config, memory, kept, remat, part) <= ROOMY * memory.available

    changes, now = [], config.compute.remat
    if bound == "arithmetic":
        # "none" computes no matmul less than "dots".
        keep_more = [remat for remat in POLICIES[1 : max(1, POLICIES.index(now))] if fits(remat, 1)]
        return [_flags(config, remat, 1) for remat in keep_more[:1]]
    if config.data.grad_accum_steps > 1:
        # Weights are gathered and read once for each part, however many rows it has.
        factor = _divisors(config.data.grad_accum_steps)[1]
        if fits(now, 1 / factor):
            changes.append(f"--config.data.grad_accum_steps={config.data.grad_accum_steps // factor}")
    if bound == "interconnect":
        factor = _divisors(mesh["tensor"])[1] if mesh["tensor"] > 1 else 1
        if factor > 1 and _rows(config, mesh) % factor == 0:
            fewer = mesh["tensor"] // factor
            changes.append(f"--config.mesh.tensor={fewer} --config.mesh.fsdp={mesh['fsdp'] * factor}")
        along = math.gcd(layout.num_experts, mesh["fsdp"])
        if layout.kind == "stacked" and mesh["expert"] == 1 and along > 1:
            changes.append(f"--config.mesh.expert={along} --config.mesh.fsdp={mesh['fsdp'] // along}")
    return changes


def _needed(config: ConfigDict, memory: Memory, kept: Mapping[str, int], remat: str, parts: float) -> float:
    """About what a step needs that keeps what `remat` does, of `parts` times as many parts, in bytes.

    The gradient stays; all else goes by the rows.
    """
    rest = max(0, memory.temporaries - kept[config.compute.remat] - memory.trained)
    return memory.state + memory.batch + memory.trained + (rest + kept[remat]) / parts


def _flags(config: ConfigDict, remat: str, parts: int) -> str:
    """Flags that change the policy, and the number of parts by that factor; "" where there is nothing to change."""
    flags = []
    if parts > 1:
        flags.append(f"--config.data.grad_accum_steps={config.data.grad_accum_steps * parts}")
    if remat != config.compute.remat:
        flags.append(f"--config.compute.remat={remat}")
    return " ".join(flags)


def _rows(config: ConfigDict, mesh: Mapping[str, int]) -> int:
    """Rows of a part of the batch that a device has."""
    return config.data.batch_size // config.data.grad_accum_steps // (mesh["data"] * mesh["fsdp"] * mesh["expert"])


def _divisors(number: int) -> list[int]:
    """All divisors of a number, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
