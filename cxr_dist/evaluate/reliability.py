"""Whether probabilities mean what they say: Brier score, expected calibration error, the reliability curve.

Bins are equal in mass: their edges are quantiles of the probabilities themselves, as in scikit-learn's
`calibration_curve(strategy="quantile")`. Findings are rare, and bins of equal width would hold nearly all images in one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["BINNING", "NUM_BINS", "reliability", "wilson"]

NUM_BINS = 15
BINNING = f"{NUM_BINS} bins of equal mass (edges at quantiles of the probabilities)"

Floats = NDArray[np.float64]


def reliability(probabilities: Floats, positive: NDArray[np.bool_]) -> dict[str, Any]:
    """Brier score, ECE, mean probability against the observed part, and the bins, as plain JSON types.

    ECE is the mean over images of |mean probability - observed part| of the bin that an image is in (Naeini et al. 2015).
    Equal probabilities are in one bin; bins without images are left out. Wilson's 95 % interval of a bin's observed part
    takes its images for independent.
    """
    if len(positive) == 0:
        return {"ece": None, "brier": None, "mean_probability": None, "observed": None, "bins": []}
    edges = np.quantile(probabilities, np.linspace(0, 1, NUM_BINS + 1))
    at = np.searchsorted(edges[1:-1], probabilities)
    counts = np.bincount(at, minlength=NUM_BINS)
    summed = np.bincount(at, weights=probabilities, minlength=NUM_BINS)
    observed = np.bincount(at, weights=positive, minlength=NUM_BINS)
    bins = []
    for i in np.flatnonzero(counts):
        lower, upper = wilson(int(observed[i]), int(counts[i]))
        means = {"mean_probability": float(summed[i] / counts[i]), "observed": float(observed[i] / counts[i])}
        bins.append({**means, "count": int(counts[i]), "lower": lower, "upper": upper})
    return {
        "ece": float(np.abs(summed - observed).sum() / len(positive)),
        "brier": float(np.mean((probabilities - positive) ** 2)),
        "mean_probability": float(probabilities.mean()),
        "observed": float(positive.mean()),
        "bins": bins,
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), without continuity correction."""
    z = float(ndtri(0.975))
    part, shrink = successes / trials, 1 + z * z / trials
    centre = part + z * z / (2 * trials)
    spread = z * np.sqrt(part * (1 - part) / trials + z * z / (4 * trials * trials))
    return max(0.0, float((centre - spread) / shrink)), min(1.0, float((centre + spread) / shrink))
