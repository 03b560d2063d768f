"""Operating points: the probability from which a finding is called present, chosen on validation and nowhere else."""

from typing import TypedDict

import numpy as np

from cxr_dist.errors import DataError
from cxr_dist.evaluate.metrics import confusion_counts, undefined_reason
from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["DEFAULT_THRESHOLD", "Thresholds", "fit"]

DEFAULT_THRESHOLD = 0.5
"""Where validation defines none."""


class Thresholds(TypedDict):
    """A finding's operating points; it is called present where probability >= threshold. None: undefined."""

    youden: float | None
    f1: float | None


def fit(validation: ScoreTable) -> dict[str, Thresholds]:
    """Per finding, the threshold with the greatest Youden's J (sensitivity + specificity - 1) and the one with the best F1.

    Candidates are the scores themselves. Of equally good ones the highest is taken: the fewest images called present.
    A finding without positives or without negatives has no threshold (None). Raises DataError for any split but
    validation, so that thresholds cannot be tuned on what they are judged on.
    """
    if validation.split != "validation":
        raise DataError(f"thresholds: found scores of split {validation.split!r}, expected validation; never test")
    return {
        finding: _fit_finding(validation.probabilities_NK[:, k], validation.labels_NK[:, k])
        for k, finding in enumerate(validation.findings)
    }


def _fit_finding(scores: np.ndarray, positive: np.ndarray) -> Thresholds:
    if undefined_reason(positive):
        return {"youden": None, "f1": None}
    thresholds, tp, fp = confusion_counts(scores, positive)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    youden = tp * negatives - fp * positives  # J times positives * negatives: exact in integers, so ties are ties
    f1 = 2 * tp / (tp + fp + positives)
    return {"youden": float(thresholds[np.argmax(youden)]), "f1": float(thresholds[np.argmax(f1)])}
