"""What a benchmark measured, as tables, and where."""

import itertools
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import psutil
from rich.table import Table
from rich.text import Text

from flexolmo_jax.benchmark.run import FLEXOLMO, Metrics
from flexolmo_jax.tables import plain_table, scaled

_GIB = 2**30


def steps_table(results: Sequence[Metrics]) -> Table:
    """What this program takes for each step, and what the machine could do."""
    memory = _memory_columns(results)
    table = plain_table("step", ("tokens/s", "step, ms", "FLOP/s", "of the limit", "limit", "compiled in, s", *memory))
    for result in results:
        side = result["sides"][FLEXOLMO]
        limit, unit = statistics.median(side["limit"]), "B/s" if "bytes" in side else "FLOP/s"
        table.add_row(
            Text(result["step"]),
            f"{side['tokens_per_second']:,.1f}",
            f"{1e3 * side['step_seconds']:,.1f}",
            scaled(side["flops_per_second"], "FLOP/s"),
            f"{side['share_of_limit']:.0%}",
            f"{scaled(limit, unit)} ({side['limit_of']})",
            f"{side['compile_seconds']:.1f}",
            *(f"{side[key] / _GIB:.2f}" for key in memory.values()),
        )
    return table


def experts_table(result: Metrics) -> Table:
    """Decoding a token with each number of experts, the anchor among them, and the ratio of its time to the first's."""
    memory = _memory_columns([result])
    table = plain_table(f"{result['step']}: experts", ("token, ms", "to the first", "tokens/s", *memory))
    for side in result["sides"].values():
        if "experts" in side:
            table.add_row(
                str(side["experts"]),
                f"{1e3 * side['step_seconds']:,.2f}",
                f"{side['token_ratio']:.2f}",
                f"{side['tokens_per_second']:,.1f}",
                *(f"{side[key] / _GIB:.2f}" for key in memory.values()),
            )
    return table


def processes_table(result: Metrics) -> Table:
    """A step of one process and of several, with as many devices, and the ratio of their times."""
    table = plain_table(f"{result['step']}: processes", ("step, ms", "to one process", "tokens/s", "peak memory, GiB"))
    for side in result["sides"].values():
        table.add_row(
            str(side.get("processes", 1)),
            f"{1e3 * statistics.median(side['seconds']):,.1f}",
            f"{side['ratio']:.2f}",
            f"{side['tokens_per_second']:,.1f}",
            f"{side['peak_bytes'] / _GIB:.2f}",
        )
    return table


def versus_table(result: Metrics) -> Table:
    """This program, then transformers' sides, those that it is least ahead of first, with its ratios to them.

    Of tokens/s a ratio above 1 speaks for this program; of memory, one below 1.
    """
    memory, reference = _memory_columns([result]), result["sides"][FLEXOLMO]
    sides = {name: side for name, side in result["sides"].items() if "limit_of" not in side}
    columns = [column for title in ("tokens/s", *memory) for column in (title, "ours / it")]
    table = plain_table(result["step"], columns)
    values = [reference["tokens_per_second"], *(reference[key] / _GIB for key in memory.values())]
    table.add_row(FLEXOLMO, *itertools.chain(*((f"{value:,.2f}", "") for value in values)))
    for name, side in sorted(sides.items(), key=lambda item: item[1]["ratio"]):
        cells = [f"{side['tokens_per_second']:,.2f}", f"{side['ratio']:.2f}"]
        for key in memory.values():
            cells += [f"{side[key] / _GIB:,.2f}", f"{reference[key] / side[key]:.2f}"]
        table.add_row(Text(name), *cells)
    return table


def _memory_columns(results: Sequence[Metrics]) -> dict[str, str]:
    """Titles of the columns of memory, and the metrics they show."""
    if any("device_peak_bytes" in result["sides"][FLEXOLMO] for result in results):
        return {"peak of the device, GiB": "device_peak_bytes"}
    return {"peak memory, GiB": "peak_bytes", "above libraries, GiB": "peak_bytes_above_libraries"}


def description() -> dict[str, Any]:
    """This machine and the versions of what runs on it; no device is touched."""
    packages = ("flexolmo-jax", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
    versions = {found.name: found.version for found in metadata.distributions() if found.name in packages}
    return {
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {"python": platform.python_version(), **versions},
    }
