"""Precision, recall and F1 of every finding and their averages: the notebooks' table, for thresholds of three origins."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.thresholds import DEFAULT_THRESHOLD, RULES, fit

__all__ = ["AVERAGES", "CHOSEN_HERE", "SWEEP", "Row", "Thresholds", "classify", "half", "own", "swept"]

AVERAGES = ("micro avg", "macro avg", "weighted avg", "samples avg")

CHOSEN_HERE = "chosen on these images"
"""The only name under which thresholds stand that have seen the labels they are judged on."""

SWEEP = np.arange(1, 100) / 100
"""Candidates of the notebooks' shared threshold."""

Bools = NDArray[np.bool_]


class Row(TypedDict):
    """A line of the report; None for a finding without positives."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The probability from which each finding is called present."""

    values: dict[str, float]
    chosen_on: str
    """What they were chosen on, for people."""


def own(scores: ScoreTable, validation: ScoreTable | None, rule: str) -> Thresholds:
    """A rule's thresholds from the model's own validation scores; 0.5 where these give none, which `chosen_on` says."""
    if validation is None:
        return Thresholds(values=half(scores).values, chosen_on=f"nothing: {DEFAULT_THRESHOLD}, no validation scores")
    fitted = fit(validation)
    found = {finding: fitted[finding][rule] if finding in fitted else None for finding in scores.findings}  # type: ignore[literal-required]
    lacking = [finding for finding, value in found.items() if value is None]
    chosen_on = f"its own validation scores, {len(validation):,} images: {RULES[rule]}"
    if scores.split == "validation":
        chosen_on += "; the very images judged here"
    if lacking:
        chosen_on += f"; {DEFAULT_THRESHOLD} for {', '.join(lacking)}, undefined there"
    values = {finding: DEFAULT_THRESHOLD if value is None else value for finding, value in found.items()}
    return Thresholds(values=values, chosen_on=chosen_on)


def half(scores: ScoreTable) -> Thresholds:
    """0.5 for every finding: what a model's outputs mean if they are taken at their word."""
    return Thresholds(values=dict.fromkeys(scores.findings, DEFAULT_THRESHOLD), chosen_on="nothing: fixed")


def swept(scores: ScoreTable) -> Thresholds | None:
    """The notebooks' shared threshold: of `SWEEP` the one whose ROC points lie closest to the corner (0, 1), by the mean
    distance over the findings, chosen with the judged labels. None where no finding has both classes.

    Of equally good ones the highest is taken.
    """
    distances = []
    for k in range(len(scores.findings)):
        positive, values = scores.labels_NK[:, k], scores.probabilities_NK[:, k]
        if positive.all() or not positive.any():
            continue
        called = [
            1 - np.searchsorted(np.sort(part), SWEEP) / len(part) for part in (values[positive], values[~positive])
        ]
        distances.append(np.hypot(1 - called[0], called[1]))
    if not distances:
        return None
    mean = np.mean(distances, axis=0)
    best = len(SWEEP) - 1 - int(np.argmin(mean[::-1]))
    return Thresholds(values=dict.fromkeys(scores.findings, float(SWEEP[best])), chosen_on=CHOSEN_HERE)


def classify(scores: ScoreTable, thresholds: Mapping[str, float]) -> dict[str, Row]:
    """scikit-learn's classification report (`zero_division=0`) of calling a finding where probability >= threshold.

    A finding without positives is a row of None and in no average. An image without findings has a recall of 0 in the
    samples average, so that it cannot reach 1 where there are such images.
    """
    called_NK = scores.probabilities_NK >= np.array([thresholds[finding] for finding in scores.findings])
    present = np.asarray(scores.labels_NK.any(axis=0))
    nothing = Row(precision=None, recall=None, f1=None, support=0)
    rows: dict[str, Row] = {}
    truth_NK, called_NK = scores.labels_NK[:, present], called_NK[:, present]
    hits, calls, support = (array.sum(axis=0) for array in (truth_NK & called_NK, called_NK, truth_NK))
    per = [_row(*counts) for counts in zip(hits.tolist(), calls.tolist(), support.tolist(), strict=True)]
    found = iter(per)
    for finding, there in zip(scores.findings, present.tolist(), strict=True):
        rows[finding] = next(found) if there else nothing
    if not per:
        return rows | dict.fromkeys(AVERAGES, nothing)
    total = int(support.sum())
    table = np.array([[row["precision"], row["recall"], row["f1"]] for row in per], np.float64)
    rows["micro avg"] = _row(int(hits.sum()), int(calls.sum()), total)
    rows["macro avg"] = _average(table.mean(axis=0), total)
    rows["weighted avg"] = _average(np.average(table, axis=0, weights=support), total)
    rows["samples avg"] = _average(_per_image(truth_NK, called_NK).mean(axis=0), total)
    return rows


def _row(hits: int, calls: int, support: int) -> Row:
    f1 = 2 * hits / (calls + support) if calls + support else 0.0
    return Row(
        precision=hits / calls if calls else 0.0, recall=hits / support if support else 0.0, f1=f1, support=support
    )


def _average(values: NDArray[np.float64], support: int) -> Row:
    precision, recall, f1 = values.tolist()
    return Row(precision=precision, recall=recall, f1=f1, support=support)


def _per_image(truth_NK: Bools, called_NK: Bools) -> NDArray[np.float64]:
    """Precision, recall and F1 of each image's calls, [N, 3]; 0 for 0 / 0."""
    hits, calls, support = (array.sum(axis=1) for array in (truth_NK & called_NK, called_NK, truth_NK))
    pairs = ((hits, calls), (hits, support), (2 * hits, calls + support))
    return np.stack([part / np.maximum(whole, 1) for part, whole in pairs], axis=1)
