"""A training run over its epochs: what it learned, and what its ranks were doing meanwhile."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_dist.evaluate.plots.panels import INK, MUTED, blank, colour, grid, head, note, shown, ticks

__all__ = ["throughput_figure", "training_figure"]

History = Mapping[str, Sequence[Sequence[float]]]
"""Metric to its points, (optimizer step, value) each."""

_MOST_POINTS = 1000
_AUROC = "val/auroc/"
_LABEL_GAP = 0.055
"""Least distance of two names beside the curves, as a part of the axis."""


def training_figure(history: History, *, steps_per_epoch: int, best_epoch: int | None, title: str) -> Figure:
    """Loss, validation AUROC (mean, and every finding in its colour) and learning rate over epochs."""
    figure, (loss, mean, each, rate) = grid(
        4,
        title=f"Training: {title}",
        key=["Epochs count whole passes over the training images.  Open circle: the checkpoint that is reported."],
        x_label="Epoch",
        y_label="",
        columns=2,
        width=3.7,
        height=2.1,
        left=0.66,
        gap=(1.6, 0.7),
        own_y=True,
    )
    epochs = _epochs(history, steps_per_epoch)
    _lines(loss, epochs, {"train/loss": (MUTED, "train"), "val/loss": (INK, "validation")}, "Loss")
    _lines(mean, epochs, {"val/auroc_mean": (INK, "")}, "Validation AUROC, mean")
    best = [
        point for point in epochs.get("val/auroc_mean", []) if best_epoch is not None and _is(point, best_epoch + 1)
    ]
    if best:
        mean.plot(*best[0], "o", markersize=9, mfc="none", mec=INK, mew=1.4)
        note(
            mean,
            f"best: {best[0][1]:.3f} after epoch {best_epoch + 1 if best_epoch is not None else ''}",
            corner="lower right",
        )
    findings = {name: (colour(name.removeprefix(_AUROC)), "") for name in epochs if name.startswith(_AUROC)}
    _lines(each, epochs, findings, "Validation AUROC, each finding")
    _names(each, {name.removeprefix(_AUROC): epochs[name][-1] for name in findings if epochs[name]})
    _lines(rate, epochs, {"train/lr": (INK, "")}, "Learning rate")
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def throughput_figure(history: History, *, steps_per_epoch: int, title: str) -> Figure:
    """Images a second, the part of the time that ranks waited for data or one another, and how many ranks there were."""
    figure, (speed, waits, ranks, read) = grid(
        4,
        title=f"Throughput: {title}",
        key=["As logged during training steps; validation and checkpoints are not in it."],
        x_label="Epoch",
        y_label="",
        columns=2,
        width=3.7,
        height=1.7,
        left=0.66,
        gap=(0.9, 0.7),
        own_y=True,
    )
    epochs = _epochs(history, steps_per_epoch)
    _lines(speed, epochs, {"train/images_per_s": (INK, "")}, "Images a second")
    percent = {
        name: [(x, 100 * y) for x, y in epochs.get(name, [])]
        for name in ("train/data_wait_fraction", "train/rank_skew_fraction")
    }
    labels = {"train/data_wait_fraction": (INK, "data"), "train/rank_skew_fraction": (MUTED, "other ranks")}
    _lines(waits, percent, labels, "Waiting, % of the time")
    _lines(ranks, epochs, {"train/world_size": (INK, "")}, "Ranks", steps=True)
    ranks.yaxis.set_major_locator(ticks(4, whole=True))
    _lines(read, epochs, {"train/read_mb": (INK, "")}, "Read from storage since the start, MiB")
    for axes in (speed, waits, ranks, read):
        axes.set_ylim(bottom=0)
    return figure


def _epochs(history: History, steps_per_epoch: int) -> dict[str, list[tuple[float, float]]]:
    """The history over epochs, thinned to what a figure can show."""
    out = {}
    for name, points in history.items():
        every = max(1, -(-len(points) // _MOST_POINTS))
        kept = [*points[::every], *([points[-1]] if points and (len(points) - 1) % every else [])]
        out[name] = [(step / steps_per_epoch, value) for step, value in kept]
    return out


def _is(point: tuple[float, float], epoch: int) -> bool:
    return abs(point[0] - epoch) < 1e-9


def _lines(
    axes: Axes,
    epochs: Mapping[str, list[tuple[float, float]]],
    lines: Mapping[str, tuple[str, str]],
    title: str,
    *,
    steps: bool = False,
) -> None:
    head(axes, title)
    axes.tick_params(labelbottom=True)
    drawn = 0
    for name, (tint, label) in lines.items():
        points = epochs.get(name) or []
        if not points:
            continue
        drawn += 1
        x, y = zip(*points, strict=True)
        style = "--" if tint == MUTED and len(lines) == 2 else "-"
        marker = "o" if len(points) <= 40 else ""
        axes.plot(
            x, y, color=tint, linestyle=style, linewidth=1.4, marker=marker, markersize=3,
            drawstyle="steps-pre" if steps else "default", label=label or None,
        )  # fmt: skip
    if not drawn:
        blank(axes, "not logged")
        axes.set(xticks=[], yticks=[])
        return
    axes.xaxis.set_major_locator(ticks(6, whole=axes.get_xlim()[1] > 1.5))
    axes.yaxis.set_major_locator(ticks(4))
    axes.grid(axis="y", color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    if any(label for _, label in lines.values()):
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best", handlelength=2.2)


def _names(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """The findings' names beside the ends of their curves, moved apart where they would lie on one another."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap, right = _LABEL_GAP * (high - low), axes.get_xlim()[1]
    below = low - gap
    places = []
    for finding, (_, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        below = max(y, below + gap)
        places.append((finding, below))
    over = max(0.0, places[-1][1] - high)
    for finding, y in places:
        axes.text(right, y - over, f" {shown(finding)}", fontsize=7, color=colour(finding), va="center", clip_on=False)
