"""How good the plan's shuffle is: how often two images share a batch over 20 epochs. Writes shuffle.png, prints the table.

python docs/shuffle.py
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from cxr_dist.data.plan import EMPTY, Plan, Split

EPOCHS = 20
PAIRS = 4_000_000
SHOWN = 8_192
"""Images of the split that the figure shows; the table has a full-sized one too."""


def batch_numbers(plan: Plan) -> np.ndarray:
    """The step in which each row group is read, [epochs, row groups]; -1 where an epoch leaves it out."""
    numbers = np.full((plan.epochs, plan.train.num_full_groups), EMPTY)
    for epoch in range(plan.epochs):
        for step in range(plan.train_steps):
            numbers[epoch, plan.step(epoch * plan.steps_per_epoch + step).groups] = step
    return numbers


def shared_batches(numbers_EG: np.ndarray) -> np.ndarray:
    """Part of the pairs of images from different row groups that share a batch in 0, 1, … 20 epochs, [21]."""
    random = np.random.default_rng(0)
    groups = numbers_EG.shape[1]
    first = random.integers(0, groups, PAIRS)
    second = (first + random.integers(1, groups, PAIRS)) % groups
    counts = np.zeros(PAIRS, np.int64)
    for numbers in numbers_EG:
        counts += (numbers[first] == numbers[second]) & (numbers[first] != EMPTY)
    return np.bincount(counts, minlength=EPOCHS + 1) / PAIRS


def full_shuffle(num_rows: int, batch: int) -> np.ndarray:
    """The same distribution if every epoch were a fresh shuffle of all images, [21]."""
    steps = num_rows // batch
    chance = steps * batch / num_rows * (batch - 1) / (num_rows - 1)
    return np.array([math.comb(EPOCHS, k) * chance**k * (1 - chance) ** (EPOCHS - k) for k in range(EPOCHS + 1)])


def companions(num_rows: int, batch: int, row_group: int) -> float:
    """Different images that share a batch with one image in 20 epochs, expected."""
    chance = (batch - row_group) / (num_rows - row_group)
    return row_group - 1 + (num_rows - row_group) * (1 - (1 - chance) ** EPOCHS)


def make_plan(num_rows: int, batch: int, row_group: int) -> Plan:
    split = Split(num_rows=num_rows, row_group=row_group)
    return Plan(train=split, validation=split, seed=0, epochs=EPOCHS, global_batch=batch)


def mean(distribution: np.ndarray) -> float:
    return float((distribution * np.arange(EPOCHS + 1)).sum())


def main() -> None:
    colors = {1: "tab:green", 8: "tab:blue", 32: "tab:orange"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    panels = dict(zip((16, 512), axes, strict=True))
    print("| images | batch | row group | same group | other group: mean | 0 | 1 | 2 | 3 or more | companions |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for num_rows in (SHOWN, 86_524):
        for batch, axis in panels.items():
            expected = full_shuffle(num_rows, batch)
            report(num_rows, batch, "full shuffle", "", expected, companions(num_rows, batch, 1))
            shown = range(4 if batch == 16 else 8)
            if num_rows == SHOWN:
                axis.bar(shown, expected[: len(shown)], color="0.85", label="full shuffle")
            for row_group in (1, 8, 32):
                if row_group > batch:
                    continue
                numbers = batch_numbers(make_plan(num_rows, batch, row_group))
                found = shared_batches(numbers)
                same = f"{(numbers != EMPTY).sum(axis=0).mean():.2f}" if row_group > 1 else ""
                report(num_rows, batch, str(row_group), same, found, companions(num_rows, batch, row_group))
                if num_rows == SHOWN:
                    places = np.array(shown) + {1: -0.2, 8: 0, 32: 0.2}[row_group]
                    values = np.where(found > 0, found, np.nan)[: len(shown)]
                    axis.plot(places, values, "o", color=colors[row_group], label=f"row groups of {row_group}")
    for batch, axis in panels.items():
        axis.set(yscale="log", title=f"batch {batch}", xlabel=f"batches shared in {EPOCHS} epochs")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", frameon=False)
    axes[0].set_ylabel("part of pairs")
    axes[0].set_ylim(1e-7, 2)
    figure.suptitle(f"Two images of different row groups, {SHOWN:,} images")
    figure.savefig(Path(__file__).with_name("shuffle.png"), dpi=110)


def report(num_rows: int, batch: int, name: str, same: str, distribution: np.ndarray, met: float) -> None:
    rest = [*distribution[:3], distribution[3:].sum()]
    cells = " | ".join(f"{100 * part:.4f} %" for part in rest)
    print(f"| {num_rows:,} | {batch} | {name} | {same} | {mean(distribution):.4f} | {cells} | {met:,.0f} |")


if __name__ == "__main__":
    main()
