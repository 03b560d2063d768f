"""Confusion matrices of all findings at one rule's operating points."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cxr_dist.evaluate.plots.panels import INK, blank, colour, grid, head, shown

__all__ = ["confusion_figure"]

_DEEPEST = 0.6
"""Strength of the colour behind a row's whole count: text on it keeps a contrast of 4.5:1 in every colour."""


def confusion_figure(rule: Mapping[str, Any], findings: list[str], *, title: str) -> Figure:
    """Counts of a 2 × 2 table a finding, with their part of the row; `rule` is one of `chosen_rules`."""
    figure, cells = grid(
        len(findings),
        title=f"Confusion, thresholds by {rule['name']}: {title}",
        key=[f"Chosen on {rule['chosen_on']}.  Below a count: its part of the row."],
        x_label="What the model says at its threshold",
        y_label="What the label says",
        width=2.15,
        height=1.35,
    )
    for cell, finding in zip(cells, findings, strict=True):
        head(cell, finding)
        one = rule["findings"].get(finding) or {}
        cell.set(xlim=(0, 2), ylim=(2, 0))
        cell.set_xticks([0.5, 1.5], ["present", "absent"])
        cell.set_yticks([0.5, 1.5], ["present", "absent"], rotation=90, va="center")
        cell.tick_params(length=0)
        cell.spines[["left", "bottom"]].set_visible(False)
        if one.get("tp") is None:
            blank(cell, one.get("reason"))
            continue
        _draw(cell, [[one["tp"], one["fn"]], [one["fp"], one["tn"]]], colour(finding))
    return figure


def _draw(axes: Axes, rows: list[list[int]], tint: str) -> None:
    for y, row in enumerate(rows):
        total = sum(row)
        for x, count in enumerate(row):
            part = count / total if total else 0.0
            face = tuple(1 - _DEEPEST * part * (1 - channel) for channel in to_rgb(tint))
            axes.add_patch(
                Rectangle((x + 0.02, y + 0.03), 0.96, 0.94, facecolor=face, edgecolor="#e2e2e2", linewidth=0.6)
            )
            axes.text(x + 0.5, y + 0.42, f"{count:,}", ha="center", va="center", fontsize=10, color=INK)
            share = f"{100 * part:.1f} %" if total else shown("no images")
            axes.text(x + 0.5, y + 0.74, share, ha="center", va="center", fontsize=8, color=INK)
