"""AUROC, average precision and their curves, with 95 % intervals from resampling patients.

A finding without positives or without negatives has no AUROC: its value is None and the reason is given. Where
scikit-learn has the same number, this is that number; own code is here for the bootstrap, which must weigh 25,596
images a thousand times.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_dist.errors import DataError
from cxr_dist.evaluate.scores import ScoreTable

__all__ = [
    "Curve",
    "Metric",
    "Metrics",
    "auroc",
    "average_precision",
    "confusion_counts",
    "measure",
    "pr_curve",
    "roc_curve",
    "thin",
    "undefined_reason",
    "weighted_metrics",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_CHUNK_CELLS = 2_000_000  # images times resamples held at once: 8 MB of weights
_LEAST_DEFINED = 0.5  # an interval from fewer resamples than this part would speak for the luckier ones only


@dataclass(frozen=True)
class Metric:
    """A value and its 95 % interval; None where undefined."""

    value: float | None
    interval: tuple[float, float] | None = None


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
    """Chance that a positive scores above a negative, ties counting half: ranks, exact in integers up to one division.

    Raises DataError if there are no positives or no negatives.
    """
    return float(_weighted(_ranked(scores, positive), None)[0][0])


def average_precision(scores: Floats, positive: Bools) -> float:
    """Sum over distinct thresholds of the gain in recall times the precision there. Raises DataError like `auroc`."""
    return float(_weighted(_ranked(scores, positive), None)[1][0])


def weighted_metrics(scores: Floats, positive: Bools, weights_NB: NDArray[np.int32]) -> tuple[Floats, Floats]:
    """AUROC and average precision, [B] each, with image i counted weights_NB[i, b] times; nan where undefined."""
    ranked = _ranked(scores, positive)
    return _weighted(ranked, (weights_NB[ranked.negatives], weights_NB[ranked.positives]))


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


def measure(table: ScoreTable, *, bootstrap: int = 0, seed: int = 0) -> Metrics:
    """Every finding's AUROC and average precision and their means, with 95 % percentile intervals over patients.

    Each of the `bootstrap` resamples draws as many patients as there are, with replacement, and takes all images of
    each. A resample in which a finding has no positive or no negative is left out of that finding's interval and of
    the mean's; if fewer than half are left, there is no interval. 0 resamples: no intervals.
    """
    reasons = {finding: undefined_reason(table.labels_NK[:, k]) for k, finding in enumerate(table.findings)}
    defined = [k for k, finding in enumerate(table.findings) if reasons[finding] is None]
    ranked = [_ranked(table.probabilities_NK[:, k], table.labels_NK[:, k]) for k in defined]
    values_K2 = np.array([[float(metric[0]) for metric in _weighted(r, None)] for r in ranked]).reshape(-1, 2)
    samples_KB2 = _resample(ranked, table.patient_ids, bootstrap, seed)

    findings: dict[str, FindingMetrics] = {}
    for k, finding in enumerate(table.findings):
        roc, pr, reason = Metric(None), Metric(None), reasons[finding]
        if reason is None:
            row = defined.index(k)
            roc, pr, reason = _with_intervals(values_K2[row], samples_KB2[row])
        positives = int(table.labels_NK[:, k].sum())
        findings[finding] = FindingMetrics(roc, pr, positives, len(table) - positives, reason)
    if not defined:
        return Metrics(findings, Metric(None), Metric(None), "no finding has both positives and negatives")
    return Metrics(findings, *_with_intervals(values_K2.mean(axis=0), samples_KB2.mean(axis=0)))


@dataclass(frozen=True)
class _Ranked:
    """One finding's images in the order that its weighted metrics need; computed once, used by every resample."""

    negatives: NDArray[np.int64]  # images, by rising score
    positives: NDArray[np.int64]  # images, by falling score
    below: NDArray[np.int64]  # per positive: negatives with a lower score
    not_above: NDArray[np.int64]  # per positive: negatives with a lower or equal score
    at_least: NDArray[np.int64]  # per positive: positives with an equal or higher score


def _require_defined(positive: Bools) -> None:
    reason = undefined_reason(positive)
    if reason:
        raise DataError(
            f"AUROC: found {reason} among {len(positive)} images, expected both classes; leave the finding out"
        )


