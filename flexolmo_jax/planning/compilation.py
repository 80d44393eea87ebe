"""A train step compiled for devices that need not be there, and the memory it takes."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.extend import backend

from flexolmo_jax.chips import Chip, parse_topology
from flexolmo_jax.errors import ArgumentError, first_line
from flexolmo_jax.sharding import Device
from flexolmo_jax.training.step import Program, compile_step

# libtpu asks the machine it is on which TPU it has. These answer in its place, and keep its logs off the disk.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

# What XLA asks of a GPU, here of compute capability 9.0 (Hopper, as SXM module), in the text form of its
# `GpuTargetConfigProto`. Sizes are in bytes; they are those of NVIDIA's CUDA programming guide and data sheets.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 28 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_core_limit: 2048 threads_per_block_limit: 1024
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
"""
# XLA recomputes what does not fit: into what JAX's allocator has, and without a GPU, into this share of its memory.
_XLA_SHARE = 0.8

# How XLA says that a program, or its temporaries alone, do not fit; sizes as in "27.40G of 15.75G hbm".
_SIZE = r"([\d.]+)([KMGT]?)"
_PROGRAM = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def topology_devices(name: str) -> list[Device]:
    """The devices of a TPU slice or a node of GPUs, to compile for; programs cannot run on them.

    To be called before JAX has looked for devices: the process computes on its CPU alone.

    Args:
      name: kind and shape of a slice, such as "v5e:2x4" or "v5p:2x4x4", or kind and number of a node's GPUs: "h200:8".

    Raises:
      ArgumentError: the compiler is not installed, or it knows no such slice.
    """
    jax.config.update("jax_platforms", "cpu")
    kind, shape = parse_topology(name)
    return _gpus(name, kind, shape[0]) if kind.is_gpu else _tpus(name)


def _gpus(name: str, kind: Chip, count: int) -> list[Device]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        problem = "needs JAX's plugin for GPUs, which is not installed; pip install 'flexolmo-jax[cuda]'"
        raise ArgumentError("topology", name, problem)
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # as JAX sets it: XLA would log what it misses of a GPU
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    memory = int(kind.hbm_bytes / _XLA_SHARE)
    target = _HOPPER.format(name=kind.device_kind, bandwidth=int(kind.hbm_bandwidth), memory=memory)
    try:
        described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        problem = f"JAX's plugin for GPUs cannot compile for it ({first_line(error)})"
        raise ArgumentError("topology", name, problem) from None
    devices = list(described.devices)
    # JAX's kernels for Hopper ask `jax.devices()` for their multiprocessors when they are traced.
    backend.register_backend_factory("described", lambda: devices[0].client)
    jax.config.update("jax_platforms", "described,cpu")
    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    return devices


def _tpus(name: str) -> list[Device]:
    if not importlib.util.find_spec("libtpu"):
        problem = "needs libtpu, the TPU compiler, which is not installed; pip install 'flexolmo-jax[plan]'"
        raise ArgumentError("topology", name, problem)
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options = {}
    if set(name.partition(":")[2].split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # else 2 x 2, of which a single chip is no multiple
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        why = first_line(error).removeprefix("INVALID_ARGUMENT: ")
        problem = f"no slice that the TPU compiler knows ({why}); give one such as v5e:2x4 or v5p:2x4x4"
        raise ArgumentError("topology", name, problem) from None


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
    trained, frozen, optimizer, batch = map(device_bytes, arguments)
    held = trained + frozen + optimizer + batch
    try:
        with jax.set_mesh(program.mesh):
            compiled = compile_step(program.step, program.state, program.frozen, program.batch)
        analysis: Any = compiled.memory_analysis()
        peak = analysis.peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        compiled, peak = None, bytes_needed(str(error), held)
        if peak is None:
            raise
    return compiled, Memory(trained, frozen, optimizer, batch, max(0, peak - held), peak, available)


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
