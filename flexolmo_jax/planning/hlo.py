"""Reads a compiled program: which instructions it executes, how often, and how many bytes they move.

The program is its optimized HLO as text, `jax.stages.Compiled.as_text()`. XLA's `cost_analysis()` is no substitute: it
counts the body of a loop once, and a model loops over its blocks and micro-batches.
"""

import logging
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_LOGGER = logging.getLogger(__name__)

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Instructions that run computations as they are, perhaps in the background; and all attributes that name computations.
_CALLS = {"async-start", "call", "call-start", "conditional", "while"}
_CALLEES = (
    *("condition", "body", "calls", "to_apply", "called_computations"),
    *("branch_computations", "true_computation", "false_computation"),
)
# Instructions that move nothing themselves.
_FREE = _CALLS | {
    *("after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier"),
    *("parameter", "partition-id", "replica-id", "tuple"),
}
_SLICES = ("dynamic-slice", "gather", "slice")  # they read no more of their first operand than they return
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they replace in their first operand what this operand gives


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str  # without its "%"
    shape: str  # of its result, as HLO writes it: "bf16[8,128]{1,0}", or a tuple of such in parentheses
    opcode: str  # such as "all-gather-start"
    operands: list[str]  # their names; of a constant or a parameter, its value or number
    attributes: str  # the rest of the line
    is_root: bool  # whether it is the result of its computation


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """One compiled program: {name: computation}, the name of the one that runs, and how many devices run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int


class Execution(NamedTuple):
    """An instruction in its computation, how often it runs, and whether it is part of a fusion."""

    instruction: Instruction
    computation: str
    runs: int
    is_fused: bool


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Module:
    """Reads the text of a program."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif start := _INSTRUCTION.match(line):
            shape, rest = split(line[start.end() :], " ")
            opcode, _, rest = rest.partition("(")
            operands, attributes = split(rest, ")")
            names = _NAME.findall(operands) or [operands]  # a constant or parameter has its value there
            current[start[2]] = Instruction(start[2], shape, opcode, names, attributes, bool(start[1]))
    devices = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])]
    return Module(computations, entry, math.prod(devices))


def split(text: str, separator: str) -> tuple[str, str]:
    """Text before and after the first separator that is outside all brackets."""
    depth = 0
    for i, letter in enumerate(text):
        if not depth and letter == separator:
            return text[:i], text[i + 1 :]
        depth += (letter in "([{") - (letter in ")]}")
    return text, ""


def called(instruction: Instruction, attribute: str) -> list[str]:
    """Computations that an attribute names: `name=%one` or `name={%one, %two}`."""
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)", instruction.attributes)
    return _NAME.findall(found[1]) if found else []


def executions(module: Module) -> list[Execution]:
    """The instructions that a program executes, those of loops once with their number of runs.

    Every branch of a conditional counts. A loop whose trips depend on data counts as one trip, with a warning if there
    are collectives in it.
    """
    return list(_visit(module, module.entry, 1, is_fused=False))


def _visit(module: Module, name: str, runs: int, is_fused: bool) -> Iterator[Execution]:
    for instruction in module.computations[name].values():
        if instruction.opcode.endswith(("-done", "-update")):
            continue  # it counts where it starts
        yield Execution(instruction, name, runs, is_fused)
        trips = trip_count(module, instruction) if instruction.opcode == "while" else 1
        is_inside_fused = is_fused or instruction.opcode not in _CALLS
        callees = [callee for attribute in _CALLEES for callee in called(instruction, attribute)]
        inside = [e for callee in callees for e in _visit(module, callee, runs * (trips or 1), is_inside_fused)]
        if trips is None and any(each.instruction.opcode.removesuffix("-start") in COLLECTIVES for each in inside):
            _LOGGER.warning("the trip count of loop %s is not known; it counts as one", instruction.name)
        yield from inside


def array_bytes(shape: str, hbm_only: bool = False) -> int:
    """Bytes of the arrays of a shape, without the padding of layouts; if `hbm_only`, not of those in other memories."""
    total = 0
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else 8 * (dtype == "pred")
        count = math.prod(int(size.strip(" <=")) for size in dimensions.split(",") if size)
        total += 0 if hbm_only and "S(" in layout else -(-count * bits // 8)
    return total


def hbm_bytes(module: Module) -> int:
    """Bytes that a device reads from and writes to its HBM in a run of a program.

    Each instruction, and each fusion as a whole, reads its operands and writes its results once. Of an array that it
    takes a slice of, or updates in place, that slice counts.
    """
    total = 0
    for instruction, name, runs, is_fused in executions(module):
        if not is_fused and instruction.opcode not in _FREE:
            total += runs * _moved(module, module.computations[name], instruction)
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one run of an instruction reads and writes."""
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode == "fusion":
        inner = module.computations[called(instruction, "calls")[0]]
        numbered = {each.operands[0]: each.name for each in inner.values() if each.opcode == "parameter"}
        users = {str(i): list(_users(inner, numbered[str(i)])) for i in range(len(operands))}
        root = next(each for each in inner.values() if each.is_root)
        results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    else:
        inner, results = computation, [instruction]
        users = {str(i): [(operand.name, instruction)] for i, operand in enumerate(operands)}
    moved = 0
    for i, operand in enumerate(operands):
        read = sum(_read(name, user, operand.shape) for name, user in users[str(i)])
        moved += min(array_bytes(operand.shape, hbm_only=True), read)
    for shape, result in zip(elements(result_shape(instruction)), results, strict=False):
        moved += min(array_bytes(shape, hbm_only=True), _written(inner, result, shape))
    return moved


def _users(computation: Computation, name: str) -> Iterator[tuple[str, Instruction]]:
    """The instructions that use a value, each with the name it has there; bitcasts of it are passed through."""
    for user in computation.values():
        if name in user.operands:
            yield from _users(computation, user.name) if user.opcode == "bitcast" else [(name, user)]


def _read(name: str, user: Instruction, shape: str) -> int:
    """Bytes that an instruction reads of a value of that shape."""
    opcode, is_first = user.opcode.removesuffix("-start"), user.operands[0] == name
    if is_first and opcode in _SLICES:
        return array_bytes(result_shape(user))
    return 0 if is_first and opcode in _UPDATES else array_bytes(shape)


def _written(computation: Computation, result: Instruction, shape: str) -> int:
    """Bytes that an instruction writes for a result of that shape."""
    while result.opcode == "bitcast":
        result = computation[result.operands[0]]
    update = _UPDATES.get(result.opcode)
    return array_bytes(shape if update is None else computation[result.operands[update]].shape)


def result_shape(instruction: Instruction) -> str:
    """Shape of the result; that of an asynchronous instruction is in a tuple with its operands."""
    opcode, shape = instruction.opcode, instruction.shape
    if not opcode.endswith("-start") or (opcode == "all-reduce-start" and not shape.startswith("((")):
        return shape
    return elements(shape)[0 if opcode == "copy-start" else 1]


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape; a shape that is none is its own only element."""
    if not shape.startswith("("):
        return [shape]
    found, rest = [], shape[1:-1]
    while rest:
        element, rest = split(rest, ",")
        found.append(element.strip())
    return found


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Trips of a `while` that counts from 0 to a constant, as loops of JAX do; None for other loops."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[called(loop, "condition")[0]]
    test = next(each for each in condition.values() if each.is_root)  # programs for TPUs say no more
    limit = condition.get(test.operands[-1], test)
    is_counted = (test.opcode, limit.opcode) == ("compare", "constant") and "direction=LT" in test.attributes
    return int(limit.operands[0]) if is_counted and limit.operands[0].isdigit() else None
