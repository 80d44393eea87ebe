"""Compares a merge of solo experts with its anchor and each expert: scores, and which of the method's promises hold."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flexolmo_jax
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.evaluation.loss import ModelResults, evaluate_models, evaluate_shown

Scores = Mapping[str, Mapping[str, float]]


class Finding(NamedTuple):
    """One promise, and what the scores say.

    Attributes:
      text: the promise, a sentence without a full stop.
      result: the least favourable value that was found, as text.
      holds: whether the promise is kept.
    """

    text: str
    result: str
    holds: bool

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'NO':<3} {self.text}: {self.result}"


def compare(
    anchor: pathlib.Path, merged: pathlib.Path, held_out: Mapping[str, Corpus], length: int
) -> dict[str, ModelResults]:
    """Evaluates `anchor`, each owner's expert alone (`solo:NAME`), and `merged`, with and without each owner.

    Args:
      anchor: a model directory.
      merged: that of a merge with this anchor.
      held_out: {domain: corpus}.
      length: tokens of a sequence.
    """
    options: dict[str, Any] = {"length": length, "batch_size": 16}
    alone = evaluate_models({"anchor": anchor}, held_out, **options)
    model = flexolmo_jax.load(merged)
    for owner in model.roster[1:]:
        others = [name for name in model.roster if name != owner]
        losses = evaluate_shown(model, held_out, title=f"solo:{owner}", without=others, **options)
        alone[f"solo:{owner}"] = ModelResults([owner], losses)
    del model
    return {**alone, **evaluate_models({"merged": merged}, held_out, **options)}


def own_shares(merged: ModelResults) -> dict[str, float]:
    """{owner: the share of the routing weight that the owner's expert has on the owner's domain}."""
    return {owner: merged.losses[owner].routing[owner] for owner in merged.roster[1:]}


def findings(
    scores: Scores,
    shares: Mapping[str, float],
    public: str,
    unowned: Sequence[str] = (),
) -> list[Finding]:
    """What the method promises of a merge of solo experts, and what the scores say.

    Args:
      scores: {model: {domain: bits per byte}} of `anchor`, `merged`, and for each owner `solo:NAME` and
        `merged-without:NAME`. The average is over public text and the owners' domains.
      shares: as `own_shares` returns them.
      public: the domain of public text.
      unowned: the domains that nobody owns.
    """
    owners = list(shares)
    domains = [public, *owners]
    anchor, merged = scores["anchor"], scores["merged"]
    individual = {"anchor": anchor} | {owner: scores[f"solo:{owner}"] for owner in owners}
    best = {owner: min(model[owner] for model in individual.values()) for owner in owners}
    average = {model: sum(values[domain] for domain in domains) for model, values in individual.items()}

    gain = {owner: anchor[owner] - best[owner] for owner in owners}
    found = [
        _finding(
            "every owner's expert beats the anchor on its owner's domain",
            {owner: individual[owner][owner] / anchor[owner] - 1 for owner in owners},
            max,
            lambda change: change < 0,
        ),
        _finding(
            "on each owner's domain the merged model is at most 2% worse than the best single model",
            {owner: merged[owner] / best[owner] - 1 for owner in owners},
            max,
            lambda change: change <= 0.02,
        ),
        _finding(
            "there it keeps at least 90% of what that model gains over the anchor",
            {owner: (anchor[owner] - merged[owner]) / gain[owner] if gain[owner] else math.inf for owner in owners},
            min,
            lambda share: share >= 0.9,
            "{:.1%}",
        ),
        _finding(
            "on public text the merged model is at most 1% worse than the anchor",
            {public: merged[public] / anchor[public] - 1},
            max,
            lambda change: change <= 0.01,
        ),
        _finding(
            "on average the merged model is better than the anchor and every single expert",
            {model: sum(merged[domain] for domain in domains) / total - 1 for model, total in average.items()},
            max,
            lambda change: change < 0,
        ),
        _finding(
            "opting one owner out changes every other domain by at most 1%",
            {
                f"{domain} without {owner}": abs(scores[f"merged-without:{owner}"][domain] / merged[domain] - 1)
                for owner in owners
                for domain in domains
                if domain != owner
            },
            max,
            lambda change: change <= 0.01,
            "{:.2%}",
        ),
        _finding(
            "without an owner, the owner's domain is no worse than with the anchor",
            {owner: scores[f"merged-without:{owner}"][owner] / anchor[owner] - 1 for owner in owners},
            max,
            lambda change: change <= 0,
        ),
        _finding(
            "an owner's expert has at least 70% of the weight on the owner's own text",
            shares,
            min,
            lambda share: share >= 0.7,
            "{:.1%}",
        ),
    ]
    if unowned:
        found.append(
            _finding(
                "text of a domain that nobody owns is at most 1% worse than with the anchor",
                {domain: merged[domain] / anchor[domain] - 1 for domain in unowned},
                max,
                lambda change: change <= 0.01,
            )
        )
    return found


def gap_closed(worse: float, value: float, better: float) -> float:
    """The share of the way from `worse` to `better` at which `value` stands."""
    return (worse - value) / (worse - better)


def mean_scores(seeds: Iterable[Scores]) -> dict[str, dict[str, float]]:
    """The mean over seeds of each score; all have the same models and domains."""
    seeds = list(seeds)
    return {
        model: {domain: sum(scores[model][domain] for scores in seeds) / len(seeds) for domain in values}
        for model, values in seeds[0].items()
    }


def _finding(
    text: str,
    values: Mapping[str, float],
    worst: Callable[..., str],
    holds: Callable[[float], bool],
    form: str = "{:+.2%}",
) -> Finding:
    """The finding for the worst of the values, `max` or `min`."""
    name = worst(values, key=lambda name: values[name])
    return Finding(text, f"{form.format(values[name])} ({name})", holds(values[name]))
