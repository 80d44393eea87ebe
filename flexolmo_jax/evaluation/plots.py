"""Plots of the report's page, each a `<figure>` around an inline SVG.

They are drawn in placeholder colours that the page's style sheet resolves, and heat maps shade the page by opacity, so
one drawing serves light and dark pages.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flexolmo_jax.evaluation.results import AVERAGE, Scores, format_bits

Curves = Mapping[str, Sequence[Mapping[str, float]]]
Styles = Mapping[str, tuple[str, str]]  # name -> (colour, CSS border style)

BETTER, WORSE = "#2f80c8", "#dd7328"
PALETTE = ("#8b949e", "#169b80", "#c45fa0", "#c9920e", "#5b8def", "#d1495b", "#8e6fd8", "#7a9a2e")
LINE_STYLES = tuple((colour, dashes) for dashes in ("solid", "dashed", "dotted") for colour in PALETTE)

_SHARE = "#7d62cf"
_WIDTH = 760  # of a plot, in CSS pixels
_INK, _RULE = "#010101", "#020202"  # placeholders of the page's own colours
_RC: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _RULE),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.labelsize"), 13),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "text.parse_math"), False),
    "axes.grid": True,
    "svg.fonttype": "none",
}


def visible(value: object) -> str:
    """Text in which control characters, which HTML forbids, are their visible pictures."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
    return str(value).translate(pictures)


def share_map(name: str, shares: Scores) -> Markup:
    """Heat map of the routing weight, `{expert: {corpus: share}}`.

    Args:
      name: unique among the page's plots.
      shares: of each expert on each corpus.
    """
    limit = max(value for values in shares.values() for value in values.values()) or 1.0
    svg = _heat_map(name, "expert", shares, lambda v: (_SHARE, 0.8 * v / limit), lambda v: f"{v:.0%}")
    return _captioned(svg, "Share of the routing weight, averaged over tokens and layers.")


def change_map(name: str, changes: Scores, reference: str) -> Markup:
    """Heat map of differences in bits per byte from `reference`: blue where fewer bits are needed, orange where more.

    Args:
      name: unique among the page's plots.
      changes: `{model: {corpus: difference}}`.
      reference: what they are compared with, for the caption.
    """
    finite = [abs(v) for values in changes.values() for v in values.values() if math.isfinite(v)]
    limit = max(finite, default=0.0) or 1.0

    def paint(value: float) -> tuple[str, float]:
        return (BETTER if value < 0 else WORSE), (0.8 * abs(value) / limit if math.isfinite(value) else 0.0)

    svg = _heat_map(name, "model", changes, paint, lambda value: format_bits(value, "+"))
    caption = Markup(
        "Bits per byte more (orange, worse) or fewer (blue, better) than {}. <span class='scale'>{}<i></i>{}</span>"
    )
    return _captioned(svg, caption.format(reference, format_bits(-limit, "+"), format_bits(limit, "+")))


