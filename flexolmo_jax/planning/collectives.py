"""Collectives of a compiled program: how often each runs, among which devices, and what a device sends for it.

They are read from the program's text, `jax.stages.Compiled.as_text()`. In a group of n devices, each sends at least

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flexolmo_jax.planning.hlo import Instruction, Module, called, parse, split, trip_count

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
ICI, DCN = "ici", "dcn"
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")
_TRANSFERS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
    "REDUCE_SCATTER": "reduce-scatter",
}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      network: `ICI` (the links within a slice) or `DCN` (the data centre's network, between slices).
      group_size: devices that take part together; slices, on `DCN`.
      group: the devices of one of its groups; empty on `DCN`.
      dtypes: HLO names of its arrays' dtypes, such as "bf16".
      bytes_sent: what one device sends in a run, in bytes.
      runs: how often it runs in a run of the program.
      op_name: where in the traced function it comes from; may be empty.
    """

    kind: str
    network: str
    group_size: int
    group: tuple[int, ...]
    dtypes: tuple[str, ...]
    bytes_sent: float
    runs: int
    op_name: str


class Row(NamedTuple):
    """Collectives of a kind along the same mesh axes: how often they run, and the bytes that a device sends in all."""

    kind: str
    network: str
    axes: tuple[str, ...]
    runs: int
    bytes_sent: float


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, in the order of its computations' instructions.

    One inside loops is listed once, with the product of their trip counts as its runs. A loop whose trip count the
    text does not tell counts as one trip, with a warning. Of a conditional's branches the one that sends most counts.

    Args:
      text: the optimised HLO of one program, as XLA prints it.
    """
    module = parse(text)
    return list(_visit(module, module.entry, 1))


def summarise(found: Iterable[Collective], mesh_shape: Mapping[str, int] | None = None) -> list[Row]:
    """Adds collectives up by kind and, where a mesh is given, by the axes that they span; what sends most comes first.

    Args:
      found: as from `collectives`.
      mesh_shape: {axis: size} of the program's mesh, in its order; of one slice's part of it, where there are several.
    """
    totals: dict[tuple, list] = {}
    for one in found:
        axes = axes_of(one.group, mesh_shape) if mesh_shape else ()
        total = totals.setdefault((one.kind, one.network, axes), [0, 0.0])
        total[0] += one.runs
        total[1] += one.runs * one.bytes_sent
    return sorted((Row(*key, *total) for key, total in totals.items()), key=lambda row: (-row.bytes_sent, row))


def axes_of(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; devices are numbered in the mesh's (row-major) order."""
    if not group:
        return ()
    places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(axis for axis, along in zip(mesh_shape, places, strict=True) if np.ptp(along))


def _visit(module: Module, name: str, runs: int) -> Iterator[Collective]:
    """Collectives of a computation that runs so often, and of all that it calls."""
    computation = module.computations[name]
    starts_chain = any('"AsyncCollectiveStart"' in one.attributes for one in computation.values())
    for one in computation.values():
        if one.opcode.endswith(("-done", "-update")):
            continue
        if one.opcode.removesuffix("-start") in KINDS:
            if starts_chain or "chain_id=" not in one.attributes:
                yield _collective(module, computation, one, runs, scatters=name.startswith("all-reduce-scatter"))
        elif one.opcode == "send" and "_xla_megascale_transfer_type" in one.attributes:
            yield _transfer(computation, one, runs)
        elif one.opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            branches = [list(_visit(module, branch, runs)) for key in names for branch in called(one, key)]
            yield from max(branches, key=lambda found: sum(each.runs * each.bytes_sent for each in found))
        elif one.opcode == "while":
            inside = [each for key in ("condition", "body") for each in _visit(module, called(one, key)[0], runs)]
            if inside:
                trips = trip_count(module, computation, one)
                yield from (each._replace(runs=each.runs * trips) for each in inside)
        else:
            for key in ("calls", "to_apply", "called_computations"):
                for callee in called(one, key):
                    yield from _visit(module, callee, runs)


# One collective.


