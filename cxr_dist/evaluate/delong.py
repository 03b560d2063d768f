"""DeLong's test of two AUROCs on the same images, which takes every image for independent of the others.

Patients have several images, so that it claims more certainty than there is; it is given beside the paired bootstrap
over patients because readers expect it, and decides nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import rankdata

from cxr_dist.evaluate.significance import two_sided

__all__ = ["LABEL", "DeLong", "delong"]

LABEL = "DeLong's test, images independent"

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DeLong:
    """Two AUROCs, their covariance, and the test of their difference a - b."""

    auroc_a: float
    auroc_b: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    difference: float
    lower: float
    """Of the 95 % interval of the difference."""
    upper: float
    z: float | None
    """None where the difference has no variance: equal rankings."""
    p: float
    """Two-sided; where there is no variance, 1 if the AUROCs are equal and else 0."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"covariance": [list(row) for row in self.covariance]}


def delong(scores_a: Floats, scores_b: Floats, positive: NDArray[np.bool_]) -> DeLong:
    """DeLong et al. 1988 by midranks (Sun & Xu 2014): n log n. Needs two positives and two negatives at least."""
    placed = [_placements(scores, positive) for scores in (scores_a, scores_b)]
    of_positives, of_negatives = (np.stack([one[i] for one in placed]) for i in (0, 1))
    aurocs = of_positives.mean(axis=1)
    covariance = np.cov(of_positives) / of_positives.shape[1] + np.cov(of_negatives) / of_negatives.shape[1]
    difference = float(aurocs[0] - aurocs[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = float(np.sqrt(max(variance, 0.0)))
    certain = error < 1e-12  # rounding of equal rankings
    z = None if certain else difference / error
    spread = float(ndtri(0.975)) * error
    p = (1.0 if abs(difference) < 1e-12 else 0.0) if z is None else two_sided(z)
    (aa, ab), (ba, bb) = covariance.tolist()
    return DeLong(
        auroc_a=float(aurocs[0]),
        auroc_b=float(aurocs[1]),
        covariance=((aa, ab), (ba, bb)),
        difference=difference,
        lower=difference - spread,
        upper=difference + spread,
        z=z,
        p=p,
    )


def _placements(scores: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """For each positive the part of negatives below it, for each negative the part of positives above; ties count half."""
    high, low = scores[positive], scores[~positive]
    ranks = rankdata(np.concatenate([high, low]))
    below = (ranks[: len(high)] - rankdata(high)) / len(low)
    above = 1 - (ranks[len(high) :] - rankdata(low)) / len(high)
    return below, above
