"""AUROC, average precision and their curves, and the form in which numbers with intervals are given.

A finding without positives or without negatives has no AUROC: its value is None and the reason is given. Where
scikit-learn has the same number, this is that number. Intervals are made in `bootstrap`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_dist.errors import DataError

__all__ = [
    "Curve",
    "FindingMetrics",
    "Metric",
    "Metrics",
    "auroc",
    "average_precision",
    "confusion_counts",
    "pr_curve",
    "roc_curve",
    "thin",
    "undefined_reason",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Metric:
    """A value and its 95 % interval; None where undefined."""

    value: float | None
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, float | None]:
        """value, lower and upper."""
        lower, upper = self.interval or (None, None)
        return {"value": self.value, "lower": lower, "upper": upper}


@dataclass(frozen=True)
class FindingMetrics:
    """One finding's numbers; `reason` says why a value or an interval is missing."""

    auroc: Metric
    average_precision: Metric
    positives: int
    negatives: int
    reason: str | None = None


@dataclass(frozen=True)
class Metrics:
    """Every finding's numbers, and their plain means over the findings that are defined."""

    findings: dict[str, FindingMetrics]
    mean_auroc: Metric
    mean_average_precision: Metric
    reason: str | None = None


@dataclass(frozen=True)
class Curve:
    """Points of a ROC (x: false positive rate, y: true positive rate) or PR curve (x: recall, y: precision).

    Point i is what calling everything >= threshold[i] positive gives; the first calls nothing: its threshold is inf.
    """

    x: Floats
    y: Floats
    threshold: Floats


def undefined_reason(positive: Bools) -> str | None:
    """Why these labels can give no AUROC, or None if they can."""
    if len(positive) == 0:
        return "no images"
    if not positive.any():
        return "no positives"
    if positive.all():
        return "no negatives"
    return None


def auroc(scores: Floats, positive: Bools) -> float:
    """Chance that a positive scores above a negative, ties counting half: exact in integers up to one division.

    Raises DataError if there are no positives or no negatives.
    """
    _require_defined(positive)
    _, tp, fp = confusion_counts(scores, positive)
    gained = np.diff(tp, prepend=0)
    above = np.append(0, fp[:-1])  # negatives that score above the positives gained here
    twice_u = int((gained * (2 * fp[-1] - fp - above)).sum())
    return twice_u / (2 * int(tp[-1]) * int(fp[-1]))


def average_precision(scores: Floats, positive: Bools) -> float:
    """Sum over distinct thresholds of the gain in recall times the precision there. Raises DataError like `auroc`."""
    _require_defined(positive)
    _, tp, fp = confusion_counts(scores, positive)
    return float((np.diff(tp, prepend=0) * (tp / (tp + fp))).sum() / tp[-1])


def confusion_counts(scores: Floats, positive: Bools) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Distinct scores, highest first, and the true and false positives of calling everything >= each one positive."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True)) if len(ranked) else np.zeros(0, np.int64)
    true_positives = np.cumsum(positive[order], dtype=np.int64)[last]
    return ranked[last], true_positives, last + 1 - true_positives


def roc_curve(scores: Floats, positive: Bools) -> Curve:
    """The ROC curve from (0, 0) to (1, 1), one point per distinct score. Raises DataError like `auroc`."""
    _require_defined(positive)
    thresholds, tp, fp = confusion_counts(scores, positive)
    return Curve(np.append(0.0, fp / fp[-1]), np.append(0.0, tp / tp[-1]), np.append(np.inf, thresholds))


def pr_curve(scores: Floats, positive: Bools) -> Curve:
    """The precision-recall curve by rising recall, one point per distinct score; it starts at (0, 1) by convention."""
    _require_defined(positive)
    thresholds, tp, fp = confusion_counts(scores, positive)
    return Curve(np.append(0.0, tp / tp[-1]), np.append(1.0, tp / (tp + fp)), np.append(np.inf, thresholds))


def thin(curve: Curve, most: int = 2000) -> Curve:
    """The same curve in at most `most` points, ends included, evenly spaced along its length rather than its index.

    What is dropped lies within the curve's length / (most - 2) of a kept point, along the curve: at 2,000 points that
    is less than a pixel of any figure.
    """
    if len(curve.x) <= most:
        return curve
    length = np.append(0.0, np.cumsum(np.abs(np.diff(curve.x)) + np.abs(np.diff(curve.y))))
    keep = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], most - 1)))
    keep = np.union1d(keep, [len(curve.x) - 1])
    return Curve(curve.x[keep], curve.y[keep], curve.threshold[keep])


def _require_defined(positive: Bools) -> None:
    reason = undefined_reason(positive)
    if reason:
        raise DataError(
            f"AUROC: found {reason} among {len(positive)} images, expected both classes; leave the finding out"
        )
