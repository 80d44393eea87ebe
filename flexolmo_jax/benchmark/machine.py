"""What the machine is and can do, by measuring the least that a step could consist of."""

import os
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
    return {
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {
            "python": platform.python_version(),
            **{package: installed[package] for package in packages if package in installed},
        },
    }


def _processor() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            names = re.findall(r"model name\s*:\s*(.+)", file.read())
    except FileNotFoundError:
        names = []
    return names[0] if names else platform.processor()


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
    """FLOP/s of a large matmul whose rows are spread over all devices."""
    size, repeats = (2048, 4) if jax.default_backend() == "cpu" else (8192, 100)
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
    # Random numbers: a GPU spends less power on others, and runs at a higher clock.
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=rows)
    x = draw(jax.random.key(0), (count * size, size), dtype)
    y = jax.device_put(draw(jax.random.key(1), (count * size, size), dtype)[:size] * size**-0.5, everywhere)
    matmul = jax.jit(jnp.dot, out_shardings=rows)
    x = matmul(x, y).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        x = matmul(x, y)
    x.block_until_ready()
    return repeats * 2 * count * size**3 / (time.perf_counter() - start)


def read_rate() -> float:
    """Bytes per second at which the first device, or all cores of the host, read a large array."""
    if jax.default_backend() == "cpu":
        parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), os.cpu_count())
        with ThreadPoolExecutor(len(parts)) as pool:
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            return READ_BYTES / (time.perf_counter() - start)
    x, repeats = jnp.ones(READ_BYTES // 4, jnp.float32), 20
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        result = total(x)
    result.block_until_ready()
    return repeats * READ_BYTES / (time.perf_counter() - start)
