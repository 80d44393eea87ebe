"""A self-contained HTML page that compares evaluated models on held-out corpora.

The page fetches nothing: its style is inline, and every plot is an inline SVG. `report.html` is its Jinja2 template.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from etils import epath

from flexolmo_jax.checkpoint.manifests import ANCHOR_NAME
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.evaluation import plots
from flexolmo_jax.evaluation.loss import ModelResults
from flexolmo_jax.evaluation.plots import Curves
from flexolmo_jax.evaluation.results import AVERAGE, Scores, format_bits, lowest, unique, with_average
from flexolmo_jax.tables import MISSING


class Certificate(NamedTuple):
    """A box of facts about an opt-out.

    Attributes:
      title: of the box.
      facts: {name: value}.
      holds: whether the result is exact.
    """

    title: str
    facts: Mapping[str, Any]
    holds: bool


def read_curve(metrics_jsonl_path: epath.PathLike) -> list[dict[str, float]]:
    """Reads a metrics.jsonl: one record per step. Where a resumed run repeats a step, the later record wins.

    Raises:
      UserError: a line is not a JSON object with a step.
    """
    by_step: dict[int, dict[str, float]] = {}
    for number, line in enumerate(epath.Path(metrics_jsonl_path).read_text().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            message = 'not a metrics record; each line is a JSON object with a "step"'
            raise UserError(f"{metrics_jsonl_path}:{number}: {message}") from error
        by_step[step] = by_step.get(step, {}) | record
    return [by_step[step] for step in sorted(by_step)]


def opt_out_certificates(results: Mapping[str, ModelResults]) -> list[Certificate]:
    """The certificates of the models that are the output of an opt-out."""
    found = []
    for label, result in results.items():
        if result.certificate:
            removed = ", ".join(expert["name"] for expert in result.certificate["removed"])
            guarantee = result.certificate["guarantee"]
            facts = {"experts removed": removed, "guarantee": guarantee}
            found.append(Certificate(f"Opt-out certificate of {label}", facts, guarantee.startswith("exact")))
    return found


def bits_per_byte(results: Mapping[str, ModelResults], separator: str = " without ") -> dict[str, dict[str, float]]:
    """Bits per byte of all models and opt-outs, `{model, or model SEPARATOR expert: {corpus: value}}`."""
    scores = {}
    for label, result in results.items():
        scores[label] = {corpus: loss.bits_per_byte for corpus, loss in result.losses.items()}
        for name, losses in result.without.items():
            scores[label + separator + name] = {corpus: loss.bits_per_byte for corpus, loss in losses.items()}
    return scores


def write_report(
    path: epath.PathLike,
    results: Mapping[str, ModelResults],
    *,
    reference: str | None = None,
    title: str = "Evaluation report",
    introduction: str = "",
    certificates: Sequence[Certificate] = (),
    curves: Curves | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page; the same arguments give the same bytes.

    Args:
      path: the file to write, local or `gs://`.
      results: {label: results} of the models, as `evaluate_models` returns them.
      reference: label of the model that the others are compared with; by default the first.
      title: of the page.
      introduction: a paragraph below the title.
      certificates: of opt-outs.
      curves: training curves, `{run: records}` as `read_curve` returns them: `step`, `loss` in nats per token, and
        perhaps `tokens` of that step and `evaluation/CORPUS`, a held-out loss in nats per token.
      samples: texts that a model wrote: "title", "prompt", "text" and "experts", {name: share of the routing weight}.
      settings: {name: value}, shown at the end.

    Raises:
      ArgumentError: there is no model called `reference`.
    """
    if reference is not None and reference not in results:
        raise ArgumentError("reference", reference, f"is not among the models; give one of {', '.join(results)}")
    reference = next(iter(results), "") if reference is None else reference
    scores = with_average(bits_per_byte(results))
    routing = _routing(results)
    experts = unique([*(result.roster for result in results.values()), *(sample["experts"] for sample in samples)])
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    environment.filters |= {"number": _number, "bits": format_bits}
    source = resources.files("flexolmo_jax.evaluation").joinpath("report.html")
    template = environment.from_string(source.read_text("utf-8"))
    page = template.render(
        title=title,
        introduction=introduction,
        better=plots.BETTER,
        worse=plots.WORSE,
        tiles=_tiles(results, scores),
        scores=scores,
        best=lowest(scores),
        rosters={label: ", ".join(result.roster[1:]) or "none" for label, result in results.items()},
        reference=reference,
        headline=_headline(results, scores, reference),
        changes=_changes(results, scores, reference),
        losses=_losses(results),
        corpora=_corpora(results),
        opt_outs=_opt_outs(results),
        worst_opt_out=_worst_opt_out(results),
        certificates=certificates,
        routing=[(label, plots.share_map(f"routing-{i}", _shares(results[label]))) for i, label in enumerate(routing)],
        own_domain=_own_domain(results, routing),
        training=_training(curves or {}),
        samples=_samples(samples, experts),
        settings=settings or {},
    )
    epath.Path(path).write_bytes(page.encode("utf-8", "replace"))


def _kind(result: ModelResults) -> str:
    """What a model is made of: the anchor alone, one contributed expert with or without it, or several."""
    contributed = [name for name in result.roster if name != ANCHOR_NAME]
    return ("anchor", "single", "merged")[min(len(contributed), 2)]


def _tiles(results: Mapping[str, ModelResults], scores: Scores) -> list[tuple[str, float]]:
    """The lowest average of each kind of model: (caption, bits per byte)."""
    tiles = []
    for kind, best_of in (("anchor", "best anchor"), ("single", "best single expert"), ("merged", "best merged model")):
        labels = [label for label, result in results.items() if _kind(result) == kind]
        measured = [label for label in labels if math.isfinite(scores[label][AVERAGE])]
        if measured:
            best = min(measured, key=lambda label: scores[label][AVERAGE])
            tiles.append((best if len(labels) == 1 else f"{best}, the {best_of}", scores[best][AVERAGE]))
    return tiles


