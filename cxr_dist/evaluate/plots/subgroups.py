"""AUROC by sex, age and view: a panel a finding, a line a group, so that a gap is seen next to its interval."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_dist.evaluate.plots.panels import CHANCE, DASHED, INK, blank, colour, grid, head, shown, ticks

__all__ = ["subgroup_figure"]

_COLUMNS = 5


def subgroup_figure(
    subgroups: Mapping[str, Any], discrimination: Mapping[str, Any], findings: list[str], *, title: str
) -> Figure:
    """AUROC and 95 % interval of every group in every finding, and of the mean; both are parts of evaluation.json."""
    groups = [(kind, name) for kind, members in subgroups.items() for name in members]
    figure, cells = grid(
        len(findings) + 1,
        title=f"Subgroups: {title}",
        key=["Dot and line: AUROC of the group, 95 % interval over patients.  Dashed: all images.  ×: undefined."],
        x_label="AUROC",
        y_label="",
        columns=_COLUMNS,
        left=1.1,
        width=1.56,
        height=0.4 + 0.19 * len(groups),
    )
    panels = {"mean": [subgroups[k][g]["mean"]["auroc"] for k, g in groups]}
    for finding in findings:
        panels[finding] = [subgroups[k][g]["findings"].get(finding, {}).get("auroc") for k, g in groups]
    low = min([0.5, *(_low(value) - 0.02 for values in panels.values() for value in values if _low(value))])
    for number, (cell, (finding, values)) in enumerate(zip(cells, panels.items(), strict=True)):
        head(cell, "Mean" if finding == "mean" else finding)
        _draw(cell, values, (discrimination.get(finding) or {}).get("auroc"), colour(finding))
        cell.set(xlim=(max(0.0, low), 1.01), ylim=(len(groups) - 0.4, -0.6))
        cell.xaxis.set_major_locator(ticks(2))
        names = [shown(name) for _, name in groups] if number % _COLUMNS == 0 else []
        cell.set_yticks(range(len(groups)), names or [""] * len(groups))
        cell.tick_params(axis="y", length=0)
        for at in range(1, len(groups)):
            if groups[at][0] != groups[at - 1][0]:
                cell.axhline(at - 0.5, color="#e2e2e2", linewidth=0.8, zorder=0)
        if not groups:
            blank(cell, "no groups")
    return figure


def _low(value: Mapping[str, Any] | None) -> float:
    """The lowest that is drawn of a value; 0 if nothing is."""
    if value is None or value["value"] is None:
        return 0.0
    return float(value["value"] if value["lower"] is None else value["lower"])


def _draw(axes: Axes, values: list[Any], overall: Mapping[str, Any] | None, tint: str) -> None:
    if overall and overall["value"] is not None:
        axes.axvline(overall["value"], color=CHANCE, linewidth=0.9, linestyle=DASHED, zorder=1)
    for y, value in enumerate(values):
        if value is None or value["value"] is None:
            axes.text(0.04, y, "×", ha="left", va="center", fontsize=8, color=INK, transform=axes.get_yaxis_transform())
            continue
        if value["lower"] is not None and value["upper"] is not None:
            axes.plot([value["lower"], value["upper"]], [y, y], color=tint, linewidth=1.4, zorder=2)
        axes.plot(value["value"], y, "o", color=tint, markersize=4.5, markeredgecolor="white", mew=0.7, zorder=3)
