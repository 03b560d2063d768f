"""Decision curves: whether acting on the model does more good than treating everyone, or nobody (Vickers and Elkin, 2006)."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from cxr_dist.evaluate.plots.panels import CHANCE, DASHED, MUTED, blank, colour, grid, head, ticks

__all__ = ["decision_figure"]

_BELOW = 0.25
"""How far below zero a panel reaches, as a part of its height above it: there a curve only says that it does harm."""


def decision_figure(curves: Mapping[str, Any], findings: list[str], *, title: str) -> Figure:
    """Net benefit over threshold probability; `curves` are the decision curves of evaluation.json."""
    figure, cells = grid(
        len(findings),
        title=f"Decision curves: {title}",
        key=[
            "Colour: act on the model.  Grey: act on everyone.  Dashed: on nobody (0).  Worth it where the colour is on top."
        ],
        x_label="Threshold probability: how sure one must be to act",
        y_label="Net benefit",
        own_y=True,
        gap=(0.5, 0.42),
        left=0.8,
        width=1.95,
    )
    for cell, finding in zip(cells, findings, strict=True):
        head(cell, finding)
        one = curves.get(finding) or {}
        pairs = [
            (x, model, everyone)
            for x, model, everyone in zip(
                one.get("thresholds") or [], one.get("model") or [], one.get("all") or [], strict=True
            )
            if model is not None and everyone is not None
        ]
        if not pairs:
            blank(cell, one.get("reason"))
            cell.set(xticks=[], yticks=[])
            continue
        x, model, everyone = zip(*pairs, strict=True)
        cell.axhline(0, color=CHANCE, linewidth=0.9, linestyle=DASHED, zorder=1)
        cell.plot(x, everyone, color=MUTED, linewidth=1, zorder=2)
        cell.plot(x, model, color=colour(finding), linewidth=1.8, zorder=3)
        top = max(*model, *everyone, 1e-6) * 1.08
        cell.set(xlim=(0, max(x)), ylim=(-_BELOW * top, top))
        cell.xaxis.set_major_locator(ticks(4))
        cell.yaxis.set_major_locator(ticks(3))
        cell.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure
