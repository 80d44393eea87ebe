"""The train step of a configuration, compiled for devices that need not be there, and the memory it takes."""

import math
import re
from typing import Any, NamedTuple

import jax

from flexolmo_jax.training.step import Program, compile_step

# How XLA says that a program, or its temporaries alone, do not fit; sizes as in "27.40G of 15.75G hbm".
_SIZE = r"([\d.]+)([KMGT]?)"
_PROGRAM = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one device."""

    trained: int  # parameters
    frozen: int  # parameters
    optimizer: int  # its state
    batch: int  # tokens, targets, segment ids and positions
    temporaries: int  # the rest of the peak: activations, gradients, gathered parameters, the program itself
    peak: int  # what the program needs at most, according to the compiler
    available: int

    @property
    def state(self) -> int:
        """Bytes of parameters and optimizer state."""
        return self.trained + self.frozen + self.optimizer

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def compile_program(program: Program, available: int) -> tuple[jax.stages.Compiled | None, Memory]:
    """Compiles a program for its devices, which have `available` bytes each.

    Returns:
      (the compiled step, or None if it does not fit; the memory that it needs).
    """
    arguments = (program.state.trainable, program.frozen, program.state.optimizer, program.batch)
    sizes = [device_bytes(arrays) for arrays in arguments]
    try:
        with jax.set_mesh(program.mesh):
            compiled = compile_step(program.step, program.state, program.frozen, program.batch)
        peak = compiled.memory_analysis().peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        compiled, peak = None, bytes_needed(str(error), sum(sizes))
        if peak is None:
            raise
    return compiled, Memory(*sizes, max(0, peak - sum(sizes)), peak, available)


def bytes_needed(message: str, arguments: int) -> int | None:
    """Bytes that XLA says a program needs whose arguments take `arguments` bytes; None if it says something else."""
    whole, temporaries = _PROGRAM.search(message), _TEMPORARIES.search(message)
    found = whole or temporaries
    if found is None:
        return None
    return int(float(found[1]) * _UNITS[found[2]]) + (0 if whole else arguments)


def device_bytes(arrays: Any) -> int:
    """Bytes that each device holds of a tree of arrays, without the padding of their layout."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )
