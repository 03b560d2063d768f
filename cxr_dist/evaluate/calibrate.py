"""Calibration, fitted on validation and nowhere else: Platt scaling (Platt 1999, with his smoothed targets) or isotonic
regression (Zadrozny & Elkan 2002), per finding, on the log odds."""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from cxr_dist.errors import DataError
from cxr_dist.evaluate.calibration import Calibration, FindingCalibration, clipped, log_odds
from cxr_dist.evaluate.metrics import undefined_reason
from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["calibrated", "fit_calibration", "table_log_odds"]

Floats = NDArray[np.float64]

_STEPS = 100


def fit_calibration(validation: ScoreTable, method: Literal["platt", "isotonic"] = "platt") -> Calibration:
    """The calibration of every finding of a validation table. DataError for another split.

    A finding keeps its probabilities as they are, and says why, if validation has no positives or no negatives of it, if
    all its scores are equal, or if higher scores do not mean more positives there (a calibration never turns a ranking
    round).
    """
    if validation.split != "validation":
        raise DataError(f"calibration: found scores of split {validation.split!r}, expected validation; never test")
    x_NK = table_log_odds(validation)
    fit = _platt if method == "platt" else _isotonic
    findings: dict[str, FindingCalibration] = {}
    for k, finding in enumerate(validation.findings):
        x, positive = x_NK[:, k], validation.labels_NK[:, k]
        reason = undefined_reason(positive)
        if reason is None and x.min() == x.max():
            reason = "all scores are equal"
        one = None if reason else fit(x, positive)
        if one is None:
            reason = f"not calibrated: {reason or 'higher scores do not mean more positives'} on validation"
            findings[finding] = FindingCalibration(kind="identity", reason=reason)
        else:
            findings[finding] = replace(one, prior=float(one.apply(x).mean()))
    patients = len(np.unique(validation.patient_ids))
    fitted_on = f"validation split, {len(validation):,} images of {patients:,} patients"
    return Calibration(method=method, fitted_on=fitted_on, findings=findings)


def calibrated(table: ScoreTable, calibration: Calibration) -> ScoreTable:
    """The table with calibrated probabilities (and no logits); DataError if the calibration is of other findings."""
    if tuple(calibration.findings) != table.findings:
        raise DataError(
            f"calibration: found one of {', '.join(calibration.findings)}, expected {', '.join(table.findings)}; fit it on "
            "the same model's validation scores"
        )
    return replace(table, probabilities_NK=calibration.apply(table_log_odds(table)), logits_NK=None)


def table_log_odds(table: ScoreTable) -> Floats:
    """What a calibration is applied to: the network's logits where a table has them, else those of its probabilities."""
    return log_odds(table.probabilities_NK) if table.logits_NK is None else clipped(table.logits_NK)


def _platt(x: Floats, positive: NDArray[np.bool_]) -> FindingCalibration | None:
    """Newton's method on the log loss of sigmoid(slope * x + intercept); None if the slope is not positive.

    Platt's targets, (positives + 1) / (positives + 2) and 1 / (negatives + 2) instead of 1 and 0, keep the slope finite
    where one score parts the classes.
    """
    positives = int(positive.sum())
    target = np.where(positive, (positives + 1) / (positives + 2), 1 / (len(x) - positives + 2))
    centre, scale = float(x.mean()), float(x.std())
    design = np.stack([(x - centre) / scale, np.ones_like(x)])

    def loss(weights: Floats) -> float:
        z = weights @ design
        return float(np.mean(np.logaddexp(0, z) - target * z))

    weights = np.array([0.0, np.log(target.mean() / (1 - target.mean()))])
    for _ in range(_STEPS):
        p = expit(weights @ design)
        gradient = design @ (p - target) / len(x)
        step = np.linalg.solve((design * (p * (1 - p))) @ design.T / len(x), gradient)
        size = 1.0
        while loss(weights - size * step) > loss(weights) + 1e-16 and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.abs(step).max() < 1e-13:
            break
    slope = float(weights[0] / scale)
    if not slope > 0:
        return None
    return FindingCalibration(kind="platt", slope=slope, intercept=float(weights[1] - slope * centre))


def _isotonic(x: Floats, positive: NDArray[np.bool_]) -> FindingCalibration | None:
    """The closest rising steps, by scikit-learn; None if they are one step."""
    found = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x, positive.astype(np.float64))
    knots, values = found.X_thresholds_, found.y_thresholds_
    if values[0] == values[-1]:
        return None
    return FindingCalibration(kind="isotonic", knots=tuple(map(float, knots)), values=tuple(map(float, values)))
