"""The train step of a configuration, compiled for devices that need not be there."""

import re
from unittest import mock

import jax

from flexolmo_jax.training.run import Program
from flexolmo_jax.training.step import compile_step

# How XLA says that a program, or its temporaries alone, do not fit; sizes as in "27.40G of 15.75G hbm".
_SIZE = r"([\d.]+)([KMGT]?)"
_PROGRAM = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLargeError(Exception):
    """A program does not fit its devices.

    Attributes:
      needed: bytes that it needs at least.
      temporaries: whether these are besides what it takes, its arguments.
    """

    def __init__(self, needed: int, temporaries: bool):
        """Keeps what XLA said."""
        super().__init__(f"{needed} bytes of {'temporaries' if temporaries else 'memory'} are needed")
        self.needed, self.temporaries = needed, temporaries


def compile_program(program: Program) -> jax.stages.Compiled:
    """Compiles a program for its devices.

    Raises:
      TooLargeError: it does not fit their memory.
    """
    # JAX's kernels for Hopper ask `jax.devices()` for their multiprocessors, when they are traced.
    here = mock.patch.object(jax, "devices", return_value=list(program.mesh.devices.flat))
    try:
        with jax.set_mesh(program.mesh), here:
            return compile_step(program.step, program.state, program.frozen, program.batch)
    except jax.errors.JaxRuntimeError as error:
        whole, temporaries = _PROGRAM.search(str(error)), _TEMPORARIES.search(str(error))
        if not (whole or temporaries):
            raise
        number, unit, *_ = (whole or temporaries).groups()
        raise TooLargeError(int(float(number) * _UNITS[unit]), temporaries=not whole) from None
