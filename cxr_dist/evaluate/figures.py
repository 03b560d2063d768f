"""ROC and precision-recall figures: one panel a finding, its curve in its own colour over the others in grey.

Fourteen curves on one axes cannot be told apart by anyone, least of all by the colour-blind; a panel's title says
whose curve it is, and the colour only repeats it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cxr_dist.evaluate.metrics import Curve, FindingMetrics, Metric, Metrics, pr_curve, roc_curve, thin
from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["COLOURS", "plot_pr", "plot_roc"]

COLOURS: dict[str, str] = {
    "Atelectasis": "#007a5a",
    "Cardiomegaly": "#cc6677",
    "Effusion": "#882255",
    "Infiltration": "#117733",
    "Mass": "#d55e00",
    "Nodule": "#b05c8b",
    "Pneumonia": "#661100",
    "Pneumothorax": "#0072b2",
    "Consolidation": "#b87a00",
    "Edema": "#2f8f86",
    "Emphysema": "#7d7d1f",
    "Fibrosis": "#aa4499",
    "Pleural_Thickening": "#332288",
    "Hernia": "#4f7fb3",
}
"""The colour of each finding in every figure; all at least 3:1 against white."""
_OTHER = "#444444"
_CONTEXT = "#d9d9d9"
_CHANCE = "#767676"
_CONTEXT_POINTS = 200

Points = Mapping[str, tuple[float, float]]


def plot_roc(path: str | Path, scores: ScoreTable, metrics: Metrics, operating: Points, *, title: str) -> None:
    """Write a PNG with every finding's ROC curve, its AUROC and interval, and its operating point.

    `operating` maps a finding to (false positive rate, true positive rate) at its validation threshold; findings
    without one get no dot.
    """

    def decorate(axes: Axes, one: FindingMetrics) -> None:
        axes.plot([0, 1], [0, 1], color=_CHANCE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
        _note(axes, f"AUROC {_value(one.auroc)}\n{one.positives:,} positives", corner="lower right")

    labels = "False positive rate (1 - specificity)", "True positive rate (sensitivity)"
    mean = f"Mean AUROC {_value(metrics.mean_auroc)}"
    key = [mean, "Dashed: chance", "Grey: the other findings"]
    _panels(path, scores, metrics, operating, roc_curve, decorate, labels, key, title)


def plot_pr(path: str | Path, scores: ScoreTable, metrics: Metrics, operating: Points, *, title: str) -> None:
    """Write a PNG with every finding's precision-recall curve, its average precision, and its operating point.

    `operating` maps a finding to (recall, precision); the dashed line is the prevalence, which chance would give.
    """

    def decorate(axes: Axes, one: FindingMetrics) -> None:
        prevalence = one.positives / (one.positives + one.negatives)
        axes.axhline(prevalence, color=_CHANCE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
        _note(axes, f"AP {_value(one.average_precision)}\nprevalence {prevalence:.3f}", corner="upper right")

    mean = f"Mean AP {_value(metrics.mean_average_precision)}"
    key = [mean, "Dashed: chance (prevalence)", "Grey: the other findings"]
    _panels(path, scores, metrics, operating, pr_curve, decorate, ("Recall (sensitivity)", "Precision"), key, title)


def _panels(
    path: str | Path,
    scores: ScoreTable,
    metrics: Metrics,
    operating: Points,
    curve_of: Callable[..., Curve],
    decorate: Callable[[Axes, FindingMetrics], None],
    axis_labels: tuple[str, str],
    key: list[str],
    title: str,
) -> None:
    curves = {
        finding: curve_of(scores.probabilities_NK[:, k], scores.labels_NK[:, k])
        for k, finding in enumerate(scores.findings)
        if metrics.findings[finding].auroc.value is not None
    }
    context = {finding: thin(curve, _CONTEXT_POINTS) for finding, curve in curves.items()}
    num_cells = len(scores.findings) + 1  # the last cell is the key
    num_columns = 5 if num_cells > 12 else max(2, math.ceil(math.sqrt(num_cells)))
    num_rows = math.ceil(num_cells / num_columns)
    figure = Figure(figsize=(2.7 * num_columns, 2.65 * num_rows + 0.8), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    cells = list(grid.flat)
    for cell, finding in zip(cells, scores.findings, strict=False):
        _frame(cell, finding)
        if finding not in curves:
            reason = metrics.findings[finding].reason
            cell.text(0.5, 0.5, f"no curve:\n{reason}", ha="center", va="center", fontsize=10, color=_OTHER)
            continue
        for other, curve in context.items():
            if other != finding:
                cell.plot(curve.x, curve.y, color=_CONTEXT, linewidth=0.7, zorder=1)
        colour, curve = COLOURS.get(finding, _OTHER), thin(curves[finding])
        cell.plot(curve.x, curve.y, color=colour, linewidth=1.8, zorder=3)
        decorate(cell, metrics.findings[finding])
        if finding in operating:
            cell.plot(*operating[finding], "o", color=colour, markersize=6, markeredgecolor="white", zorder=4)
    for cell in cells[len(scores.findings) :]:
        cell.axis("off")
    if operating:
        key = [*key, "Dot: threshold by Youden's J,\nchosen on validation"]
    if any(one.auroc.interval for one in metrics.findings.values()):
        key = [*key, "Brackets: 95 % interval,\nresampling patients"]
    cells[len(scores.findings)].text(0.0, 0.95, "\n".join(key), va="top", fontsize=9, linespacing=1.6, color="#222222")
    figure.suptitle(f"{title}: {scores.split} split, {len(scores):,} images", fontsize=13)
    figure.supxlabel(axis_labels[0], fontsize=11)
    figure.supylabel(axis_labels[1], fontsize=11)
    figure.tight_layout(rect=(0.005, 0.005, 1, 0.995), h_pad=1.2)
    figure.savefig(path, metadata={"Software": None})


def _frame(axes: Axes, finding: str) -> None:
    axes.set_title(finding.replace("_", " "), fontsize=11)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ticks = [0.0, 0.5, 1.0]
    axes.set_xticks(ticks, ["0", "0.5", "1"], fontsize=9)
    axes.set_yticks(ticks, ["0", "0.5", "1"], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _note(axes: Axes, text: str, *, corner: str) -> None:
    y, va = (0.03, "bottom") if corner == "lower right" else (0.97, "top")
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    axes.text(0.98, y, text, ha="right", va=va, fontsize=8.5, bbox=box, transform=axes.transAxes, zorder=5)


def _value(metric: Metric) -> str:
    if metric.value is None:
        return "–"
    interval = metric.interval
    return f"{metric.value:.3f}" + (f" [{interval[0]:.3f}–{interval[1]:.3f}]" if interval else "")
