"""Everything that is said of a score table, as the plain JSON of evaluation.json ("cxr-dist/evaluation/1").

A pure function of score tables. Thresholds and calibration are fitted on validation; what looks at the judged labels
otherwise than to judge is called `oracle`. docs/evaluation.md describes the layout and what each label means.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cxr_dist.errors import DataError
from cxr_dist.evaluate.bootstrap import Resamples, discrimination, resample
from cxr_dist.evaluate.calibration_kinds import NO_VALIDATION, calibration_section
from cxr_dist.evaluate.operating import operating_point
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.second_labels import SecondLabels, second_opinion
from cxr_dist.evaluate.subgroups import no_finding, rows_of, subgroups
from cxr_dist.evaluate.thresholds import DEFAULT_THRESHOLD, RULES, fit

__all__ = ["FORMAT", "HALF", "analyse", "check_disjoint", "resampled"]

FORMAT = "cxr-dist/evaluation/1"

HALF = "half"
"""The rule of those who choose no threshold: 0.5 for every finding."""


def analyse(
    scores: ScoreTable,
    validation: ScoreTable | None,
    *,
    rows: pa.Table | None = None,
    second: SecondLabels | None = None,
    bootstrap: int,
    seed: int,
    calibration: Literal["platt", "isotonic"] = "platt",
    found: Resamples | None = None,
) -> dict[str, Any]:
    """What evaluation.json holds.

    `rows` are the manifest's (or `nih.read_labels`'), for sex, age and view; `second` another source's labels; `found`
    what `resampled` gave for the same arguments, if it has been called. DataError if `validation` is of another split, or
    shares images with a `scores` that is not that split itself.
    """
    points = _points(scores, validation)
    found = found or resampled(scores, validation, bootstrap=bootstrap, seed=seed)
    youden = points["youden"]
    mine = None if rows is None else rows_of(scores, rows)
    return {
        "format": FORMAT,
        "split": scores.split,
        "n_images": len(scores),
        "n_patients": len(np.unique(scores.patient_ids)),
        "findings": list(scores.findings),
        "bootstrap": {"resamples": bootstrap, "seed": seed, "unit": "patient", "level": 0.95},
        "validation": _described(scores, validation),
        "discrimination": _discrimination(found),
        "operating_points": _operating_points(scores, validation, points, found),
        **calibration_section(scores, validation, method=calibration, chosen_on=_chosen_on(scores, validation)),
        "subgroups": {} if mine is None else subgroups(scores, mine, youden, bootstrap=bootstrap, seed=seed),
        "no_finding": no_finding(scores, mine, youden, bootstrap=bootstrap, seed=seed),
        "second_labels": None if second is None else second_opinion(scores, second, bootstrap=bootstrap, seed=seed),
    }


def resampled(scores: ScoreTable, validation: ScoreTable | None, *, bootstrap: int, seed: int) -> Resamples:
    """The resamples behind discrimination and operating points."""
    return resample(scores, _points(scores, validation), bootstrap=bootstrap, seed=seed)


def check_disjoint(scores: ScoreTable, validation: ScoreTable | None) -> None:
    """DataError if thresholds and calibration would be judged on images that they were fitted on, unless `scores` is the
    validation split itself."""
    if validation is None or scores.split == "validation":
        return
    shared = np.intersect1d(scores.image_ids, validation.image_ids)
    if len(shared):
        raise DataError(
            f"thresholds: {len(shared)} images are both in the {scores.split} scores and in the validation scores "
            f"(first {shared[0]}); expected disjoint tables, thresholds must not see what they are judged on"
        )


def _points(scores: ScoreTable, validation: ScoreTable | None) -> dict[str, list[float | None]]:
    """Rule → a threshold for each finding of `scores`."""
    fitted: dict[str, Any] = {} if validation is None else {**fit(validation)}
    check_disjoint(scores, validation)
    points: dict[str, list[float | None]] = {
        rule: [(fitted.get(finding) or {}).get(rule) for finding in scores.findings] for rule in RULES
    }
    return points | {HALF: [DEFAULT_THRESHOLD] * len(scores.findings)}


def _described(scores: ScoreTable, validation: ScoreTable | None) -> dict[str, Any] | None:
    if validation is None:
        return None
    patients = np.unique(validation.patient_ids)
    return {
        "n_images": len(validation),
        "n_patients": len(patients),
        "patients_shared": len(np.intersect1d(patients, scores.patient_ids)),
        "is_judged": scores.split == "validation",
    }


def _chosen_on(scores: ScoreTable, validation: ScoreTable | None) -> str:
    if validation is None:
        return f"nothing: {NO_VALIDATION}"
    seen = ", which are the very images judged here" if scores.split == "validation" else ""
    return f"validation split, {len(validation):,} images{seen}"


def _discrimination(found: Resamples) -> dict[str, Any]:
    metrics = discrimination(found)
    out: dict[str, Any] = {
        finding: {
            "auroc": one.auroc.to_json(),
            "average_precision": one.average_precision.to_json(),
            "positives": one.positives,
            "negatives": one.negatives,
            "reason": one.reason,
        }
        for finding, one in metrics.findings.items()
    }
    means = {"auroc": metrics.mean_auroc.to_json(), "average_precision": metrics.mean_average_precision.to_json()}
    return out | {"mean": {**means, "positives": None, "negatives": None, "reason": metrics.reason}}


def _operating_points(
    scores: ScoreTable, validation: ScoreTable | None, points: dict[str, list[float | None]], found: Resamples
) -> dict[str, Any]:
    chosen_on = _chosen_on(scores, validation)
    out: dict[str, Any] = {}
    for rule, label in RULES.items():
        reasons = [_undefined(validation, finding) for finding in scores.findings]
        why = [None if t is not None else reason for t, reason in zip(points[rule], reasons, strict=True)]
        out[rule] = operating_point(found, rule, points[rule], why, label=label, chosen_on=chosen_on)
    label = f"{DEFAULT_THRESHOLD} for every finding"
    nothing: Sequence[str | None] = [None] * len(scores.findings)
    return out | {HALF: operating_point(found, HALF, points[HALF], nothing, label=label, chosen_on="nothing: fixed")}


def _undefined(validation: ScoreTable | None, finding: str) -> str:
    """Why a rule has no threshold for a finding."""
    if validation is None:
        return f"no threshold: {NO_VALIDATION}"
    if finding not in validation.findings:
        return "no threshold: not in the validation scores"
    positive = validation.labels_NK[:, validation.findings.index(finding)]
    if not positive.any() or positive.all():
        return f"no threshold: no {'negatives' if positive.any() else 'positives'} on validation"
    return "no threshold: no score on validation reaches the rate"
