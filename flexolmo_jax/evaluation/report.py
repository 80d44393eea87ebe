"""One self-contained HTML page about a whole run.

The page fetches nothing: its style is inline and every plot is an inline SVG.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from etils import epath

from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluation import figures
from flexolmo_jax.evaluation.figures import Curves, Styles, escape
from flexolmo_jax.evaluation.tables import AVERAGE, MISSING, Scores, format_bits, lowest, model_rows, unique


def read_curve(metrics_jsonl_path: epath.PathLike) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, one per step; where a resumed run repeats a step, the later wins.

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


def write_report(path: epath.PathLike, results: Mapping[str, Any], curves: Curves) -> None:
    """Writes the page; the same input gives the same bytes.

    Args:
      path: the file to write, local or `gs://`.
      results: the content of results.json: `bits_per_byte` `{model: {domain: value}}` and, where there are
        any, `routing` `{domain: {expert: share of the weight}}`, `opt_out` (the certificate), `samples` and
        `settings`.
      curves: `{run: records}` as `read_curve` returns them: `step`, `loss` in nats per token, and perhaps
        `tokens` of that step and `evaluation/DOMAIN`, a held-out loss in nats per token.
    """
    rows = model_rows(results["bits_per_byte"])
    routing, samples = results.get("routing") or {}, results.get("samples") or []
    sections = [
        _quality(rows),
        _opt_outs(rows, results.get("opt_out") or {}),
        _routing(routing),
        _training(curves),
        _samples(samples, unique([*routing.values(), *(sample["experts"] for sample in samples)])),
        _section("Settings", _facts(results.get("settings") or {})),
    ]
    template = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    colours = {"better": figures.BETTER, "worse": figures.WORSE}
    page = template.substitute(colours, tiles=_tiles(rows), sections="\n".join(sections))
    epath.Path(path).write_bytes(page.encode("utf-8", "replace"))


# Sections of the page.


def _tiles(rows: Scores) -> str:
    """The averages that sum the page up."""
    averages = {model: row[AVERAGE] for model, row in rows.items()}
    pairs = [model for model in rows if model.startswith("pair:")]
    best_pair = min(pairs, key=averages.get, default="")
    captions = {
        "anchor": "the anchor alone",
        best_pair: f"the best single pair, {best_pair.removeprefix('pair:')}",
        "merged": "the merged model",
    }
    shown = {caption: averages[model] for model, caption in captions.items() if model in averages}
    return "".join(f"<li><b>{format_bits(value)}</b> {escape(caption)}</li>" for caption, value in shown.items())


def _quality(rows: Scores) -> str:
    best = lowest(rows)
    title = "Held-out bits per byte of every model"
    cells = [
        [_label(model), *(f"<b>{format_bits(v)}</b>" if v == best[key] else format_bits(v) for key, v in row.items())]
        for model, row in rows.items()
    ]
    parts = [_table(["model", *best], cells, title), _ROW_HELP]
    if {"anchor", "merged"} <= rows.keys():
        before, after = rows["anchor"][AVERAGE], rows["merged"][AVERAGE]
        verb = "lowers" if after < before else "raises"
        title = f"Merging {verb} the average from {format_bits(before)} to {format_bits(after)} bits per byte"
    if "anchor" in rows and len(rows) > 1:
        changes = {_label(model): _change(row, rows["anchor"]) for model, row in rows.items()}
        del changes["anchor"]
        parts.append("<h3>Gain or loss against the anchor</h3>")
        parts.append(figures.change_map("against-anchor", changes, "the anchor"))
    return _section(title, *parts)


def _opt_outs(rows: Scores, certificate: Mapping[str, Any]) -> str:
    gone = [model for model in rows if model.startswith("merged-without:")]
    title, parts = "Opting out", []
    if gone and "merged" in rows:
        changes = {_label(model).removeprefix("merged "): _change(rows[model], rows["merged"]) for model in gone}
        costs = {(row, key): v for row in changes for key, v in changes[row].items() if math.isfinite(v)}
        if costs:
            worst = max(costs, key=costs.get)
            title = f"An opt-out costs at most {format_bits(costs[worst])} bits per byte, on {worst[1]}"
        parts.append(figures.change_map("opt-outs", changes, "the merged model"))
    if certificate:
        facts = {
            "expert removed": certificate["expert"],
            "files compared": certificate["files"],
            "identical to the merge that never had it": "yes" if certificate["identical"] else "NO",
            "guarantee": certificate["guarantee"],
        }
        mark = "good" if certificate["identical"] else "bad"
        parts.append(f"<div class='card {mark}'><h3>Opt-out certificate</h3>{_facts(facts)}</div>")
    return _section(title, *parts)


def _routing(routing: Scores) -> str:
    if not routing:
        return ""
    shares = {e: {domain: row.get(e, 0.0) for domain, row in routing.items()} for e in unique(routing.values())}
    homes = [domain for domain in routing if domain in shares]
    at_home = sum(max(shares[domain], key=shares[domain].get) == domain for domain in homes)
    title = f"{at_home} of {len(homes)} experts get their largest share on their own domain" if homes else "Routing"
    return _section(title, figures.share_map(shares))


def _training(curves: Curves) -> str:
    curves = {run: records for run, records in curves.items() if any("loss" in r for r in records)}
    if not curves:
        return ""
    styles = dict(zip(curves, itertools.cycle(figures.LINE_STYLES), strict=False))
    parts = [_legend(styles), figures.loss_plot(curves, styles)]
    keys = unique(record for records in curves.values() for record in records)
    domains = [key for key in keys if key.startswith("evaluation/")]
    if domains:
        parts.append(figures.held_out_plot(curves, styles, domains))
    cells = []
    for run, records in curves.items():
        last = [record for record in records if "loss" in record][-1]
        cells.append([run, _number(last["step"]), _number(last.get("tokens", MISSING)), format_bits(last["loss"])])
    parts.append(_table(["run", "steps", "tokens per step", "last loss (nats per token)"], cells, "Runs"))
    return _section("How training went", *parts)


def _samples(samples: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> str:
    colours = dict(zip(experts, itertools.cycle(figures.PALETTE), strict=False))
    cards = []
    for sample in samples:
        shares = {e: sample["experts"][e] for e in experts if sample["experts"].get(e, 0) > 0}
        spans = "".join(f"<i style='flex:{v:.4f};background:{colours[e]}'></i>" for e, v in shares.items())
        names = _legend({f"{e} {share:.0%}": (colours[e], "solid") for e, share in shares.items()})
        text = f"<b>{escape(sample['prompt'])}</b>{escape(sample['text'].removeprefix(sample['prompt']))}"
        bar = f"<div class='bar' aria-hidden='true'>{spans}</div>"
        cards.append(f"<div class='card'><h3>{escape(sample['domain'])}</h3><pre>{text}</pre>{bar}{names}</div>")
    note = "<p class='note'>The prompt is bold; the bar is each expert's share of the routing weight.</p>"
    return _section("What the merged model writes", note, *cards) if cards else ""


# Pieces of text and HTML.


def _change(row: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    return {key: value - reference[key] for key, value in row.items()}


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.10g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _label(model: str) -> str:
    kind, _, name = model.partition(":")
    return f"anchor + {name}" if kind == "pair" else f"{kind.replace('-', ' ')} {name}".strip()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table with names on the left and numbers, which are HTML already, on the right."""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    lines = ((escape(row[0]), "".join(f"<td>{cell}</td>" for cell in row[1:])) for row in rows)
    body = "".join(f"<tr><th scope='row'>{name}</th>{numbers}</tr>" for name, numbers in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'>{table}</div>"


def _facts(facts: Mapping[str, Any]) -> str:
    items = (f"<dt>{escape(key)}</dt><dd>{escape(_number(value))}</dd>" for key, value in facts.items())
    return f"<dl>{''.join(items)}</dl>" if facts else ""


def _legend(styles: Styles) -> str:
    mark = "<i style='border-top:4px {1} {0}'></i>"
    items = (f"<li>{mark.format(*style)}{escape(name)}</li>" for name, style in styles.items())
    return f"<ul class='legend'>{''.join(items)}</ul>"


def _section(title: str, *parts: str) -> str:
    """A section, or nothing where all its parts are empty."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


_ROW_HELP = """<p class="note"><b>anchor</b>: the public model that everyone starts from. <b>anchor + name</b>:
the pair of anchor and expert that an owner trained. <b>merged</b>: the anchor and every expert. <b>merged
without</b>: the merged model after that owner opted out. <b>average</b>: plain mean of the domains. The best
value of each column is bold.</p>"""
