"""Plans a run: its step compiled for devices that need not be there, and what that tells."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from flexolmo_jax.errors import UserError
from flexolmo_jax.planning.advice import advice
from flexolmo_jax.planning.chips import Chip, chip, torus_shape
from flexolmo_jax.planning.collectives import Collective, Row, collectives, summarise
from flexolmo_jax.planning.memory import Memory, kept_bytes, memory
from flexolmo_jax.planning.program import TooLargeError, compile_program
from flexolmo_jax.planning.roofline import Roofline, network_seconds, roofline
from flexolmo_jax.planning.topology import topology_devices
from flexolmo_jax.training.run import Program, make_program


class Plan(NamedTuple):
    """What is known of a step on a slice.

    Attributes:
      topology: name of the slice, or of the node of GPUs.
      slices: how many of them.
      devices: JAX devices of all slices.
      chip: the kind of chip.
      mesh: {axis: devices along it}.
      tokens: of a step.
      steps: of the run.
      parameters: of the model, all experts included.
      compile_seconds: time that compiling took here.
      memory: of one device.
      collectives: by kind and mesh axes, each with the seconds it takes; None where the step does not fit.
      roofline: of one device.
      advice: sentences.
    """

    topology: str
    slices: int
    devices: int
    chip: Chip
    mesh: dict[str, int]
    tokens: int
    steps: int
    parameters: int
    compile_seconds: float
    memory: Memory
    collectives: list[tuple[Row, float]] | None
    roofline: Roofline
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        rows = self.collectives
        return {
            **self._asdict(),
            "chip": self.chip._asdict(),
            "memory": self.memory._asdict() | {"fits": self.memory.fits},
            "collectives": rows and [{**row._asdict(), "seconds": seconds} for row, seconds in rows],
            "roofline": self.roofline._asdict()
            | {"at_best": self.roofline.at_best, "at_worst": self.roofline.at_worst},
        }


def plan(config: ConfigDict, topology: str, slices: int = 1, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Compiles the train step of a configuration for a slice, and reads off what it needs.

    Args:
      config: the configuration, as `train` takes it; without `start_from`, of fresh weights.
      topology: kind and shape of a slice, such as "v5e:4x4", or kind and number of a node's GPUs: "h200:8".
      slices: how many, joined by the data centre's network.
      say: called with what is being done.

    Raises:
      UserError: the configuration makes no sense or does not fit the devices' number, there is no such slice or node,
        or its compiler is missing.
    """
    kind, torus = chip(topology), torus_shape(topology)
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    devices = topology_devices(topology, slices)
    program = make_program(config, devices)
    mesh = dict(program.mesh.shape)
    say(f"compiling for {len(devices)} devices")
    start = time.perf_counter()
    try:
        compiled = compile_program(program)
    except TooLargeError as error:
        held = memory(program, 0, kind.hbm_bytes)
        peak = error.needed + (held.state + held.batch) * error.temporaries
        held, found = memory(program, peak, kind.hbm_bytes), None
    else:
        held = memory(program, compiled.memory_analysis().peak_memory_in_bytes, kind.hbm_bytes)
        found = collectives(compiled.as_text())
    compile_seconds = time.perf_counter() - start
    line = roofline(config, program, kind, torus, found)
    return Plan(
        topology,
        slices,
        len(devices),
        kind,
        mesh,
        config.data.batch_size * config.data.sequence_length,
        config.steps,
        sum(leaf.size for leaf in jax.tree.leaves((program.state.trainable, program.frozen))),
        compile_seconds,
        held,
        None if found is None else _by_kind(found, program, slices, kind, torus),
        line,
        advice(
            config,
            mesh,
            slices,
            program.model.layout,
            held,
            kept_bytes(config, program),
            None if found is None else line,
        ),
    )


def _by_kind(
    found: list[Collective], program: Program, slices: int, kind: Chip, torus: tuple[int, ...]
) -> list[tuple[Row, float]]:
    """Collectives added up by kind and mesh axes, with the seconds that they take."""
    within = dict(program.mesh.shape)
    within["data"] //= slices  # a program is that of one slice
    seconds: dict[tuple, float] = {}
    for one in found:
        (row,) = summarise([one], within)
        key = (row.kind, row.network, row.axes)
        seconds[key] = seconds.get(key, 0.0) + network_seconds(one, program, kind, torus)
    return [(row, seconds[row.kind, row.network, row.axes]) for row in summarise(found, within)]
