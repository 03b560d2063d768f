"""Operating points: the probability from which a finding is called present, chosen on validation and nowhere else.

Five rules, each per finding: Youden's J (Youden 1950), the best F1, the ROC point closest to the corner (0, 1), and the
points that just hold a sensitivity or a specificity of 0.9.
"""

from typing import TypedDict

import numpy as np

from cxr_dist.errors import DataError
from cxr_dist.evaluate.metrics import confusion_counts, undefined_reason
from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["DEFAULT_THRESHOLD", "RULES", "Thresholds", "fit"]

DEFAULT_THRESHOLD = 0.5
"""Where validation defines none."""

RULES: dict[str, str] = {
    "youden": "greatest Youden's J (sensitivity + specificity - 1)",
    "f1": "best F1",
    "corner": "closest to the ROC corner (sensitivity 1, specificity 1)",
    "sensitivity_90": "highest threshold with a sensitivity of at least 0.9",
    "specificity_90": "lowest threshold with a specificity of at least 0.9",
}
"""What each rule chooses on the validation scores, for people."""


class Thresholds(TypedDict):
    """A finding's operating points; it is called present where probability >= threshold. None: undefined."""

    youden: float | None
    f1: float | None
    corner: float | None
    sensitivity_90: float | None
    specificity_90: float | None


def fit(validation: ScoreTable) -> dict[str, Thresholds]:
    """Per finding, the threshold that each of `RULES` chooses.

    Candidates are the scores themselves. Of equally good ones the highest is taken: the fewest images called present.
    A finding without positives or without negatives has no threshold (None), nor has `specificity_90` where even the
    highest score is shared by more than a tenth of the negatives. Raises DataError for any split but validation, so
    that thresholds cannot be tuned on what they are judged on.
    """
    if validation.split != "validation":
        raise DataError(f"thresholds: found scores of split {validation.split!r}, expected validation; never test")
    return {
        finding: _fit_finding(validation.probabilities_NK[:, k], validation.labels_NK[:, k])
        for k, finding in enumerate(validation.findings)
    }


def _fit_finding(scores: np.ndarray, positive: np.ndarray) -> Thresholds:
    if undefined_reason(positive):
        return {"youden": None, "f1": None, "corner": None, "sensitivity_90": None, "specificity_90": None}
    thresholds, tp, fp = confusion_counts(scores, positive)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    # Rates times positives * negatives are whole numbers, so that ties are ties and 0.9 is nine tenths.
    youden = tp * negatives - fp * positives
    corner = (fp * float(positives)) ** 2 + ((positives - tp) * float(negatives)) ** 2
    f1 = 2 * tp / (tp + fp + positives)
    specific = np.flatnonzero(10 * fp <= negatives)  # both counts rise as the threshold falls
    return {
        "youden": float(thresholds[np.argmax(youden)]),
        "f1": float(thresholds[np.argmax(f1)]),
        "corner": float(thresholds[np.argmin(corner)]),
        "sensitivity_90": float(thresholds[np.argmax(10 * tp >= 9 * positives)]),
        "specificity_90": float(thresholds[specific[-1]]) if len(specific) else None,
    }
