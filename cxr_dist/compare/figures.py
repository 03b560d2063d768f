"""Figures of several models: ROC curves over one another, a panel a finding, and differences from the reference.

Here a colour is a model, with a dash pattern of its own, so that prints without colours can be read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cxr_dist.compare.judge import Entry
from cxr_dist.evaluate.metrics import roc_curve, thin
from cxr_dist.evaluate.plots.panels import CHANCE, DASHED, INK, MUTED, blank, grid, head, shown, ticks, unit_axes

__all__ = ["MODEL_COLOURS", "difference_figure", "model_colour", "roc_figure"]

MODEL_COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#882255", "#b87a00", "#332288", "#cc6677", "#5c5c5c")
"""Of the models in the order given; all at least 3:1 against white, and neighbours apart for the colour-blind."""
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.2)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_POINTS = 600
_NUMBERED = 5
"""Most models whose AUROCs have room in a panel."""
_LEGEND_COLUMNS = 2
_LINE = 0.2
"""Height of a line of the legend, inches."""


def model_colour(number: int) -> str:
    """The colour of the model that was given at this place."""
    return MODEL_COLOURS[number % len(MODEL_COLOURS)]


def roc_figure(entries: Sequence[Entry], result: Mapping[str, Any]) -> Figure:
    """A panel for each finding with a curve for each model that scores it, and their AUROCs."""
    findings = result["findings"]
    figure, cells = grid(
        len(findings),
        title=f"ROC curves of {len(entries)} models, {result['split']} split, {result['n_images']:,} images",
        key=[*_room(len(entries)), "Dashed grey: chance." + ("  Numbers: AUROC." if len(entries) <= _NUMBERED else "")],
        x_label="False positive rate (1 − specificity)",
        y_label="True positive rate (sensitivity)",
    )
    _legend(figure, [one.name for one in entries], range(len(entries)))
    for cell, finding in zip(cells, findings, strict=True):
        head(cell, finding)
        unit_axes(cell)
        cell.plot([0, 1], [0, 1], color=CHANCE, linewidth=0.8, linestyle=DASHED, zorder=1)
        drawn = 0
        for number, one in enumerate(entries):
            found = result["discrimination"][one.name].get(finding)
            if found is None or found["auroc"]["value"] is None:
                continue
            k = one.scores.findings.index(finding)
            curve = thin(roc_curve(one.scores.probabilities_NK[:, k], one.scores.labels_NK[:, k]), _POINTS)
            style: Any = {"color": model_colour(number), "linestyle": _dash(number)}
            cell.plot(curve.x, curve.y, linewidth=1.5 if number else 2.2, zorder=2 + number, **style)
            if len(entries) <= _NUMBERED:
                _auroc(cell, found["auroc"]["value"], len(entries) - 1 - number, style)
            drawn += 1
        if not drawn:
            blank(cell, next(one[finding]["reason"] for one in result["discrimination"].values() if finding in one))
    return figure


def difference_figure(result: Mapping[str, Any]) -> Figure:
    """A panel for each model but the reference: its AUROC less the reference's, by finding, with 95 % intervals."""
    names = list(result["models"])
    panels = list(result["differences"].items())
    rows = [*result["findings"], "mean"]
    figure, cells = grid(
        len(panels),
        title=f"AUROC less that of {result['reference']}, {result['split']} split",
        key=[
            "Bar: 95 % interval over patients.  Full: a win or a loss, corrected over the findings (Holm).",
            "Hollow: a tie, or undecided.",
        ],
        x_label="Difference of AUROC (right of the line: better)",
        y_label="",
        columns=3,
        width=2.3,
        height=0.28 * len(rows) + 0.2,
        left=1.6,
    )
    bound = _bound([one for _, panel in panels for one in panel["auroc"].values()])
    for cell, (name, panel) in zip(cells, panels, strict=True):
        head(cell, name if len(name) <= 34 else f"{name[:33]}…")
        cell.set(xlim=(-bound, bound), ylim=(len(rows) - 0.4, -0.6))
        cell.xaxis.set_major_locator(ticks(4))
        cell.yaxis.set_ticks(range(len(rows)), [shown(row) if row != "mean" else "Mean" for row in rows])
        cell.axvline(0, color=CHANCE, linewidth=0.8, linestyle=DASHED, zorder=1)
        cell.axhline(len(rows) - 1.5, color=CHANCE, linewidth=0.6, zorder=1)
        colour = model_colour(names.index(name))
        for at, row in enumerate(rows):
            _bar(cell, at, panel["auroc"].get(row), colour)
    return figure


def _bar(cell: Axes, at: int, one: Mapping[str, Any] | None, colour: str) -> None:
    if one is None or one["difference"]["value"] is None:
        said: Any = {"ha": "center", "va": "center", "fontsize": 8, "color": MUTED}
        text = "not scored" if one is None else "undefined"
        cell.text(0, at, text, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0}, zorder=2, **said)
        return
    value = one["difference"]
    if value["lower"] is not None:
        cell.plot([value["lower"], value["upper"]], [at, at], color=colour, linewidth=1.8, zorder=2)
    face = colour if one["decision"] in ("win", "loss") else "white"
    cell.plot([value["value"]], [at], "o", markersize=5.5, color=colour, markerfacecolor=face, zorder=3)


def _bound(differences: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of the axis: all intervals, and never less than a hundredth, lest nothing look like something."""
    ends = [one["difference"][end] for one in differences for end in ("value", "lower", "upper")]
    return max([0.01, *(1.08 * abs(end) for end in ends if end is not None)])


def _room(num: int) -> list[str]:
    """Empty lines under the title for the legend."""
    return [""] * -(-num // _LEGEND_COLUMNS)


def _legend(figure: Figure, names: Sequence[str], numbers: Sequence[int]) -> None:
    width, height = figure.get_size_inches()
    lines = len(_room(len(names)))
    for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
        column, line = divmod(place, lines)
        x = 0.1 / width + column * 0.5
        y = 1 - (0.4 + _LINE * line + 0.07) / height
        ends = [x, x + 0.34 / width]
        style: Any = {"color": model_colour(number), "linestyle": _dash(number)}
        figure.add_artist(Line2D(ends, [y, y], linewidth=2, transform=figure.transFigure, **style))
        text = name if len(name) <= 44 else f"{name[:43]}…"
        figure.text(ends[1] + 0.08 / width, y, text.replace("$", r"\$"), va="center", fontsize=9, color=INK)


def _auroc(cell: Axes, value: float, line: int, style: Any) -> None:
    """A model's AUROC at the lower right, the first model's on top, behind a piece of its line."""
    y = 0.06 + 0.095 * line
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.8}
    text: Any = {"ha": "right", "va": "center", "fontsize": 8.5, "color": INK, "bbox": box, "zorder": 20}
    cell.text(0.99, y, f"{value:.3f}", transform=cell.transAxes, **text)
    cell.plot([0.62, 0.74], [y, y], transform=cell.transAxes, linewidth=1.8, zorder=21, **style)


def _dash(number: int) -> Any:
    return _DASHES[number % len(_DASHES)]
