"""Reliability: how often a finding is there where the model says so with a certain probability."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_dist.evaluate.plots.panels import CHANCE, DASHED, MUTED, blank, colour, grid, head, note, unit_axes

__all__ = ["reliability_figure"]

_KINDS = ("raw", "calibrated", "prior_shift")
"""What is drawn, from back to front: more lines than three nobody can follow. The table has the others."""


def reliability_figure(calibration: Mapping[str, Any], findings: list[str], *, title: str) -> Figure:
    """Observed frequency over mean predicted probability in each bin, before and after calibration.

    `calibration` is that part of evaluation.json. Bars are the Wilson intervals of the calibrated bins.
    """
    kinds = {kind: calibration["kinds"][kind] for kind in _KINDS if kind in calibration["kinds"]}
    names = {"raw": "Grey squares", "calibrated": "Colour", "prior_shift": "Open diamonds, dashed"}
    key = ".  ".join(f"{names[kind]}: {one['label']}" for kind, one in kinds.items())
    figure, cells = grid(
        len(findings),
        title=f"Reliability: {title}",
        key=[key + ".", "Thin diagonal: a probability that means what it says.  Bars: 95 % Wilson interval of a bin."],
        x_label="Mean predicted probability of a bin",
        y_label="Part of its images that have the finding",
    )
    for cell, finding in zip(cells, findings, strict=True):
        head(cell, finding)
        unit_axes(cell)
        rows = {kind: one["findings"].get(finding) or {} for kind, one in kinds.items()}
        if not any(row.get("bins") for row in rows.values()):
            blank(cell, next((row["reason"] for row in rows.values() if row.get("reason")), None))
            continue
        cell.plot([0, 1], [0, 1], color=CHANCE, linewidth=0.8, linestyle=DASHED, zorder=1)
        for kind, row in rows.items():
            _draw(cell, kind, row.get("bins") or [], colour(finding))
        before, after = (rows.get(kind, {}).get("ece") for kind in ("raw", "calibrated"))
        if before is not None and after is not None:
            note(cell, f"ECE {before:.3f} → {after:.3f}", corner="lower right")
    return figure


def _draw(axes: Axes, kind: str, bins: list[Mapping[str, Any]], tint: str) -> None:
    full = [one for one in bins if one["count"]]
    x, y = [one["mean_probability"] for one in full], [one["observed"] for one in full]
    if kind == "raw":
        axes.plot(x, y, "s-", color=MUTED, linewidth=0.9, markersize=3, zorder=2)
    elif kind == "prior_shift":
        axes.plot(x, y, "D", color=tint, linestyle=DASHED, linewidth=1, markersize=3.5, mfc="white", mew=0.9, zorder=4)
    else:
        bounded = [one for one in full if one["lower"] is not None and one["upper"] is not None]
        axes.vlines(
            [one["mean_probability"] for one in bounded],
            [one["lower"] for one in bounded],
            [one["upper"] for one in bounded],
            color=tint,
            linewidth=1,
            alpha=0.55,
            zorder=3,
        )
        axes.plot(x, y, "o-", color=tint, linewidth=1.5, markersize=3.5, zorder=3)