def _headline(results: Mapping[str, ModelResults], scores: Scores, reference: str) -> str:
    """How the best merged model compares with the reference."""
    merged = [label for label in results if _kind(results[label]) == "merged" and label != reference]
    averages = {label: scores[label][AVERAGE] for label in merged if math.isfinite(scores[label][AVERAGE])}
    before = scores[reference][AVERAGE] if reference else math.nan
    if not averages or not math.isfinite(before) or _kind(results[reference]) != "anchor":
        return "Held-out bits per byte of every model"
    after = min(averages.values())
    change = "lowers" if after < before else "raises"
    return f"Merging {change} the average from {format_bits(before)} to {format_bits(after)} bits per byte"


def _changes(results: Mapping[str, ModelResults], scores: Scores, reference: str) -> str:
    """Heat map of all models against the reference."""
    changes = {label: _difference(scores[label], scores[reference]) for label in results if label != reference}
    return plots.change_map("against-reference", changes, reference) if changes else ""


def _losses(results: Mapping[str, ModelResults]) -> dict[str, dict[str, float]]:
    """Nats per token of each model on all corpora."""
    corpora = unique(result.losses for result in results.values())
    return {
        label: {c: result.losses[c].nats_per_token if c in result.losses else math.nan for c in corpora}
        for label, result in results.items()
    }


def _corpora(results: Mapping[str, ModelResults]) -> dict[str, tuple[int, int, int]]:
    """Documents, tokens and bytes of each corpus."""
    found = {corpus: loss for result in results.values() for corpus, loss in result.losses.items()}
    return {corpus: (loss.documents, loss.tokens, loss.bytes) for corpus, loss in found.items()}


def _opt_out_costs(result: ModelResults) -> dict[str, dict[str, float]]:
    """Bits per byte that each opt-out adds, `{"without EXPERT": {corpus: difference, average}}`."""
    scores = with_average(bits_per_byte({"": result}, "without "))
    return {label: _difference(row, scores[""]) for label, row in scores.items() if label}


def _opt_outs(results: Mapping[str, ModelResults]) -> list[tuple[str, str]]:
    """(label, heat map) of each model that was evaluated without its experts."""
    measured = [label for label, result in results.items() if result.without]
    maps = enumerate(measured)
    return [(label, plots.change_map(f"opt-outs-{i}", _opt_out_costs(results[label]), label)) for i, label in maps]


def _worst_opt_out(results: Mapping[str, ModelResults]) -> tuple[str, float] | None:
    """The corpus that an opt-out costs most, and the bits per byte it costs."""
    costs = [
        (corpus, value)
        for result in results.values()
        for changes in _opt_out_costs(result).values()
        for corpus, value in changes.items()
        if math.isfinite(value)
    ]
    return max(costs, key=lambda cost: cost[1], default=None)


def _routing(results: Mapping[str, ModelResults]) -> list[str]:
    """Labels of the models whose routing is shown: merged ones, or else those with one contributed expert."""
    for kind in ("merged", "single"):
        labels = [label for label, result in results.items() if _kind(result) == kind and result.losses]
        if labels:
            return labels
    return []


def _shares(result: ModelResults) -> dict[str, dict[str, float]]:
    """{expert: {corpus: share of the routing weight}}."""
    return {name: {c: loss.routing.get(name, 0.0) for c, loss in result.losses.items()} for name in result.roster}


def _own_domain(results: Mapping[str, ModelResults], labels: Sequence[str]) -> tuple[int, int] | None:
    """Of the experts with a corpus of their name: how many get their largest share there, and how many there are."""
    if len(labels) != 1:
        return None
    shares = _shares(results[labels[0]])
    named = [name for name in shares if name in shares[name]]
    count = sum(max(shares[name], key=lambda corpus: shares[name][corpus]) == name for name in named)
    return (count, len(named)) if named else None


def _training(curves: Curves) -> dict[str, Any]:
    """Plots of the training curves, their legend, and a summary of the runs; empty where there are none."""
    curves = {run: records for run, records in curves.items() if any("loss" in r for r in records)}
    if not curves:
        return {}
    styles = dict(zip(curves, itertools.cycle(plots.LINE_STYLES), strict=False))
    corpora = [
        key for key in unique(r for records in curves.values() for r in records) if key.startswith("evaluation/")
    ]
    runs = []
    for run, records in curves.items():
        last = [record for record in records if "loss" in record][-1]
        runs.append((run, last["step"], last.get("tokens", MISSING), last["loss"]))
    return {
        "legend": [(run, *style) for run, style in styles.items()],
        "loss": plots.loss_plot(curves, styles),
        "held_out": plots.held_out_plot(curves, styles, corpora) if corpora else "",
        "runs": runs,
    }


def _samples(samples: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> list[dict[str, Any]]:
    """The samples, each with the colours and shares of its experts."""
    colours = dict(zip(experts, itertools.cycle(plots.PALETTE), strict=False))
    return [
        {
            "title": sample["title"],
            "prompt": sample["prompt"],
            "text": sample["text"].removeprefix(sample["prompt"]),
            "shares": [(e, colours[e], sample["experts"][e]) for e in experts if sample["experts"].get(e, 0) > 0],
        }
        for sample in samples
    ]


def _difference(scores: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    return {key: value - reference[key] for key, value in scores.items()}


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.10g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _finalize(value: object) -> object:
    """Replaces control characters of all text that the template shows; HTML of the plots passes as it is."""
    return value if hasattr(value, "__html__") else plots.visible(value)
