"""Reliability: how often a finding is there where the model says so with a certain probability."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_dist.evaluate.plots.panels import CHANCE, DASHED, MUTED, blank, colour, grid, head, note

__all__ = ["reliability_figure"]

_KINDS = ("raw", "calibrated", "prior_shift")
"""What is drawn, from back to front: more lines than three nobody can follow. The table has the others."""

_SQUARE_ROOT = (lambda x: np.sqrt(np.maximum(x, 0)), np.square)
"""Of both axes, so that the diagonal stays one."""


def reliability_figure(calibration: Mapping[str, Any], findings: list[str], *, title: str) -> Figure:
    """Observed frequency over mean predicted probability in each bin, before and after calibration.

    `calibration` is that part of evaluation.json. Bars are the Wilson intervals of the calibrated bins.
    """
    kinds = {kind: calibration["kinds"][kind] for kind in _KINDS if kind in calibration["kinds"]}
    names = {"raw": "Grey squares: raw", "calibrated": "Colour: calibrated", "prior_shift": "Diamonds: prior shift"}
    figure, cells = grid(
        len(findings),
        title=f"Reliability: {title}",
        key=[
            ".  ".join(names[kind] for kind in kinds) + ".  Dashed: a probability that means what it says.",
            "Bars: 95 % Wilson interval of a calibrated bin.  Square-root axes: most probabilities are small.",
        ],
        x_label="Mean predicted probability of a bin",
        y_label="Part of its images that have the finding",
        own_x=True,
        own_y=True,
        gap=(0.42, 0.6),
        width=1.98,
        height=1.98,
    )
    for cell, finding in zip(cells, findings, strict=True):
        head(cell, finding)
        rows = {kind: one["findings"].get(finding) or {} for kind, one in kinds.items()}
        if not any(row.get("bins") for row in rows.values()):
            cell.set(xticks=[], yticks=[])
            blank(cell, next((row["reason"] for row in rows.values() if row.get("reason")), None))
            continue
        end = _end(rows)
        cell.set_xscale("function", functions=_SQUARE_ROOT)
        cell.set_yscale("function", functions=_SQUARE_ROOT)
        cell.set(xlim=(0, 1.02 * end), ylim=(0, 1.02 * end))
        for axis in (cell.xaxis, cell.yaxis):
            axis.set_ticks([0.0, end / 4, end], ["0", f"{end / 4:g}", f"{end:g}"])
        cell.plot([0, end], [0, end], color=CHANCE, linewidth=0.8, linestyle=DASHED, zorder=1)
        for kind, row in rows.items():
            if row.get("moved") is not False:  # where nothing was moved, the line is that of the calibrated
                _draw(cell, kind, row.get("bins") or [], colour(finding))
        before, after = (rows.get(kind, {}).get("ece") for kind in ("raw", "calibrated"))
        if before is not None and after is not None:
            note(cell, f"ECE {before:.3f} → {after:.3f}", corner="lower right")
    return figure


def _end(rows: Mapping[str, Any]) -> float:
    """Where a panel's axes end: the least round number that all points lie below."""
    points = [one for row in rows.values() for one in row.get("bins") or [] if one["count"]]
    most = max((max(one["mean_probability"], one["observed"]) for one in points), default=1.0)
    return next((end for end in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8) if most <= end), 1.0)


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
