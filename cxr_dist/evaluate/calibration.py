"""A fitted calibration: for each finding, the increasing curve from a model's log odds to calibrated probabilities.

It is what travels with a model: applying it needs numpy alone, and it is plain JSON (`to_json`, `from_json`). Fitting
is in `calibrate`. The log odds are the network's logits, or, for a model that gives probabilities only, log(p / (1 - p)).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cxr_dist.errors import DataError

__all__ = ["FORMAT", "Calibration", "FindingCalibration", "clipped", "log_odds", "shift_prior", "sigmoid"]

FORMAT = "cxr-dist/calibration/1"

_MOST = 34.5
"""Log odds beyond this are held to it: a probability of 1e-15, the least whose complement float64 still tells from 1."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FindingCalibration:
    """One finding's curve. `platt`: sigmoid(slope * x + intercept), slope > 0. `isotonic`: through (knots, values),
    linear between them, flat beyond. `identity`: sigmoid(x), where none could be fitted; `reason` says why."""

    kind: Literal["platt", "isotonic", "identity"]
    slope: float = 1.0
    intercept: float = 0.0
    knots: tuple[float, ...] = ()
    """Log odds, rising."""
    values: tuple[float, ...] = ()
    """Calibrated probability at each knot, never falling."""
    prior: float | None = None
    """Mean calibrated probability on the images it was fitted on: the prevalence that its probabilities speak of."""
    reason: str | None = None

    def apply(self, logits: NDArray[Any]) -> Floats:
        """Calibrated probabilities of log odds of any shape."""
        x = clipped(logits)
        if self.kind == "isotonic":
            return np.interp(x, self.knots, self.values)
        return sigmoid(self.slope * x + self.intercept)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The curves of K findings, in the order of the columns that they are applied to."""

    method: Literal["platt", "isotonic"]
    fitted_on: str
    """What the curves were fitted on, for people."""
    findings: dict[str, FindingCalibration]

    def apply(self, logits_NK: NDArray[Any]) -> Floats:
        """Calibrated probabilities [N, K] of logits [N, K] whose columns are `findings`; DataError for another width."""
        logits_NK = np.asarray(logits_NK)
        if logits_NK.ndim != 2 or logits_NK.shape[1] != len(self.findings):
            raise DataError(
                f"calibration: found scores of shape {logits_NK.shape}, expected (images, {len(self.findings)}); give one "
                f"column for each of {', '.join(self.findings)}"
            )
        out_NK = np.empty(logits_NK.shape)
        for k, one in enumerate(self.findings.values()):
            out_NK[:, k] = one.apply(logits_NK[:, k])
        return out_NK

    def apply_probabilities(self, probabilities_NK: NDArray[Any]) -> Floats:
        """`apply` for a model that gives probabilities only."""
        return self.apply(log_odds(probabilities_NK))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, exact: `from_json` gives back an equal calibration."""
        findings: dict[str, Any] = {}
        for name, one in self.findings.items():
            findings[name] = {"kind": one.kind, "prior": one.prior, "reason": one.reason}
            if one.kind == "platt":
                findings[name] |= {"slope": one.slope, "intercept": one.intercept}
            if one.kind == "isotonic":
                findings[name] |= {"knots": list(one.knots), "values": list(one.values)}
        return {"format": FORMAT, "method": self.method, "fitted_on": self.fitted_on, "findings": findings}

    @classmethod
    def from_json(cls, value: Any) -> "Calibration":
        """What `to_json` gave; DataError for anything else."""
        found = value.get("format", "no format mark") if isinstance(value, dict) else "no format mark"
        if found != FORMAT:
            raise DataError(f"calibration: found {found}, expected {FORMAT}; use the version that wrote it")
        try:
            findings = {str(name): _finding(one) for name, one in value["findings"].items()}
            method = value["method"]
            if method not in ("platt", "isotonic"):
                raise ValueError(f"method {method!r}")
            return cls(method=method, fitted_on=str(value["fitted_on"]), findings=findings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"calibration: cannot be read ({error}); expected what to_json wrote, fit it again"
            ) from None


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) of log odds that are within the bounds of float64."""
    return 1 / (1 + np.exp(-x))


def clipped(logits: NDArray[Any]) -> Floats:
    """Log odds as float64, held to what a probability can express; nan stays nan."""
    return np.clip(np.asarray(logits, np.float64), -_MOST, _MOST)


def log_odds(probabilities: NDArray[Any]) -> Floats:
    """log(p / (1 - p)), bounded where p is 0 or 1."""
    p = np.asarray(probabilities, np.float64)
    with np.errstate(divide="ignore"):
        return clipped(np.log(p) - np.log1p(-p))


def shift_prior(probabilities: NDArray[Any], prior: float, target: float) -> Floats:
    """Probabilities of a population of prevalence `prior`, as they would be at prevalence `target` (both inside 0 and 1).

    Bayes' rule where the images of each class look alike in both populations (Saerens et al. 2002, equation 2.4).
    """
    p = np.asarray(probabilities, np.float64)
    present, absent = p * (target / prior), (1 - p) * ((1 - target) / (1 - prior))
    return present / (present + absent)


def _finding(value: dict[str, Any]) -> FindingCalibration:
    kind, prior, reason = value["kind"], value["prior"], value["reason"]
    prior = None if prior is None else float(prior)
    if kind == "platt":
        numbers = float(value["slope"]), float(value["intercept"])
        if not (np.isfinite(numbers).all() and numbers[0] > 0):
            raise ValueError(f"slope and intercept {numbers}")
        return FindingCalibration(kind=kind, slope=numbers[0], intercept=numbers[1], prior=prior, reason=reason)
    if kind == "isotonic":
        knots, values = tuple(map(float, value["knots"])), tuple(map(float, value["values"]))
        rising = len(knots) == len(values) > 0 and (np.diff(knots) > 0).all() and (np.diff(values) >= 0).all()
        if not (rising and values[0] >= 0 and values[-1] <= 1):
            raise ValueError("knots that do not rise, or values that are no probabilities")
        return FindingCalibration(kind=kind, knots=knots, values=values, prior=prior, reason=reason)
    if kind == "identity":
        return FindingCalibration(kind=kind, prior=prior, reason=reason)
    raise ValueError(f"kind {kind!r}")