def _collective(
    module: Module, computation: dict[str, Instruction], one: Instruction, runs: int, scatters: bool
) -> Collective:
    kind = one.opcode.removesuffix("-start")
    group = _permuted(one) if kind == "collective-permute" else _group(module, one, kind)
    shape = computation[one.operands[0]].shape if kind == "ragged-all-to-all" else _result(one)
    size = sum(_bytes(shape).values()) * (len(group) if kind == "reduce-scatter" else 1)
    kind = "reduce-scatter" if scatters else kind
    sent = _bytes_sent(kind, len(group), size)
    return Collective(kind, ICI, len(group), group, tuple(_bytes(shape)), sent, runs, _op_name(one))


def _transfer(computation: dict[str, Instruction], one: Instruction, runs: int) -> Collective:
    """A collective between slices, by the `send` that hands its data to the host."""
    kind = _TRANSFERS[re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)[1]]
    # "{1,2}x{0:7}" (slices, and their devices), {{100000,200000},...} (devices of each group) or {{100000->200000},...}
    slices = len(re.findall(r"\d+", re.search(r'_xla_megascale_target="?\{+([^}]*)\}', one.attributes)[1]))
    arrays = _bytes(computation[one.operands[0]].shape)
    size = sum(arrays.values()) * (slices if kind == "all-gather" else 1)
    return Collective(kind, DCN, slices, (), tuple(arrays), _bytes_sent(kind, slices, size), runs, _op_name(one))


def _bytes_sent(kind: str, n: int, size: int) -> float:
    """What each of n devices sends; `size` is that of the whole buffer, before it is scattered or after it is gathered.

    Both in bytes.
    """
    if kind == "collective-permute":
        return float(size * (n > 1))
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _result(one: Instruction) -> str:
    """Shape of what a collective results in; an asynchronous one starts with (operands, results, ...)."""
    # That of an all-reduce does not in jax 0.10.
    if not one.opcode.endswith("-start") or (one.opcode == "all-reduce-start" and not one.shape.startswith("((")):
        return one.shape
    _, rest = split(one.shape[1:-1], ",")
    return split(rest, ",")[0]


def _bytes(shape: str) -> dict[str, int]:
    """Bytes of the arrays of a shape by their dtype, without the padding of layouts."""
    sizes: dict[str, int] = {}
    for dtype, dimensions in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else 8 * (dtype == "pred")
        count = math.prod(int(size.strip(" <=")) for size in dimensions.split(",") if size)
        sizes[dtype] = sizes.get(dtype, 0) + -(-count * bits // 8)
    return sizes


def _op_name(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else ""


# Groups of devices: listed, or as reshaped and transposed iota, or as axes of a mesh.

_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\}|\})")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def _group(module: Module, one: Instruction, kind: str) -> tuple[int, ...]:
    """The devices of the first of a collective's groups."""
    text, everyone = one.attributes, tuple(range(module.devices))
    if "use_global_device_ids=true" not in text and "channel_id=" in text and not kind.endswith("all-to-all"):
        return everyone  # the groups then list replicas, and take in all partitions of these
    if found := _LISTED.search(text):
        return tuple(_integers(found[1])) if found[1] else everyone
    if found := _MESH.search(text):
        return _along_axes(*found.groups())
    shape = _IOTA.search(text, text.index("replica_groups=["))
    return tuple(_iota(shape).reshape(_integers(shape[1]))[0].tolist())


def _along_axes(mesh: str, order: str | None, grouped: str) -> tuple[int, ...]:
    """The first group along some axes of a mesh.

    Args:
      mesh: the axes with their sizes, as "'x'=4,'y'=2".
      order: the devices in the mesh's order, as "[4,2]T(1,0)" or "0,2,1,3"; 0, 1, 2, ... if None.
      grouped: axes such as "'x'", or parts of them such as "'x':(2)2": that of size 2 with 2 places before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    total = math.prod(sizes.values())
    strides = dict(zip(sizes, (total // np.cumprod(list(sizes.values()))).tolist(), strict=True))
    places = np.zeros(1, int)
    for name, before, size in re.findall(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?", grouped):
        size = int(size or sizes[name])
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


def _permuted(one: Instruction) -> tuple[int, ...]:
    """The devices among which a permutation moves the data of the first one that it moves."""
    pairs = re.findall(r"(\d+),(\d+)", _PAIRS.search(one.attributes)[1])
    pairs = [{int(source), int(target)} for source, target in pairs if source != target]
    group = pairs[0] if pairs else set()
    while more := {device for pair in pairs if group & pair for device in pair} - group:
        group = group | more
    return tuple(sorted(group))


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
