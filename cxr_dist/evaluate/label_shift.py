"""A population of another prevalence, judged without its labels: how prevalent a finding is there, how sure that is, and
whether prevalence is what differs.

The test list of NIH ChestX-ray14 is sicker than train_val (pneumothorax 10.4 % against 3.1 %). If the images of each
class looked alike in both (label shift), the scores alone would tell the new prevalence: Saerens, Latinne & Decaestecker
2002. They need not look alike: who is ill enough to come again is also more visibly ill. `mixture_p` asks the scores.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, ndtri

from cxr_dist.evaluate.significance import patient_error

__all__ = ["estimate_prior", "mixture_p", "prior_interval"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ids = NDArray[np.int64]

_BISECTIONS = 60  # to 1e-18
_BINS = 6
_LEAST_PATIENTS = 10
_PREVALENCES = np.linspace(0, 1, 401)


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
) -> tuple[float, float] | None:
    """95 % interval of `estimate_prior`'s estimate over patients (the calibration being held fixed), within 0 and 1; None
    for one patient.

    The estimate is where the mean slope of the log likelihood is 0; its error is that mean's, with patients as the unit,
    over the likelihood's curvature (the sandwich of Huber 1967).
    """
    if len(np.unique(patient_ids)) < 2:
        return None
    present, absent = probabilities / prior, (1 - probabilities) / (1 - prior)
    mixed = estimate * present + (1 - estimate) * absent
    slopes = np.divide(present - absent, mixed, out=np.zeros_like(mixed), where=mixed > 0)
    curvature = float(np.mean(slopes**2))
    spread = ndtri(0.975) * patient_error(slopes, patient_ids) / curvature if curvature else 1.0
    return max(0.0, float(estimate - spread)), min(1.0, float(estimate + spread))


def mixture_p(there: Floats, positive: Bools, patients_there: Ids, here: Floats, patients_here: Ids) -> float | None:
    """Chance of scores `here` as unlike any mixture of the positives and negatives `there` as these, if they were one.

    `there` is validation, with its labels; `here` has none. Label shift says that the scores here are distributed as some
    mixture of the two classes there. The shares of images in six intervals of the scores must then fit for one prevalence:
    the least squared misfit over all prevalences, weighed by its covariance over patients, is chi-squared with four
    degrees of freedom (Hansen 1982). A small p-value: the images of a class look different here. None if the scores are
    too few to fill the intervals, or if fewer than ten patients are here or have the finding there: a tenth of such would be
    refused at a level of 0.05.
    """
    if min(len(np.unique(patients_here)), len(np.unique(patients_there[positive]))) < _LEAST_PATIENTS:
        return None
    edges = np.unique(np.quantile(np.concatenate([there, here]), np.linspace(0, 1, _BINS + 1)[1:-1]))
    if len(edges) < _BINS - 1:
        return None
    in_there, in_here = (np.eye(_BINS)[np.searchsorted(edges, p), : _BINS - 1] for p in (there, here))
    share = float(positive.mean())
    cases, others = in_there * positive[:, None] / share, in_there * ~positive[:, None] / (1 - share)
    mean_here, mean_cases, mean_others = (values.mean(axis=0) for values in (in_here, cases, others))
    deviations = np.concatenate(
        [
            positive[:, None] / share * (in_there - mean_cases),
            ~positive[:, None] / (1 - share) * (in_there - mean_others),
        ],
        axis=1,
    )
    spread_here, spread_there = (
        _covariance(in_here - mean_here, patients_here),
        _covariance(deviations, patients_there).reshape(2, _BINS - 1, 2, _BINS - 1),
    )
    parts_Q2 = np.stack([_PREVALENCES, 1 - _PREVALENCES], axis=1)
    gaps_QJ = mean_here - parts_Q2 @ np.stack([mean_cases, mean_others])
    spreads_QJJ = spread_here + np.einsum("qa,ajbk,qb->qjk", parts_Q2, spread_there, parts_Q2)
    misfits_Q = np.einsum("qj,qjk,qk->q", gaps_QJ, np.linalg.pinv(spreads_QJJ, hermitian=True), gaps_QJ)
    return float(chdtrc(_BINS - 2, misfits_Q.min()))


def _covariance(deviations_NJ: Floats, patient_ids: Ids) -> Floats:
    """Of a mean, from deviations that add up within patients."""
    _, patient = np.unique(patient_ids, return_inverse=True)
    sums = np.stack([np.bincount(patient, weights=column) for column in deviations_NJ.T])
    return sums @ sums.T / len(deviations_NJ) ** 2
