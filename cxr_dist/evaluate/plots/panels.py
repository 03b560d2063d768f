"""What all figures share: colours, a grid of small panels, and saving as PNG and SVG, the same bytes every time."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["COLOURS", "Picture", "blank", "colour", "grid", "head", "note", "save", "shown", "ticks", "unit_axes"]

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
INK, MUTED, CONTEXT, CHANCE = "#222222", "#5c5c5c", "#d4d4d4", "#767676"
"""Text; less text; curves that only give context; what chance gives. No finding has one of them."""
DASHED = (0, (4, 3))
_DPI = 150


@dataclass(frozen=True)
class Picture:
    """One figure as both of its files."""

    name: str
    svg: str
    png: bytes


def colour(finding: str) -> str:
    """The finding's colour; ink for a name that is none of the fourteen."""
    return COLOURS.get(finding, INK)


def shown(name: str) -> str:
    """A name as matplotlib prints it literally: dollar signs would begin a formula."""
    return name.replace("_", " ").replace("$", r"\$")


def grid(
    num_panels: int,
    *,
    title: str,
    key: Sequence[str],
    x_label: str,
    y_label: str,
    columns: int = 4,
    width: float = 2.15,
    height: float = 2.15,
    left: float = 0.72,
    gap: tuple[float, float] = (0.22, 0.42),
    above: float = 0.34,
    own_x: bool = False,
    own_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels (sizes in inches), with a title, the lines of `key` under it, and shared axis labels.

    Tick labels stand at the left and under the last panel of a column; with `own_x`, `own_y` at every panel, for axes that differ.
    """
    columns = max(1, min(columns, num_panels))
    rows = math.ceil(num_panels / columns)
    gap_x, gap_y = gap
    top, bottom, right = 0.42 + 0.2 * len(key) + above, 0.62, 0.2
    total_x = max(left + columns * width + (columns - 1) * gap_x + right, 6.0)
    total_y = top + rows * height + (rows - 1) * gap_y + bottom
    figure = Figure(figsize=(total_x, total_y), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    cells = []
    for number in range(num_panels):
        row, column = divmod(number, columns)
        x = left + column * (width + gap_x)
        y = total_y - top - row * (height + gap_y) - height
        axes = figure.add_axes((x / total_x, y / total_y, width / total_x, height / total_y))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(CHANCE)
        axes.tick_params(
            colors=INK,
            labelsize=8.5,
            length=3,
            color=CHANCE,
            labelleft=own_y or column == 0,
            labelbottom=own_x or number + columns >= num_panels,
        )
        cells.append(axes)
    figure.text(
        0.1 / total_x, 1 - 0.1 / total_y, shown(title), ha="left", va="top", fontsize=12, weight="bold", color=INK
    )
    for line, text in enumerate(key):
        y = 1 - (0.4 + 0.2 * line) / total_y
        figure.text(0.1 / total_x, y, text, ha="left", va="top", fontsize=9, color=MUTED)
    middle = (left + (columns * (width + gap_x) - gap_x) / 2) / total_x
    figure.text(middle, 0.14 / total_y, x_label, ha="center", va="bottom", fontsize=10, color=INK)
    down = (bottom + (rows * (height + gap_y) - gap_y) / 2) / total_y
    figure.text(0.1 / total_x, down, y_label, ha="left", va="center", rotation=90, fontsize=10, color=INK)
    return figure, cells


def unit_axes(axes: Axes) -> None:
    """Both axes from 0 to 1, square."""
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])


def ticks(num: int, *, whole: bool = False) -> MaxNLocator:
    """About so many ticks at round numbers."""
    return MaxNLocator(num, steps=[1, 2, 5, 10], integer=whole)


def head(axes: Axes, finding: str, *, pad: float = 5) -> None:
    """A panel's title, in ink: the colour beneath only repeats it. `pad`: points between the two."""
    axes.set_title(shown(finding), fontsize=10, color=INK, pad=pad)


def blank(axes: Axes, reason: str | None) -> None:
    """A panel that says why it is empty."""
    text = f"undefined:\n{shown(reason or 'no values')}"
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, color=MUTED, transform=axes.transAxes)


def note(axes: Axes, text: str, *, corner: str) -> None:
    """A few words in the `lower right` or `upper right` of a panel, over whatever is drawn there."""
    y, va = (0.03, "bottom") if corner == "lower right" else (0.97, "top")
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    axes.text(0.98, y, text, ha="right", va=va, fontsize=8.5, color=INK, bbox=box, transform=axes.transAxes, zorder=5)


def save(figure: Figure, folder: Path, name: str) -> Picture:
    """Write NAME.png and NAME.svg; text stays text in the SVG, and neither holds a date or a version."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png.getvalue())
    (folder / f"{name}.svg").write_bytes(svg.getvalue())
    return Picture(name, svg.getvalue().decode(), png.getvalue())
