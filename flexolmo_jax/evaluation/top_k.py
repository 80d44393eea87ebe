"""Quality of a merged model against the active FLOPs of a token, by the number of experts that compute each token."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.evaluation.loss import Loss, evaluate_shown
from flexolmo_jax.evaluation.results import AVERAGE, format_bits
from flexolmo_jax.inference.model import Model
from flexolmo_jax.model.architecture import ANCHOR, Layout
from flexolmo_jax.model.flops import decode_step_flops
from flexolmo_jax.tables import plain_table, scaled

TOLERANCE = 0.005  # how far above the lowest average that of the recommended value may be, relative to the lowest


def evaluate_top_k(
    model: Model,
    corpora: Mapping[str, Corpus],
    values: Sequence[int],
    *,
    without: Sequence[str] = (),
    baseline: bool = False,
    length: int = 256,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Evaluates a merged model with several numbers of experts per token. Its parameters are loaded once.

    Args:
      model: a loaded model.
      corpora: {label: corpus}, tokenized with the model's tokenizer.
      values: the numbers, each from 1 to the number of experts that take part.
      without: experts to leave out.
      baseline: whether to evaluate the anchor alone, too.
      length: tokens of a sequence.
      batch_size: sequences computed at once.

    Returns:
      The results as JSON:
        "values": one entry for each number in ascending order, {"top_k", "flops_per_token", "flops_ratio": to those of
          the anchor alone, "average_bits_per_byte": mean over corpora, "change": of that average from the lowest of
          all values, relative, "data": {corpus: `Loss.as_dict`}}.
        "anchor": the same of the anchor alone, without "top_k"; only with `baseline`.
        "recommended": the number that `recommend` returns; "current": that of the model.
        "tolerance", "length": as they were used.
      FLOPs are those of the matmuls of a forward pass, the mean over the tokens of a document of `length` tokens
      (`model.flops`).

    Raises:
      ArgumentError: a number is below 1.
      UserError: as `evaluation.loss.evaluate`.
    """
    sizes = {"length": length, "batch_size": batch_size}
    entries = {}
    for value in sorted(values):
        variant = model.with_top_k(value)
        losses = evaluate_shown(variant, corpora, title=f"top-{value}", without=without, **sizes)
        entries[value] = _entry(model, variant.decoder.layout, losses, length)
    averages = {value: entry["average_bits_per_byte"] for value, entry in entries.items()}
    lowest = min(averages.values())
    results = {
        "values": [{"top_k": value} | _with_change(entry, lowest) for value, entry in entries.items()],
        "recommended": recommend(averages),
        "current": model.decoder.layout.top_k,
        "tolerance": TOLERANCE,
        "length": length,
    }
    if baseline:
        # The only expert that takes part computes every token, so one is enough.
        alone = model.with_top_k(1)
        losses = evaluate_shown(alone, corpora, title="anchor", without=model.roster[1:], **sizes)
        results["anchor"] = _with_change(_entry(model, ANCHOR, losses, length), lowest)
    return results


def recommend(averages: Mapping[int, float]) -> int:
    """The smallest number of experts per token whose average is at most `TOLERANCE` above the lowest, relative to that.

    Args:
      averages: {number of experts per token: average bits per byte}; not empty.
    """
    limit = min(averages.values()) * (1 + TOLERANCE)
    return min(value for value, average in averages.items() if average <= limit)


def top_k_table(results: Mapping[str, Any]) -> Table:
    """One line for each number of experts per token, and for the anchor where there is one.

    Args:
      results: as `evaluate_top_k` returns them.
    """
    entries = {str(entry["top_k"]): entry for entry in results["values"]}
    if "anchor" in results:
        entries = {"anchor": results["anchor"]} | entries
    corpora = list(results["values"][0]["data"])
    table = plain_table("top-k", ["FLOPs per token", "relative to anchor", *corpora, AVERAGE, "change from best"])
    for label, entry in entries.items():
        bits = [entry["data"][corpus]["bits_per_byte"] for corpus in corpora] + [entry["average_bits_per_byte"]]
        flops = [scaled(entry["flops_per_token"], "FLOP"), f"{entry['flops_ratio']:.2f}"]
        table.add_row(label, *flops, *map(format_bits, bits), f"{entry['change']:.2%}")
    return table


def top_k_notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences on what the table shows and on the recommended value, with the rule.

    Args:
      results: as `evaluate_top_k` returns them.
    """
    best = min(results["values"], key=lambda entry: entry["average_bits_per_byte"])
    lowest = f"{format_bits(best['average_bits_per_byte'])}, top-{best['top_k']}"
    return [
        "Scores are bits per byte. FLOPs are those of the matmuls of a forward pass, the mean over the tokens of a "
        f"document of {results['length']:,}; relative to the anchor alone, which is as large as one expert.",
        f"recommended: top-{results['recommended']}, the smallest of these whose average is at most "
        f"{results['tolerance']:.1%} above the lowest ({lowest}); the model has top-{results['current']}",
    ]


def _entry(model: Model, layout: Layout, losses: Mapping[str, Loss], length: int) -> dict[str, Any]:
    """The results of one layout, but for their change from the best."""

    def flops(layout: Layout) -> float:
        return decode_step_flops(model.decoder.architecture, layout, batch=1, keys=(length + 1) / 2)

    return {
        "flops_per_token": flops(layout),
        "flops_ratio": flops(layout) / flops(ANCHOR),
        "average_bits_per_byte": sum(loss.bits_per_byte for loss in losses.values()) / len(losses),
        "data": {label: loss.as_dict() for label, loss in losses.items()},
    }


def _with_change(entry: Mapping[str, Any], lowest: float) -> dict[str, Any]:
    return {**entry, "change": entry["average_bits_per_byte"] / lowest - 1}
