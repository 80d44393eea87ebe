"""Tables of a benchmark's figures."""

import itertools
import statistics
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from flexolmo_jax.benchmark.run import OURS, Figures
from flexolmo_jax.tables import plain_table

GIB = 2**30


def steps_table(results: Sequence[Figures]) -> Table:
    """A row for each step: what this program takes for it, and what the machine could do."""
    table = plain_table(
        "step", ("tokens/s", "step, ms", "FLOP/s", "of the limit", "limit", "compiled in, s", *_memory(results))
    )
    for result in results:
        figures = result["sides"][OURS]
        limit = statistics.median(figures["limit"])
        table.add_row(
            Text(result["step"]),
            f"{figures['tokens_per_second']:,.1f}",
            f"{1e3 * figures['step_seconds']:,.1f}",
            _rate(figures["flops_per_second"], "FLOP/s"),
            f"{figures['share_of_limit']:.0%}",
            f"{_rate(limit, 'B/s' if 'bytes' in figures else 'FLOP/s')} ({figures['limit_of']})",
            f"{figures['compile_seconds']:.1f}",
            *(f"{figures[key] / GIB:.2f}" for key in _memory(results).values()),
        )
    return table


def limit_notes(results: Sequence[Figures]) -> list[str]:
    """A sentence for each kind of limit that a step went beyond, which explains how it could."""
    beyond = {}
    for result in results:
        figures = result["sides"][OURS]
        if figures["share_of_limit"] > 1:
            beyond.setdefault("bytes" in figures, []).append(result["step"])
    reasons = {
        True: "the limit is what all cores read of an array far larger than any cache, and weights of a small model "
        "are read from caches, which are faster",
        False: "the limit is a large matmul measured in turns with the step, and the machine was less busy, or at a "
        "higher clock, while the step ran",
    }
    return [
        f"{', '.join(steps)}: a share above 100% is no error; {reasons[reads]}" + "." for reads, steps in beyond.items()
    ]


def versus_table(result: Figures) -> Table:
    """A row for each side of a step, after ours those first that ours is least ahead of, with our ratios to it.

    Of tokens/s a ratio above 1 speaks for this program; of memory, one below 1.
    """
    sides, memory = dict(result["sides"]), _memory([result])
    ours = sides.pop(OURS)
    columns = {"tokens/s": (lambda side: side["tokens_per_second"], lambda side: side["ratio"])}
    for title, key in memory.items():
        columns[title] = (lambda side, key=key: side[key] / GIB, lambda side, key=key: ours[key] / side[key])
    table = plain_table(result["step"], [column for title in columns for column in (title, "ours / it")])
    table.add_row(OURS, *(cell for value, _ in columns.values() for cell in (f"{value(ours):,.2f}", "")))
    for name, side in sorted(sides.items(), key=lambda item: item[1]["ratio"]):
        cells = ((f"{value(side):,.2f}", f"{ratio(side):.2f}") for value, ratio in columns.values())
        table.add_row(Text(f"transformers, {name}"), *itertools.chain(*cells))
    return table


def _memory(results: Sequence[Figures]) -> dict[str, str]:
    """Titles of the columns of memory, and the figures they show."""
    if any("device_peak_bytes" in result["sides"][OURS] for result in results):
        return {"peak of the device, GiB": "device_peak_bytes"}
    return {"peak memory, GiB": "peak_bytes", "above libraries, GiB": "peak_bytes_above_libraries"}


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e12:,.1f} T{unit}" if value >= 1e12 else f"{value / 1e9:,.1f} G{unit}"
