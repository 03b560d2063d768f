"""The probabilities of a score table in five kinds, and how far each can be believed: raw; calibrated on validation; moved
to the prevalence that the scores suggest; the same where the scores bear it out; moved to the labels' own prevalence (an
oracle, no result).

An estimated prevalence is several times as uncertain as the mean probability that it corrects, and wrong where more than
prevalence differs. `prior_shift_checked` moves it only if the mean calibrated probability is not validation's (as Saerens
et al. 2002 advise to test first), and if the scores of no finding refute that they are a mixture of validation's
positives and negatives. Both tests take patients as the unit and are Holm-corrected over the findings.
"""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cxr_dist.evaluate.calibrate import calibrated, fit_calibration
from cxr_dist.evaluate.calibration import Calibration, FindingCalibration, shift_prior
from cxr_dist.evaluate.label_shift import estimate_prior, mixture_p, prior_interval
from cxr_dist.evaluate.metrics import Metric
from cxr_dist.evaluate.operating import decision_curve
from cxr_dist.evaluate.reliability import BINNING, reliability
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.significance import ALPHA, holm, patient_error, two_sided

__all__ = ["NO_VALIDATION", "calibration_for", "calibration_section"]

NO_VALIDATION = "no validation scores were given"

Method = Literal["platt", "isotonic"]
Floats = NDArray[np.float64]


def calibration_for(
    findings: tuple[str, ...], validation: ScoreTable, method: Literal["platt", "isotonic"] = "platt"
) -> Calibration:
    """The calibration of these findings, in their order; those that validation has no scores of stay as they are."""
    common = tuple(finding for finding in findings if finding in validation.findings)
    fitted = fit_calibration(validation.with_findings(common), method)
    absent = FindingCalibration(kind="identity", reason="not calibrated: not in the validation scores")
    return replace(fitted, findings={finding: fitted.findings.get(finding, absent) for finding in findings})


def calibration_section(
    scores: ScoreTable, validation: ScoreTable | None, *, method: Method = "platt", chosen_on: str
) -> dict[str, Any]:
    """The parts calibration and decision_curves of evaluation.json; without validation, raw probabilities alone.

    `chosen_on` says what the calibration was fitted on, for people.
    """
    labels = _labels(method)
    raw_NK = scores.probabilities_NK
    said: dict[str, Any] = {"method": None, "fitted_on": None, "binning": BINNING, "reason": NO_VALIDATION}
    if validation is None:
        said["kinds"] = {"raw": _kind(scores, raw_NK, labels["raw"], {})}
        return {"calibration": said, "decision_curves": _decision_curves(scores, raw_NK, labels["raw"])}
    fitted = calibration_for(scores.findings, validation, method)
    calibrated_NK = calibrated(scores, fitted).probabilities_NK
    estimated = _estimated(scores, validation, fitted)
    own = {finding: {"prior": one.prior, "reason": one.reason} for finding, one in fitted.findings.items()}
    said |= {"method": method, "fitted_on": chosen_on, "reason": None}
    said["kinds"] = {
        "raw": _kind(scores, raw_NK, labels["raw"], {}),
        "calibrated": _kind(scores, calibrated_NK, labels["calibrated"], own),
        "prior_shift": _shifted(scores, calibrated_NK, labels["prior_shift"], estimated, own),
        "prior_shift_checked": _shifted(
            scores, calibrated_NK, labels["prior_shift_checked"], estimated, own, checked=True
        ),
        "oracle": _shifted(scores, calibrated_NK, labels["oracle"], _observed(scores, fitted), own),
    }
    return {"calibration": said, "decision_curves": _decision_curves(scores, calibrated_NK, labels["calibrated"])}


def _labels(method: Method) -> dict[str, str]:
    fitted = f"{'Platt scaling' if method == 'platt' else 'isotonic regression'} fitted on validation"
    return {
        "raw": "probabilities as the model gave them",
        "calibrated": fitted,
        "prior_shift": f"{fitted}, moved to the prevalence estimated from these scores without labels (EM)",
        "prior_shift_checked": f"{fitted}, moved to that prevalence only where the scores bear out that it is what differs",
        "oracle": f"oracle: {fitted}, moved to the prevalence of these very labels (no result)",
    }


