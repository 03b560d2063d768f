"""Calibration, fitted on validation and nowhere else; the correction for another prevalence, estimated without labels.

Platt scaling (Platt 1999, with his smoothed targets) or isotonic regression (Zadrozny & Elkan 2002), per finding, on
the log odds. The test population of NIH ChestX-ray14 is sicker than train_val (pneumothorax 10.4 % against 3.1 %), so
that what is calibrated on validation is not calibrated there: `estimate_prior` finds the prevalence under which the
calibrated probabilities are most likely, from the scores alone (Saerens, Latinne & Decaestecker 2002).
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm
from sklearn.isotonic import IsotonicRegression

from cxr_dist.errors import DataError
from cxr_dist.evaluate.calibration import Calibration, FindingCalibration, clipped, log_odds
from cxr_dist.evaluate.metrics import undefined_reason
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.significance import patient_error

__all__ = ["calibrated", "estimate_prior", "fit_calibration", "prior_interval", "table_log_odds"]

Floats = NDArray[np.float64]

_STEPS = 100
_BISECTIONS = 60  # to 1e-18


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


def estimate_prior(probabilities: Floats, prior: float) -> float:
    """The prevalence of a population from the probabilities of its images, which are calibrated for prevalence `prior`.

    It is where the EM algorithm of Saerens et al. ends. The likelihood that EM climbs is concave in the prevalence, so
    that its one maximum is found by halving instead, to 1e-15 and without EM's hundreds of rounds; 0 or 1 where the
    likelihood rises up to the bound.
    """
    present, absent = probabilities / prior, (1 - probabilities) / (1 - prior)

    def slope(target: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.mean((present - absent) / (target * present + (1 - target) * absent)))

    low, high = 0.0, 1.0
    if slope(low) <= 0:
        return low
    if slope(high) >= 0:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def prior_interval(
    probabilities: Floats, prior: float, estimate: float, patient_ids: NDArray[np.int64]
) -> tuple[float, float]:
    """95 % interval of `estimate_prior`'s estimate over patients (the calibration being held fixed), within 0 and 1.

    The estimate is where the mean slope of the log likelihood is 0; its error is that mean's, with patients as the unit,
    over the likelihood's curvature (the sandwich of Huber 1967).
    """
    present, absent = probabilities / prior, (1 - probabilities) / (1 - prior)
    mixed = estimate * present + (1 - estimate) * absent
    slopes = np.divide(present - absent, mixed, out=np.zeros_like(mixed), where=mixed > 0)
    curvature = float(np.mean(slopes**2))
    spread = norm.ppf(0.975) * patient_error(slopes, patient_ids) / curvature if curvature else 1.0
    return max(0.0, float(estimate - spread)), min(1.0, float(estimate + spread))


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
