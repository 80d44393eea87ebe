"""Collectives of a compiled program: how often each runs, among which devices, and what a device sends for it.

In a group of n devices, each sends at least

    all-gather            (n - 1) / n    of what it then holds
    reduce-scatter        (n - 1) / n    of what it held
    all-reduce            2 (n - 1) / n  of the buffer: a reduce-scatter, then an all-gather
    all-to-all            (n - 1) / n    of the buffer
    ragged-all-to-all     (n - 1) / n    of the buffer, as if it were full
    collective-permute    the buffer

and on a ring it sends just that, except that there the two forms of all-to-all and distant permutes also pass on the
data of others, which is not counted. Sources: P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009; the sharding chapter of "How to Scale Your Model" (jax-ml.github.io/scaling-book).

Forms that only TPU programs have:

- `fusion(...), calls=%all-reduce-scatter` sums and keeps a slice: a reduce-scatter, though it contains an all-reduce.
- A collective may run in the background of other fusions. Each of these then contains a copy of it with the same
  `chain_id`; the one in the computation that calls `AsyncCollectiveStart` is counted.
- Between slices, collectives are pairs of a `send` and a `recv` with a `_xla_megascale_transfer_type`.

Devices are numbered by their place in the mesh, and in a program for several slices by their place within a slice.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.planning.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Module,
    array_bytes,
    executions,
    result_shape,
)

ICI, DCN = "ici", "dcn"


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # one of `hlo.COLLECTIVES`
    network: str  # `ICI` (the links within a slice) or `DCN` (the data center's network, between slices)
    group: tuple[int, ...]  # the devices of one of its groups; empty on `DCN`
    bytes_sent: float  # what one device sends in a run
    runs: int  # in a run of the program


def collectives(module: Module) -> list[Collective]:
    """The collectives of a compiled program, in the order of its instructions."""
    found = []
    for instruction, name, runs, _ in executions(module):
        computation = module.computations[name]
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            is_start = any('"AsyncCollectiveStart"' in each.attributes for each in computation.values())
            if is_start or "chain_id=" not in instruction.attributes:
                scatters = name.startswith("all-reduce-scatter")
                found.append(_within_slice(module, computation, instruction, scatters)._replace(runs=runs))
        elif instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
            found.append(_between_slices(computation, instruction)._replace(runs=runs))
    return found


def axes_of(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh, or of its part in a slice, along which devices differ; these are numbered in its order."""
    if not group:
        return ()
    places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(axis for axis, along in zip(mesh_shape, places, strict=True) if np.ptp(along))


def _within_slice(module: Module, computation: Computation, instruction: Instruction, scatters: bool) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    group = _permuted(instruction) if kind == "collective-permute" else _group(module, instruction, kind)
    is_ragged = kind == "ragged-all-to-all"
    size = array_bytes(computation[instruction.operands[0]].shape if is_ragged else result_shape(instruction))
    size *= len(group) if kind == "reduce-scatter" else 1
    kind = "reduce-scatter" if scatters else kind
    return Collective(kind, ICI, group, _bytes_sent(kind, len(group), size), 1)


def _between_slices(computation: Computation, instruction: Instruction) -> Collective:
    """A collective between slices, by the `send` that hands its data to the host."""
    kind = _search(r'_xla_megascale_transfer_type="(\w+)"', instruction).lower().replace("_", "-")
    kind = "collective-permute" if kind == "one-to-one" else kind
    # "{1,2}x{0:7}" (slices, and their devices), {{100000,200000},...} (devices of each group) or {{100000->200000},...}
    slices = len(re.findall(r"\d+", _search(r'_xla_megascale_target="?\{+([^}]*)\}', instruction)))
    size = array_bytes(computation[instruction.operands[0]].shape) * (slices if kind == "all-gather" else 1)
    return Collective(kind, DCN, (), _bytes_sent(kind, slices, size), 1)


def _bytes_sent(kind: str, n: int, size: int) -> float:
    """What each of n devices sends of a buffer of `size` bytes, before it is scattered or after it is gathered."""
    if kind == "collective-permute":
        return float(size * (n > 1))
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


# Groups of devices: listed, or as reshaped and transposed iota, or as axes of a mesh.

_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\}|\})")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")


def _group(module: Module, instruction: Instruction, kind: str) -> tuple[int, ...]:
    """The devices of the first of a collective's groups."""
    text, everyone = instruction.attributes, tuple(range(module.devices))
    if "use_global_device_ids=true" not in text and "channel_id=" in text and not kind.endswith("all-to-all"):
        return everyone  # the groups then list replicas, and take in all partitions of these
    if found := _LISTED.search(text):
        return tuple(_integers(found[1])) if found[1] else everyone
    if found := _MESH.search(text):
        return _along_axes(*found.groups())
    iota = _IOTA.search(text, text.index("replica_groups=["))
    return tuple(_iota(iota).reshape(_integers(iota[1]))[0].tolist())


def _along_axes(mesh: str, order: str | None, grouped: str) -> tuple[int, ...]:
    """The first group along some axes of a mesh.

    Args:
      mesh: the axes with their sizes, as "'x'=4,'y'=2".
      order: the devices in the mesh's order, as "[4,2]T(1,0)" or "0,2,1,3"; 0, 1, 2, ... if None.
      grouped: axes such as "'x'", or a factor of one such as "'x':(2)2": that of size 2 after one of 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    total = math.prod(sizes.values())
    strides = dict(zip(sizes, (total // np.cumprod(list(sizes.values()))).tolist(), strict=True))
    places = np.zeros(1, int)
    for name, before, part in re.findall(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?", grouped):
        size = int(part or sizes[name])
        stride = strides[name] * sizes[name] // (int(before or 1) * size)
        places = (places[:, None] + stride * np.arange(size)).reshape(-1)
    if order is None:
        return tuple(places.tolist())
    iota = _IOTA.match(order)
    devices = _iota(iota).reshape(-1) if iota else np.array(_integers(order))
    return tuple(devices[places].tolist())


def _iota(shape: re.Match) -> np.ndarray:
    """0, 1, 2, ... reshaped and transposed as "[4,2]T(1,0)" says, or "[2,4]<=[4,2]T(1,0)" right of its arrow."""
    sizes = _integers(shape[2] or shape[1])
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_integers(shape[3]) if shape[3] else None)


def _permuted(instruction: Instruction) -> tuple[int, ...]:
    """The devices among which a permutation moves the data of the first one that it moves."""
    listed = re.findall(r"(\d+),(\d+)", _search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction))
    pairs = [{int(source), int(target)} for source, target in listed if source != target]
    group = pairs[0] if pairs else set()
    while more := {device for pair in pairs if group & pair for device in pair} - group:
        group = group | more
    return tuple(sorted(group))


def _search(pattern: str, instruction: Instruction) -> str:
    """What the pattern's group matches in the attributes of an instruction, which must match."""
    found = re.search(pattern, instruction.attributes)
    if found is None:
        raise ValueError(f"{instruction.name}: no {pattern} in {instruction.attributes}")
    return found[1]


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