def _estimated(scores: ScoreTable, validation: ScoreTable, fitted: Calibration) -> dict[str, dict[str, Any]]:
    """Per calibrated finding: the prevalence estimated without labels, whether it is shown to be another, and why not."""
    found: dict[str, dict[str, Any]] = {}
    judged_NK = calibrated(scores, fitted).probabilities_NK
    for k, (finding, one) in enumerate(fitted.findings.items()):
        if one.prior is None or not len(scores):
            continue
        table = validation.with_findings((finding,))
        there = calibrated(table, replace(fitted, findings={finding: one})).probabilities_NK[:, 0]
        here = judged_NK[:, k]
        error = np.hypot(patient_error(here, scores.patient_ids), patient_error(there, validation.patient_ids))
        target = estimate_prior(here, one.prior)
        estimated = Metric(target, prior_interval(here, one.prior, target, scores.patient_ids))
        found[finding] = {
            "prior": target,
            "estimated": estimated.to_json(),
            "p": two_sided((here.mean() - one.prior) / error) if error > 0 else 1.0,
            "p_mixture": mixture_p(there, table.labels_NK[:, 0], table.patient_ids, here, scores.patient_ids),
        }
    notes = list(found.values())
    moved, unlike = holm([note["p"] for note in notes]), holm([note["p_mixture"] for note in notes])
    refuting = [finding for finding, p in zip(found, unlike, strict=True) if p is not None and p < ALPHA]
    for finding, p, p_mixture in zip(found, moved, unlike, strict=True):
        found[finding] |= {
            "p_holm": p,
            "p_mixture_holm": p_mixture,
            "against": _against(finding, p, p_mixture, refuting),
        }
    return found


def _against(finding: str, p: float | None, p_mixture: float | None, refuting: list[str]) -> str | None:
    """Why a prevalence is not to be moved, if anything speaks against it."""
    if p is None or p >= ALPHA:
        return f"the scores do not show another prevalence than validation's (p = {p:.2g})"
    if p_mixture is None:
        return "too few patients or different scores to see whether prevalence is what differs"
    if finding in refuting:
        return f"no prevalence makes a mixture of validation's classes of these scores (p = {p_mixture:.2g})"
    if refuting:
        return f"the scores of {refuting[0]} show that more than prevalence differs in these images"
    return None


def _observed(scores: ScoreTable, fitted: Calibration) -> dict[str, dict[str, Any]]:
    calibrated_findings = {finding for finding, one in fitted.findings.items() if one.prior is not None}
    return {
        finding: {"prior": float(scores.labels_NK[:, k].mean())}
        for k, finding in enumerate(scores.findings)
        if finding in calibrated_findings and len(scores)
    }


def _shifted(
    scores: ScoreTable,
    calibrated_NK: Floats,
    label: str,
    targets: dict[str, dict[str, Any]],
    own: dict[str, Any],
    *,
    checked: bool = False,
) -> dict[str, Any]:
    """Calibrated probabilities moved to each target; if `checked`, to those that nothing speaks against."""
    values_NK, notes = calibrated_NK.copy(), {}
    for k, finding in enumerate(scores.findings):
        note = {**own[finding], **targets.get(finding, {})}
        if checked and note.get("against"):
            note["reason"] = f"not moved: {note['against']}"
        elif finding in targets and not 0 < note["prior"] < 1:
            note["reason"] = f"not moved: a prevalence of {note['prior']:g} leaves nothing to predict"
        note["moved"] = finding in targets and not note["reason"]
        if note["moved"]:
            values_NK[:, k] = shift_prior(calibrated_NK[:, k], own[finding]["prior"], note["prior"])
        else:
            note["prior"] = own[finding]["prior"]
        notes[finding] = note
    return _kind(scores, values_NK, label, notes)


def _kind(scores: ScoreTable, probabilities_NK: Floats, label: str, notes: dict[str, Any]) -> dict[str, Any]:
    findings: dict[str, Any] = {
        finding: {
            **reliability(probabilities_NK[:, k], scores.labels_NK[:, k]),
            **(notes.get(finding) or {"prior": None, "reason": None}),
        }
        for k, finding in enumerate(scores.findings)
    }

    def mean(name: str) -> float | None:
        values = [one[name] for one in findings.values() if one[name] is not None]
        return float(np.mean(values)) if values else None

    return {"label": label, "findings": findings, "mean": {"ece": mean("ece"), "brier": mean("brier")}}


def _decision_curves(scores: ScoreTable, probabilities_NK: Floats, of: str) -> dict[str, Any]:
    """Of the findings with positives."""
    return {
        finding: decision_curve(probabilities_NK[:, k], scores.labels_NK[:, k]) | {"probabilities": of}
        for k, finding in enumerate(scores.findings)
        if scores.labels_NK[:, k].any()
    }
