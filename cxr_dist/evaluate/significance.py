"""Tests of several findings at once, and of means over patients with several images each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

__all__ = ["ALPHA", "holm", "patient_error", "two_sided"]

ALPHA = 0.05


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Each p-value corrected for that many being looked at (Holm 1979); None stays None and counts for nothing.

    At most `ALPHA` is then the chance that any difference is called where there is none.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    out: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        out[i] = largest
    return out


def two_sided(z: float) -> float:
    """Chance of a standard normal at least as far from 0 as z."""
    return float(2 * ndtr(-abs(z)))


def patient_error(values_N: NDArray[np.float64], patient_ids: NDArray[np.int64]) -> float:
    """Standard error of the mean of values that are alike within a patient: from the patients' sums of deviations."""
    _, patient = np.unique(patient_ids, return_inverse=True)
    sums = np.bincount(patient, weights=values_N - values_N.mean())
    return float(np.sqrt(np.square(sums).sum()) / len(values_N))