def _ranked(scores: Floats, positive: Bools) -> _Ranked:
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, np.bool_)
    _require_defined(positive)
    negatives, positives = np.flatnonzero(~positive), np.flatnonzero(positive)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    positives = positives[np.argsort(-scores[positives], kind="stable")]
    low, high = scores[negatives], scores[positives]
    return _Ranked(
        negatives,
        positives,
        np.searchsorted(low, high, side="left"),
        np.searchsorted(low, high, side="right"),
        np.searchsorted(-high, -high, side="right"),
    )


def _weighted(ranked: _Ranked, weights: tuple[NDArray[np.int32], NDArray[np.int32]] | None) -> tuple[Floats, Floats]:
    """AUROC and average precision, [B] each, from the weights of the negatives and the positives in ranked order.

    Twice the Mann-Whitney U is the sum over positives of (negatives below + negatives not above), in integers.
    """
    if weights is None:
        weights = np.ones((len(ranked.negatives), 1), np.int32), np.ones((len(ranked.positives), 1), np.int32)
    negative_weights, positive_weights = weights
    cumulative = np.zeros((len(negative_weights) + 1, negative_weights.shape[1]), np.int32)
    np.cumsum(negative_weights, axis=0, out=cumulative[1:])
    below = cumulative[ranked.below].astype(np.int64)
    not_above = cumulative[ranked.not_above]
    num_negatives = cumulative[-1].astype(np.int64)
    true_positives = np.cumsum(positive_weights, axis=0, dtype=np.int64)[ranked.at_least - 1]
    num_positives = positive_weights.sum(axis=0, dtype=np.int64)

    twice_u = ((below + not_above) * positive_weights).sum(axis=0)
    called = true_positives + (num_negatives - below)
    gained = np.where(positive_weights > 0, positive_weights * true_positives / np.maximum(called, 1), 0.0).sum(axis=0)
    undefined = (num_positives == 0) | (num_negatives == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = np.where(undefined, np.nan, twice_u / (2 * num_positives * num_negatives))
        precision = np.where(undefined, np.nan, gained / num_positives)
    return area, precision


def _resample(ranked: list[_Ranked], patient_ids: NDArray[np.int64], bootstrap: int, seed: int) -> Floats:
    """AUROC and average precision of every finding in every resample, [K, bootstrap, 2]; nan where undefined."""
    out = np.empty((len(ranked), bootstrap, 2))
    patients, patient_of_image = np.unique(patient_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    chance = np.full(len(patients), 1 / max(len(patients), 1))
    chunk = max(1, _CHUNK_CELLS // max(len(patient_ids), 1))
    for start in range(0, bootstrap if ranked else 0, chunk):
        size = min(chunk, bootstrap - start)
        # Patients in rows: gathering and summing whole rows of resamples is several times faster than columns.
        times_drawn = np.ascontiguousarray(rng.multinomial(len(patients), chance, size=size).T.astype(np.int32))
        for k, one in enumerate(ranked):
            weights = times_drawn[patient_of_image[one.negatives]], times_drawn[patient_of_image[one.positives]]
            out[k, start : start + size, 0], out[k, start : start + size, 1] = _weighted(one, weights)
    return out


def _with_intervals(values_2: Floats, samples_B2: Floats) -> tuple[Metric, Metric, str | None]:
    """AUROC and average precision with their 95 % percentile intervals, or without and the reason."""
    roc, pr = float(values_2[0]), float(values_2[1])
    if len(samples_B2) == 0:
        return Metric(roc), Metric(pr), None
    defined = samples_B2[~np.isnan(samples_B2).any(axis=1)]
    if len(defined) < _LEAST_DEFINED * len(samples_B2):
        few = f"no interval: defined in {len(defined)} of {len(samples_B2)} patient resamples"
        return Metric(roc), Metric(pr), few
    lower, upper = np.quantile(defined, [0.025, 0.975], axis=0)
    spans = [(float(low), float(high)) for low, high in zip(lower, upper, strict=True)]
    return Metric(roc, spans[0]), Metric(pr, spans[1]), None
