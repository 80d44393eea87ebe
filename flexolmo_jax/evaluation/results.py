"""Results of evaluations, as rows of a table and as text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from flexolmo_jax.tables import MISSING, plain_table

Scores = Mapping[str, Mapping[str, float]]

AVERAGE = "average"


def bits_per_byte_table(bits_per_byte: Scores, corpora: Sequence[str]) -> Table:
    """One line per model, one column per corpus and the average; the lowest value of each column is bold.

    Args:
      bits_per_byte: held-out bits per byte, `{model: {corpus: value}}`.
      corpora: the columns, in order.
    """
    averaged = with_average(bits_per_byte, corpora)
    best = lowest(averaged)
    table = plain_table("bits per byte", [*corpora, AVERAGE])
    for model, scores in averaged.items():
        cells = [Text(format_bits(value), "bold" if value == best[key] else "") for key, value in scores.items()]
        table.add_row(Text(model), *cells)
    return table


def loss_table(losses: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line per corpus.

    Args:
      losses: `{corpus: {"documents", "tokens", "bytes", "nats_per_token", "bits_per_byte", "perplexity"}}`. Where a
        corpus also has "anchor", the same of the anchor, two columns compare their bits per byte.
    """
    counts, rates = ("documents", "tokens", "bytes"), ("nats_per_token", "bits_per_byte", "perplexity")
    compared = any("anchor" in loss for loss in losses.values())
    columns = ["anchor, bits per byte", "difference"] if compared else []
    table = plain_table("data", [*(key.replace("_", " ") for key in (*counts, *rates)), *columns])
    for name, loss in losses.items():
        cells = [f"{loss[key]:,}" if key in loss else MISSING for key in counts]
        cells += [format_bits(loss.get(key, math.nan)) for key in rates]
        if compared:
            anchor = loss["anchor"]["bits_per_byte"]
            cells += [format_bits(anchor), format_bits(loss["bits_per_byte"] - anchor, "+")]
        table.add_row(Text(name), *cells)
    return table


def routing_table(roster: Sequence[str], layers_LxE: np.ndarray) -> Table:
    """One line per layer, one column per expert: its share of the routing weight."""
    table = plain_table("layer", roster)
    for layer, share_E in enumerate(layers_LxE):
        table.add_row(str(layer), *(f"{share:.1%}" for share in share_E))
    return table


def opt_out_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """One line for the full model and for each variant without some experts, one column per metric of a task.

    Args:
      scores: `{variant: {"TASK:METRIC": {"value", "standard_error": may be None}}}`.
    """
    columns = unique(scores.values())
    table = plain_table("model", columns)
    for variant, metrics in scores.items():
        cells = (_format_estimate(**metrics[column]) if column in metrics else MISSING for column in columns)
        table.add_row(Text(variant), *cells)
    return table


def with_average(bits_per_byte: Scores, corpora: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """The scores of each model on all corpora, and their average.

    A corpus that was not measured is NaN, and so is the average over it.
    """
    corpora = unique(bits_per_byte.values()) if corpora is None else corpora
    averaged = {}
    for model, scores in bits_per_byte.items():
        complete = {corpus: scores.get(corpus, math.nan) for corpus in corpora}
        averaged[model] = complete | {AVERAGE: sum(complete.values()) / max(1, len(complete))}
    return averaged


def lowest(scores: Scores) -> dict[str, float]:
    """The lowest value of each column; infinite where nothing was measured."""
    columns = unique(scores.values())
    return {key: min((s[key] for s in scores.values() if math.isfinite(s[key])), default=math.inf) for key in columns}


def unique(groups: Iterable[Iterable[str]]) -> list[str]:
    """All names of the groups, each once, in the order of their first occurrence."""
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
