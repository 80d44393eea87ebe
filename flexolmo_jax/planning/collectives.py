"""Collectives of a compiled program: how often each runs, among which devices, and what a device sends for it.

In a group of n devices, each sends at least

    all-gather            (n - 1) / n    of what it then holds
    reduce-scatter        (n - 1) / n    of what it held
    all-reduce            2 (n - 1) / n  of the buffer: a reduce-scatter, then an all-gather
    all-to-all            (n - 1) / n    of the buffer
    collective-permute    the buffer

and on a ring it sends just that, except that there an all-to-all and distant permutes also pass on the data of others,
which is not counted. Sources: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009; the sharding chapter of "How to Scale Your Model" (jax-ml.github.io/scaling-book).

Forms that only TPU programs have:

- `fusion(...), calls=%all-reduce-scatter` sums and keeps a slice: a reduce-scatter, though it contains an all-reduce.
- A collective may run in the background of other fusions. Each of these then contains a copy of it with the same
  `chain_id`; the one in the computation that calls `AsyncCollectiveStart` is counted.

Devices are numbered by their place in the mesh.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.chips import Chip, group_bandwidth
from flexolmo_jax.planning.hlo import COLLECTIVES, Instruction, Module, array_bytes, executions, result_shape


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # one of `hlo.COLLECTIVES`
    group: tuple[int, ...]  # the devices of one of its groups
    bytes_sent: float  # what one device sends in a run
    runs: int  # in a run of the program


class CollectiveTotal(NamedTuple):
    """Collectives of a kind along the same mesh axes: their runs in a step, and what a device sends for them."""

    kind: str
    axes: tuple[str, ...]
    runs: int
    bytes_sent: float
    seconds: float  # at the bandwidth of the links that each takes, without latency


def collective_totals(module: Module, mesh: Mesh, chip: Chip, torus: Sequence[int]) -> list[CollectiveTotal]:
    """Collectives of a program, added up by kind and mesh axes; those that send most come first."""
    devices = mesh.devices.flat
    totals: dict[tuple, CollectiveTotal] = {}
    for found in collectives(module):
        axes = axes_of(found.group, mesh.shape)
        _, _, runs, sent, seconds = totals.get((found.kind, axes), CollectiveTotal("", (), 0, 0.0, 0.0))
        more = found.runs * found.bytes_sent
        seconds += more / group_bandwidth(chip, torus, [devices[place] for place in found.group])
        totals[found.kind, axes] = CollectiveTotal(found.kind, axes, runs + found.runs, sent + more, seconds)
    return sorted(totals.values(), key=lambda total: (-total.bytes_sent, total))


def axes_of(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which devices differ; these are numbered in its order."""
    places = np.unravel_index(np.asarray(group, int), tuple(mesh_shape.values()))
    return tuple(axis for axis, along in zip(mesh_shape, places, strict=True) if len(set(along)) > 1)


def collectives(module: Module) -> list[Collective]:
    """The collectives of a compiled program, in the order of its instructions."""
    found = []
    for instruction, name, runs, _ in executions(module):
        kind = instruction.opcode.removesuffix("-start")
        inside = module.computations[name].values()
        is_start = any('"AsyncCollectiveStart"' in each.attributes for each in inside)
        if kind not in COLLECTIVES or ("chain_id=" in instruction.attributes and not is_start):
            continue
        group = _permuted(instruction) if kind == "collective-permute" else _group(module, instruction)
        size = array_bytes(result_shape(instruction)) * (len(group) if kind == "reduce-scatter" else 1)
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        found.append(Collective(kind, group, _bytes_sent(kind, len(group), size), runs))
    return found


def _bytes_sent(kind: str, n: int, size: int) -> float:
    """What each of n devices sends of a buffer of `size` bytes, before it is scattered or after it is gathered."""
    if kind == "collective-permute":
        return float(size * (n > 1))
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


# Groups of devices: listed, or as reshaped and transposed iota, or as axes of a mesh.
_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\}|\})")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\S+)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}:]*)\}")


def _group(module: Module, instruction: Instruction) -> tuple[int, ...]:
    """The devices of the first of a collective's groups."""
    text = instruction.attributes
    if found := _LISTED.search(text):
        return tuple(_integers(found[1])) if found[1] else tuple(range(module.devices))
    if found := _IOTA.search(text):
        return tuple(_devices(found[2]).reshape(_integers(found[1]))[0].tolist())
    found = _MESH.search(text)
    if not found:
        raise ValueError(f"{instruction.name}: replica groups of an unknown form in {text}")
    sizes = {name: int(size) for name, size in re.findall(r"('[^']+')=(\d+)", found[1])}
    devices = _devices(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
    along = tuple(slice(None) if name in found[3] else 0 for name in sizes)
    return tuple(devices.reshape(tuple(sizes.values()))[along].flatten().tolist())


def _devices(text: str) -> np.ndarray:
    """Numbers of devices: "0,2,1,3", or 0, 1, 2, ... reshaped and transposed as in "[2,2]T(1,0)"."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not shape:
        return np.array(_integers(text))
    sizes = _integers(shape[1])
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_integers(shape[2]) if shape[2] else None)


def _permuted(instruction: Instruction) -> tuple[int, ...]:
    """The devices among which a permutation moves the data of the first one that it moves."""
    listed = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.partition("source_target_pairs=")[2])
    pairs = [{int(source), int(target)} for source, target in listed if source != target]
    group = pairs[0] if pairs else set()
    while more := {device for pair in pairs if group & pair for device in pair} - group:
        group = group | more
    return tuple(sorted(group))


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
