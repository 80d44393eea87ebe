"""Plans a run: its train step compiled for devices that need not be there, and an estimate of its time."""

import time
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from flexolmo_jax.chips import Chip, parse_topology
from flexolmo_jax.model.flops import recomputed_flops, train_step_flops
from flexolmo_jax.planning import hlo
from flexolmo_jax.planning.advice import advice
from flexolmo_jax.planning.collectives import CollectiveTotal, collective_totals
from flexolmo_jax.planning.compilation import Memory, compile_program, topology_devices
from flexolmo_jax.training.run import make_program
from flexolmo_jax.training.step import Program


class Roofline(NamedTuple):
    """What a device does in a step, and the seconds that takes at the rates of its chip.

    Of a program that does not fit, only its arithmetic is known.
    """

    flops: float  # that the step needs, on this device (`model.flops`)
    recomputed_flops: float  # that the backward pass recomputes
    hbm_bytes: float | None  # that the program reads and writes
    sent_bytes: float | None  # that its collectives send to other devices
    limits: dict[str, float]  # seconds of "arithmetic" (at the bfloat16 rate), "HBM" and "interconnect" (no latency)

    @property
    def at_best(self) -> float:
        """Seconds of a step if computing, reading and sending overlap perfectly."""
        return max(self.limits.values())

    @property
    def at_worst(self) -> float:
        """Seconds of a step at these rates if nothing overlaps."""
        return sum(self.limits.values())


class Plan(NamedTuple):
    """What is known of a step on a slice."""

    topology: str  # name of the slice, or of the node of GPUs
    devices: int  # JAX devices
    chip: Chip
    mesh: dict[str, int]  # {axis: devices along it}
    tokens: int  # of a step
    steps: int  # of the run
    parameters: int  # all experts included
    compile_seconds: float
    memory: Memory  # of one device
    collectives: list[CollectiveTotal] | None  # those that send most first; None if the step does not fit
    roofline: Roofline  # of one device
    advice: list[str]  # sentences

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        return {
            **self._asdict(),
            "chip": self.chip._asdict(),
            "memory": self.memory._asdict() | {"fits": self.memory.fits},
            "collectives": self.collectives and [total._asdict() for total in self.collectives],
            "roofline": self.roofline._asdict() | dict(at_best=self.roofline.at_best, at_worst=self.roofline.at_worst),
        }


def plan(config: ConfigDict, topology: str) -> Plan:
    """Compiles the train step of a configuration for a slice, and reads off what it needs.

    Args:
      config: the configuration, as `train` takes it; without `start_from`, of fresh weights.
      topology: kind and shape of a slice, such as "v5e:4x4", or kind and number of a node's GPUs: "h200:8".

    Raises:
      UserError: the configuration makes no sense or does not fit the devices' number, there is no such slice or node,
        or its compiler is missing.
    """
    chip, torus = parse_topology(topology)
    program = make_program(config, topology_devices(topology))
    start = time.perf_counter()
    compiled, memory = compile_program(program, chip.hbm_bytes)
    compile_seconds = time.perf_counter() - start
    moved = totals = None
    if compiled is not None:
        module = hlo.parse(compiled.as_text() or "")
        moved, totals = hlo.hbm_bytes(module), collective_totals(module, program.mesh, chip, torus)
    line = roofline(config, program, chip, moved, totals)
    mesh = dict(program.mesh.shape)
    bound = max(line.limits, key=line.limits.__getitem__)
    return Plan(
        topology=topology,
        devices=program.mesh.size,
        chip=chip,
        mesh=mesh,
        tokens=config.data.batch_size * config.data.sequence_length,
        steps=config.steps,
        parameters=sum(leaf.size for leaf in jax.tree.leaves((program.state.trainable, program.frozen))),
        compile_seconds=compile_seconds,
        memory=memory,
        collectives=totals,
        roofline=line,
        advice=advice(config, mesh, memory, bound),
    )


def roofline(
    config: ConfigDict, program: Program, chip: Chip, hbm_bytes: int | None, totals: list[CollectiveTotal] | None
) -> Roofline:
    """Estimates a step from what its compiled program moves; without these, from its FLOPs alone."""
    architecture, layout = program.model.architecture, program.model.layout
    shape, devices = (config.data.batch_size, config.data.sequence_length), program.mesh.size
    needed = train_step_flops(architecture, layout, program.trainable, *shape) / devices
    recomputed = recomputed_flops(architecture, layout, config.compute.remat, *shape) / devices
    limits = {"arithmetic": (needed + recomputed) / chip.peak_flops}
    if hbm_bytes is None or totals is None:
        return Roofline(needed, recomputed, None, None, limits)
    limits["HBM"] = hbm_bytes / chip.hbm_bandwidth
    limits["interconnect"] = sum(total.seconds for total in totals)
    return Roofline(needed, recomputed, hbm_bytes, sum(total.bytes_sent for total in totals), limits)
