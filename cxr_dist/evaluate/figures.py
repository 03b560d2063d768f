"""ROC and precision-recall figures: one panel a finding, its curve in its own colour over the others in grey.

Fourteen curves on one axes cannot be told apart by anyone, least of all by the colour-blind; a panel's title says
whose curve it is, and the colour only repeats it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_dist.evaluate.metrics import Curve, pr_curve, roc_curve, thin
from cxr_dist.evaluate.plots.panels import CHANCE, COLOURS, CONTEXT, DASHED, INK, blank, colour, grid, head, unit_axes
from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["COLOURS", "pr_figure", "roc_figure"]

_POINTS, _CONTEXT_POINTS = 600, 48
"""Points of a curve, and of one that only gives context: 14 × 13 of these are most of the SVG."""

_SMALL: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8.5, "color": INK}

Points = Mapping[str, tuple[float, float]]
Discrimination = Mapping[str, Any]
"""That part of evaluation.json: what the panels say is what the tables say."""


def roc_figure(scores: ScoreTable, found: Discrimination, operating: Points, *, title: str) -> Figure:
    """Every finding's ROC curve, its AUROC and interval, and its operating point.

    `operating` maps a finding to (false positive rate, true positive rate) at its validation threshold; findings
    without one get no dot.
    """

    def decorate(axes: Axes, one: Mapping[str, Any]) -> None:
        axes.plot([0, 1], [0, 1], color=CHANCE, linewidth=0.8, linestyle=DASHED, zorder=2)
        axes.text(0.5, 1.02, f"AUROC {_value(one['auroc'])}", transform=axes.transAxes, **_SMALL)

    labels = "False positive rate (1 − specificity)", "True positive rate (sensitivity)"
    key = f"Mean AUROC {_value(found['mean']['auroc'])}.  Dashed: chance."
    return _panels(scores, found, operating, roc_curve, decorate, labels, key, f"ROC curves: {title}")


def pr_figure(scores: ScoreTable, found: Discrimination, operating: Points, *, title: str) -> Figure:
    """Every finding's precision-recall curve, its average precision, and its operating point.

    `operating` maps a finding to (recall, precision); the dashed line is the prevalence, which chance would give.
    """

    def decorate(axes: Axes, one: Mapping[str, Any]) -> None:
        prevalence = one["positives"] / (one["positives"] + one["negatives"])
        axes.axhline(prevalence, color=CHANCE, linewidth=0.8, linestyle=DASHED, zorder=2)
        # above the panel: a good curve fills its corners
        axes.text(0.5, 1.02, f"AP {_value(one['average_precision'])}", transform=axes.transAxes, **_SMALL)

    labels = "Recall (sensitivity)", "Precision"
    key = f"Mean AP {_value(found['mean']['average_precision'])}.  Dashed: chance (the prevalence)."
    return _panels(scores, found, operating, pr_curve, decorate, labels, key, f"Precision-recall curves: {title}")


def _panels(
    scores: ScoreTable,
    found: Discrimination,
    operating: Points,
    curve_of: Callable[..., Curve],
    decorate: Callable[[Axes, Mapping[str, Any]], None],
    axis_labels: tuple[str, str],
    key: str,
    title: str,
) -> Figure:
    curves = {
        finding: curve_of(scores.probabilities_NK[:, k], scores.labels_NK[:, k])
        for k, finding in enumerate(scores.findings)
        if found[finding]["auroc"]["value"] is not None
    }
    context = {finding: thin(curve, _CONTEXT_POINTS) for finding, curve in curves.items()}
    more = ["Grey: the other findings."] if len(curves) > 1 else []
    more += ["Dot: threshold by Youden's J, chosen on validation."] if operating else []
    if any(one["auroc"]["lower"] is not None for one in found.values()):
        more += ["[ ]: 95 % interval over patients."]
    figure, cells = grid(
        len(scores.findings),
        title=f"{title}, {scores.split} split, {len(scores):,} images",
        key=[key, "  ".join(more)],
        x_label=axis_labels[0],
        y_label=axis_labels[1],
        gap=(0.22, 0.56),
        above=0.5,
    )
    for cell, finding in zip(cells, scores.findings, strict=True):
        head(cell, finding, pad=17)
        unit_axes(cell)
        if finding not in curves:
            blank(cell, found[finding]["reason"])
            continue
        for other, curve in context.items():
            if other != finding:
                cell.plot(curve.x, curve.y, color=CONTEXT, linewidth=0.7, zorder=1)
        curve = thin(curves[finding], _POINTS)
        cell.plot(curve.x, curve.y, color=colour(finding), linewidth=1.8, zorder=3)
        decorate(cell, found[finding])
        if finding in operating:
            x, y = operating[finding]
            cell.plot(x, y, "o", color=colour(finding), markersize=6, markeredgecolor="white", zorder=4)
    return figure


def _value(value: Mapping[str, Any]) -> str:
    if value["value"] is None:
        return "–"
    return f"{value['value']:.3f}" + ("" if value["lower"] is None else f" [{value['lower']:.3f}–{value['upper']:.3f}]")
