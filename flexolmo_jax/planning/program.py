"""The train step of a configuration, compiled for devices that need not be there."""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flexolmo_jax import sharding
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.training import partition
from flexolmo_jax.training.inputs import Inputs, build_model
from flexolmo_jax.training.program import abstract_batch, configured_step
from flexolmo_jax.training.state import abstract_leaves, abstract_state, shardings
from flexolmo_jax.training.step import TrainState, compile_step

# How XLA says that a program, or its temporaries alone, do not fit; sizes as in "27.40G of 15.75G hbm".
_SIZE = r"([\d.]+)([KMGT]?)"
_PROGRAM = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """A train step before it is compiled, with shapes, dtypes and places of all that it takes."""

    model: Decoder
    trainable: set[str]
    mesh: Mesh
    step: Callable
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def device_tokens(self) -> int:
        """Tokens of a step that each device has, in all its parts."""
        rows = self.batch["tokens"]
        return math.prod(rows.sharding.shard_shape(rows.shape))

    def ways(self, axis: str) -> int:
        """Among how many devices a dimension with this logical axis is split."""
        return sharding.num_shards(self.mesh, sharding.partition_spec((axis,), self.model.compute.rules)[0])


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


def make_program(config: ConfigDict, devices: Sequence[jax.Device]) -> Program:
    """The program of a configuration on these devices; nothing is read but a manifest, where it starts from a model.

    Raises:
      UserError: the configuration makes no sense, or does not fit the devices' number.
    """
    model, manifest = build_model(config, platform=sharding.platform_of(devices[0]))
    trainable = partition.trainable_paths(model.abstract(), config.partition)
    mesh = sharding.make_mesh(config.mesh, devices)
    inputs = Inputs(model, manifest, trainable, [], {})
    leaves, frozen = abstract_leaves(config, inputs, shardings(inputs, mesh, config.sharding_rules))
    optimizer, step = configured_step(config, model)
    # Outside `set_mesh`, within which JAX would compute some of this on devices that are not there.
    state, batch = abstract_state(leaves, optimizer, mesh), abstract_batch(config, mesh)
    return Program(model, trainable, mesh, step, state, frozen, batch)


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
