"""What this machine is, and the rates of its matmuls and memory, as measured."""

import os
import pathlib
import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

READ_BYTES = 400_000_000  # far beyond caches


def description() -> dict[str, Any]:
    """This machine and the versions of what runs on it; no device is touched."""
    packages = ("flexolmo-jax", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    versions = {package: installed[package] for package in packages if package in installed}
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "machine": {
            "system": platform.platform(),
            "processor": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {"python": platform.python_version(), **versions},
    }


def restored(values: Any) -> Any:
    """A configuration that went through JSON: sections again, and tuples for lists."""
    if isinstance(values, dict):
        return ConfigDict({key: restored(value) for key, value in values.items()})
    return tuple(map(restored, values)) if isinstance(values, list) else values


def devices() -> dict[str, Any]:
    """Platform, kind and number of this process's devices."""
    device = jax.devices()[0]
    return {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}


def device_memory() -> int | None:
    """Peak bytes in use on the first device; None where it has no memory of its own."""
    statistics = jax.local_devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a large matmul that is sharded over all devices."""
    size, repeats = (2048, 4) if jax.default_backend() == "cpu" else (8192, 100)
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    # Random numbers: a GPU spends less power on others, and runs at a higher clock.
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharded)
    x = draw(jax.random.key(0), (count * size, size), dtype)
    y = jax.device_put(draw(jax.random.key(1), (count * size, size), dtype)[:size] * size**-0.5, replicated)
    matmul = jax.jit(jnp.dot, out_shardings=sharded)
    x = matmul(x, y).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        x = matmul(x, y)
    x.block_until_ready()
    return repeats * 2 * count * size**3 / (time.perf_counter() - start)


def read_rate() -> float:
    """Bytes per second at which the first device, or all cores of the host, read a large array."""
    if jax.default_backend() == "cpu":
        chunks = np.array_split(np.ones(READ_BYTES // 4, np.float32), os.cpu_count() or 1)
        with ThreadPoolExecutor(len(chunks)) as pool:
            start = time.perf_counter()
            list(pool.map(np.sum, chunks))
            return READ_BYTES / (time.perf_counter() - start)
    x, total, repeats = jnp.ones(READ_BYTES // 4, jnp.float32), jax.jit(jnp.sum), 20
    total(x).block_until_ready()
    start = time.perf_counter()
    jax.block_until_ready([total(x) for _ in range(repeats)])
    return repeats * READ_BYTES / (time.perf_counter() - start)