@matplotlib.rc_context(_RC)
def loss_plot(curves: Curves, styles: Styles) -> Markup:
    """Training loss against step: every record as a faint line, and a running mean as a strong one."""
    window = max(1, max(map(len, curves.values())) // 40)
    figure = Figure(figsize=(_WIDTH / 72, 340 / 72), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="training loss (nats per token)")
    axes.margins(x=0.01)
    for run, records in curves.items():
        step, loss = np.array([(r["step"], r["loss"]) for r in records if "loss" in r], float).T
        colour, dashes = styles[run]
        width = min(window, len(loss))
        if width > 1:
            axes.plot(step, loss, color=colour, alpha=0.35, linewidth=1)
        means = [np.convolve(values, np.full(width, 1 / width), "valid") for values in (step, loss)]
        axes.plot(*means, color=colour, linestyle=dashes, linewidth=2)
    caption = f"Training loss; the strong line is the mean of {window} records." if window > 1 else "Training loss."
    return _captioned(_svg(figure, "training-loss", f"Training loss against step for {', '.join(curves)}"), caption)


@matplotlib.rc_context(_RC)
def held_out_plot(curves: Curves, styles: Styles, corpora: Sequence[str]) -> Markup:
    """Held-out loss against step, one panel for each of `corpora`, the records' `evaluation/CORPUS` keys."""
    columns = min(len(corpora), 4)
    lines = math.ceil(len(corpora) / columns)
    figure = Figure(figsize=(_WIDTH / 72, 235 * lines / 72), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, corpus in zip(panels, [*corpora, *[""] * (lines * columns - len(corpora))], strict=True):
        panel.set_title(_folded(corpus.removeprefix("evaluation/"), 18, 1), weight="bold", loc="left")
        panel.set_visible(bool(corpus))
        for run, records in curves.items():
            points = np.array([(r["step"], r[corpus]) for r in records if corpus in r], float).reshape(-1, 2)
            panel.plot(*points.T, "o", color=styles[run][0], linestyle=styles[run][1], markersize=4)
    figure.supxlabel("training step")
    figure.supylabel("held-out loss (nats per token)")
    names = ", ".join(corpus.removeprefix("evaluation/") for corpus in corpora)
    svg = _svg(figure, "held-out-loss", f"Held-out loss against step, one panel each for {names}")
    return _captioned(svg, "Loss on held-out text of each corpus.")


@matplotlib.rc_context(_RC)
def _heat_map(
    name: str,
    label: str,
    values: Scores,
    paint: Callable[[float], tuple[str, float]],
    write: Callable[[float], str],
) -> Markup:
    """Heat map of `{row: {column: value}}`: `paint` gives a cell's colour and opacity, `write` its text."""
    columns = list(next(iter(values.values())))
    heads = {column: _folded(column, 12) for column in columns}
    left = 7.8 * max(len(_folded(row, 32, 1)) for row in values) + 44
    top, height = 44.0 + 16 * (1 + any("\n" in head for head in heads.values())), 32.0
    gap = 10.0 if AVERAGE in columns else 0.0
    longest = max(len(line) for head in heads.values() for line in head.split("\n"))
    cell = max(66.0, 9.0 * longest + 12, (_WIDTH - left - gap) / len(columns))
    width, bottom = left + cell * len(columns) + gap, top + height * len(values)
    figure = Figure(figsize=(width / 72, bottom / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottom, 0))
    axes.set_axis_off()
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text((left + width) / 2, 12, "held-out corpus", **centred)
    axes.text(12, (top + bottom) / 2, label, rotation=90, **centred)
    starts = {column: left + cell * i + gap * (column == AVERAGE) for i, column in enumerate(columns)}
    for column, x in starts.items():
        axes.text(x + cell / 2, top - 8, heads[column], weight="bold", ha="center", va="bottom")
    for i, (row, cells) in enumerate(values.items()):
        y = top + height * i
        axes.text(left - 10, y + height / 2, _folded(row, 32, 1), ha="right", va="center")
        for column, x in starts.items():
            face = paint(cells[column])
            axes.add_patch(Rectangle((x + 1, y + 1), cell - 2, height - 2, facecolor=face, linewidth=0))
            axes.text(x + cell / 2, y + height / 2, write(cells[column]), **centred)
    lines = (f"{row}: " + ", ".join(f"{c} {write(v)}" for c, v in cells.items()) for row, cells in values.items())
    return _svg(figure, name, "; ".join(lines))


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Returns the figure as an inline SVG in the page's own colours; the same bytes every time."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        unsigned = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=unsigned)
    body = visible(stream.getvalue().partition("<svg")[2].partition(">")[2])
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # matplotlib gives every figure the same ids
    body = body.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")
    width, height = figure.get_size_inches() * 72
    style = f"max-width:{width:.0f}px;min-width:{0.75 * width:.0f}px"
    view = f"viewBox='0 0 {width:g} {height:g}' style='{style}'"
    return Markup(f"<svg {view} role='img' aria-label='{escape(visible(label))}'>{body}")


def _folded(text: str, width: int, lines: int = 2) -> str:
    """The text in lines of at most `width` characters, with an ellipsis where it needs more lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="\N{HORIZONTAL ELLIPSIS}"))


def _captioned(svg: Markup, caption: str) -> Markup:
    figure = Markup("<figure><div class='scroll' tabindex='0'>{}</div><figcaption>{}</figcaption></figure>")
    return figure.format(svg, caption)
