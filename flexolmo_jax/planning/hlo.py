"""The text of a compiled program as instructions, and how often its loops run, which a TPU program does not say.

The text is the optimised HLO of one program as XLA prints it, `jax.stages.Compiled.as_text()`: computations, each a
line for each instruction.
"""

import logging
import math
import re
from typing import NamedTuple

_LOGGER = logging.getLogger(__name__)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: without its "%".
      shape: of its result, as HLO writes it: "bf16[8,128]{1,0}", or a tuple of such in parentheses.
      opcode: such as "all-gather-start".
      operands: names of its operands; of a constant or a parameter, its value or number.
      attributes: the rest of the line.
      is_root: whether it is what the computation results in.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool


class Module(NamedTuple):
    """One compiled program.

    Attributes:
      computations: {name: {name of an instruction: instruction}}, in their order.
      entry: name of the computation that runs.
      devices: how many run it together.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_NAME = re.compile(r"%([\w.-]+)")


def parse(text: str) -> Module:
    """Reads a program's text."""
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


def trip_count(module: Module, computation: dict[str, Instruction], loop: Instruction) -> int:
    """How often a loop's body runs, each time that the loop does; 1, with a warning, where that is not known.

    Args:
      module: the program.
      computation: the one in which the loop is.
      loop: its instruction, a "while".
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (module.computations[called(loop, key)[0]] for key in ("condition", "body"))
    trips = _counted_trips(condition, computation[loop.operands[0]], computation, body)
    if trips is None:
        _LOGGER.warning("the trip count of loop %s is not known; it counts as one", loop.name)
    return 1 if trips is None else trips


def _counted_trips(
    condition: dict[str, Instruction],
    initial: Instruction,
    around: dict[str, Instruction],
    body: dict[str, Instruction],
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


def _source(computation: dict[str, Instruction], name: str) -> Instruction:
    """The instruction that a value comes from, past copies of it."""
    while computation[name].opcode in ("bitcast", "copy"):
        name = computation[name].operands[0]
    return computation[name]


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    one = _source(computation, name)
    return int(one.operands[0]) if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0]) else None
