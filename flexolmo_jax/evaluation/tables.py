"""Tables for the terminal, and the rows and number formats that the report's page shares with them."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Scores = Mapping[str, Mapping[str, float]]

AVERAGE = "average"
MISSING = "-"
_KINDS = ("anchor", "pair", "merged", "merged-without")


def bits_per_byte_table(bits_per_byte: Scores, domains: Sequence[str]) -> Table:
    """A row per model, a column per domain and the average, the lowest of each column in bold.

    Args:
      bits_per_byte: held-out bits per byte, `{model: {domain: value}}`.
      domains: the columns, in order.
    """
    rows = model_rows(bits_per_byte, domains)
    best = lowest(rows)
    table = plain_table("bits per byte", [*domains, AVERAGE])
    for model, row in rows.items():
        cells = [Text(format_bits(value), "bold" if value == best[key] else "") for key, value in row.items()]
        table.add_row(Text(model), *cells)
    return table


def loss_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row per data set.

    Args:
      rows: `{data set: {"documents", "tokens", "bytes", "nats_per_token", "bits_per_byte", "perplexity"}}`; with
        "anchor", a row of the same of the anchor, its bits per byte and the difference from them stand beside.
    """
    counts, rates = ("documents", "tokens", "bytes"), ("nats_per_token", "bits_per_byte", "perplexity")
    compared = any("anchor" in row for row in rows.values())
    columns = ["anchor, bits per byte", "difference"] if compared else []
    table = plain_table("data", [*(key.replace("_", " ") for key in (*counts, *rates)), *columns])
    for name, row in rows.items():
        cells = [f"{row[key]:,}" if key in row else MISSING for key in counts]
        cells += [format_bits(row.get(key, math.nan)) for key in rates]
        if compared:
            anchor = row["anchor"]["bits_per_byte"]
            cells += [format_bits(anchor), format_bits(row["bits_per_byte"] - anchor, "+")]
        table.add_row(Text(name), *cells)
    return table


def routing_table(roster: Sequence[str], layers_LxE: np.ndarray) -> Table:
    """A row per layer, a column per expert: its share of the routing weight."""
    table = plain_table("layer", roster)
    for layer, share_E in enumerate(layers_LxE):
        table.add_row(str(layer), *(f"{share:.1%}" for share in share_E))
    return table


def opt_out_table(rows: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    """A row for the full model and each variant without some experts, a column for each metric of a task.

    Args:
      rows: `{variant: {"TASK:METRIC": {"value", "standard_error": may be None}}}`.
    """
    columns = unique(rows.values())
    table = plain_table("model", columns)
    for variant, row in rows.items():
        table.add_row(
            Text(variant), *(_format_estimate(**row[column]) if column in row else MISSING for column in columns)
        )
    return table


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table at its full width, so that a log of 80 columns neither folds nor cuts it."""
    console = console or Console()
    table.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.print(table, crop=False)


def model_rows(bits_per_byte: Scores, domains: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """The models as a reader meets them (anchor, pairs, merged, opt-outs, others), each with its average.

    A domain that was not measured is NaN, and so is the average over it.
    """
    domains = unique(bits_per_byte.values()) if domains is None else domains
    rank = {kind: place for place, kind in enumerate(_KINDS)}
    rows = {}
    for model in sorted(bits_per_byte, key=lambda name: rank.get(name.partition(":")[0], len(rank))):
        row = {domain: bits_per_byte[model].get(domain, math.nan) for domain in domains}
        rows[model] = row | {AVERAGE: sum(row.values()) / max(1, len(row))}
    return rows


def lowest(rows: Scores) -> dict[str, float]:
    """The lowest value of each column; infinite where nothing was measured."""
    columns = unique(rows.values())
    return {key: min((r[key] for r in rows.values() if math.isfinite(r[key])), default=math.inf) for key in columns}


def unique(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def format_bits(value: float, sign: str = "") -> str:
    """Three decimals: an opt-out may change only the third. With `sign="+"`, signed (but not a zero)."""
    if not math.isfinite(value):
        return MISSING
    text = f"{value:{sign}.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}" if sign else "-")


def _format_estimate(value: float, standard_error: float | None) -> str:
    error = "" if standard_error is None else f" ({format_bits(standard_error)})"
    return format_bits(value) + error


def plain_table(first: str, columns: Sequence[str]) -> Table:
    """A table that lines up in a log as well, and that Markdown reads."""
    table = Table(box=box.MARKDOWN, header_style="")
    table.add_column(Text(first), no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table
