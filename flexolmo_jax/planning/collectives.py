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
- Loops tell no trip count: it follows from the counter's start, step and limit.
- Between slices, collectives are pairs of a `send` and a `recv` with a `_xla_megascale_transfer_type`.

Devices are numbered by their place in the mesh, and in a program for several slices by their place within a slice.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_LOGGER = logging.getLogger(__name__)

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
ICI, DCN = "ici", "dcn"
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
    program = _parse(text)
    return list(_visit(program, program.entry, 1))


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


# The program's text: computations, each a line for each instruction.


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool


class _Program(NamedTuple):
    computations: dict[str, dict[str, _Instruction]]
    entry: str
    devices: int


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")


def _parse(text: str) -> _Program:
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif start := _INSTRUCTION.match(line):
            shape, rest = _split(line[start.end() :], " ")
            opcode, _, rest = rest.partition("(")
            operands, attributes = _split(rest, ")")
            names = _NAME.findall(operands) or [operands]  # a constant or parameter has its value there
            current[start[2]] = _Instruction(start[2], shape, opcode, names, attributes, bool(start[1]))
    devices = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])]
    return _Program(computations, entry, math.prod(devices))


def _split(text: str, separator: str) -> tuple[str, str]:
    """Text before and after the first separator that is outside all brackets."""
    depth = 0
    for i, letter in enumerate(text):
        if not depth and letter == separator:
            return text[:i], text[i + 1 :]
        depth += (letter in "([{") - (letter in ")]}")
    return text, ""


def _attribute(instruction: _Instruction, name: str) -> list[str]:
    """Computations that an attribute names: `name=%one` or `name={%one, %two}`."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%[\w.-]+)", instruction.attributes)
    return _NAME.findall(found[1]) if found else []


def _visit(program: _Program, name: str, runs: int) -> Iterator[Collective]:
    """Collectives of a computation that runs so often, and of all that it calls."""
    computation = program.computations[name]
    starts_chain = any('"AsyncCollectiveStart"' in one.attributes for one in computation.values())
    for one in computation.values():
        if one.opcode.endswith(("-done", "-update")):
            continue
        if one.opcode.removesuffix("-start") in KINDS:
            if starts_chain or "chain_id=" not in one.attributes:
                yield _collective(program, computation, one, runs, scatters=name.startswith("all-reduce-scatter"))
        elif one.opcode == "send" and "_xla_megascale_transfer_type" in one.attributes:
            yield _transfer(computation, one, runs)
        elif one.opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            branches = [list(_visit(program, branch, runs)) for key in names for branch in _attribute(one, key)]
            yield from max(branches, key=lambda found: sum(each.runs * each.bytes_sent for each in found))
        elif one.opcode == "while":
            inside = [each for key in ("condition", "body") for each in _visit(program, _attribute(one, key)[0], runs)]
            if inside:
                trips = _trips(program, computation, one)
                yield from (each._replace(runs=each.runs * trips) for each in inside)
        else:
            for key in ("calls", "to_apply", "called_computations"):
                for callee in _attribute(one, key):
                    yield from _visit(program, callee, runs)


# One collective.


def _collective(
    program: _Program, computation: dict[str, _Instruction], one: _Instruction, runs: int, scatters: bool
) -> Collective:
    kind = one.opcode.removesuffix("-start")
    group = _permuted(one) if kind == "collective-permute" else _group(program, one, kind)
    shape = computation[one.operands[0]].shape if kind == "ragged-all-to-all" else _result(one)
    size = sum(_bytes(shape).values()) * (len(group) if kind == "reduce-scatter" else 1)
    kind = "reduce-scatter" if scatters else kind
    sent = _bytes_sent(kind, len(group), size)
    return Collective(kind, ICI, len(group), group, tuple(_bytes(shape)), sent, runs, _op_name(one))


def _transfer(computation: dict[str, _Instruction], one: _Instruction, runs: int) -> Collective:
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


def _result(one: _Instruction) -> str:
    """Shape of what a collective results in; an asynchronous one starts with (operands, results, ...)."""
    if not one.opcode.endswith("-start") or one.opcode == "all-reduce-start":
        return one.shape
    _, rest = _split(one.shape[1:-1], ",")
    return _split(rest, ",")[0]


def _bytes(shape: str) -> dict[str, int]:
    """Bytes of the arrays of a shape by their dtype, without the padding of layouts."""
    sizes: dict[str, int] = {}
    for dtype, dimensions in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else 8 * (dtype == "pred")
        count = math.prod(int(size.strip(" <=")) for size in dimensions.split(",") if size)
        sizes[dtype] = sizes.get(dtype, 0) + -(-count * bits // 8)
    return sizes


def _op_name(one: _Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else ""


# Groups of devices: listed, or as reshaped and transposed iota, or as axes of a mesh.

_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\}|\})")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def _group(program: _Program, one: _Instruction, kind: str) -> tuple[int, ...]:
    """The devices of the first of a collective's groups."""
    text, everyone = one.attributes, tuple(range(program.devices))
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


def _permuted(one: _Instruction) -> tuple[int, ...]:
    """The devices among which a permutation moves the data of the first one that it moves."""
    pairs = re.findall(r"(\d+),(\d+)", _PAIRS.search(one.attributes)[1])
    pairs = [{int(source), int(target)} for source, target in pairs if source != target]
    group = pairs[0] if pairs else set()
    while more := {device for pair in pairs if group & pair for device in pair} - group:
        group = group | more
    return tuple(sorted(group))


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


# Trip counts.


def _trips(program: _Program, computation: dict[str, _Instruction], loop: _Instruction) -> int:
    """How often a loop's body runs, each time that the loop does."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (program.computations[_attribute(loop, key)[0]] for key in ("condition", "body"))
    trips = _counted_trips(condition, computation[loop.operands[0]], computation, body)
    if trips is None:
        _LOGGER.warning("the trip count of loop %s is not known: its collectives count once", loop.name)
    return 1 if trips is None else trips


def _counted_trips(
    condition: dict[str, _Instruction],
    initial: _Instruction,
    around: dict[str, _Instruction],
    body: dict[str, _Instruction],
) -> int | None:
    """Trips of a loop that adds a constant to a counter until it reaches a limit; None for all other loops.

    Args:
      condition: the computation that compares the counter with the limit.
      initial: what the loop starts from, a tuple.
      around: the computation in which the loop is.
      body: the computation that it repeats.
    """
    test, result = (next(one for one in each.values() if one.is_root) for each in (condition, body))
    if [test.opcode, initial.opcode, result.opcode] != ["compare", "tuple", "tuple"]:
        return None
    counter = _source(condition, test.operands[0])
    if counter.opcode != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])
    change = _source(body, result.operands[index])
    if change.opcode != "add":
        return None
    start, limit = _constant(around, initial.operands[index]), _constant(condition, test.operands[1])
    steps = [step for each in change.operands if (step := _constant(body, each))]
    forward = "direction=LT" in test.attributes
    if start is None or limit is None or len(steps) != 1 or not (forward or "direction=GT" in test.attributes):
        return None
    return len(range(start, limit, steps[0])) if (steps[0] > 0) == forward else None


def _source(computation: dict[str, _Instruction], name: str) -> _Instruction:
    """The instruction that a value comes from, past copies of it."""
    while computation[name].opcode in ("bitcast", "copy"):
        name = computation[name].operands[0]
    return computation[name]


def _constant(computation: dict[str, _Instruction], name: str) -> int | None:
    one = _source(computation, name)
    return int(one.operands[0]) if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0]) else None
