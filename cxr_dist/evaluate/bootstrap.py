"""95 % intervals from resampling patients: AUROC, average precision, and counts at thresholds, all from the same draws.

A resample draws as many patients as there are, with replacement, and takes all images of each; images of one patient
are alike, so that resampling images would give intervals that are too narrow. Intervals are the 2.5 and 97.5 percentiles.

What makes it quick: all that a resample changes is how often each patient counts. Between two neighbouring scores of
positives it does not matter where the negatives lie, so that a finding is two sparse tables (images by interval of
scores and patient), made once; a resample is their product with the patients' counts. All counts are whole numbers far
below 2^53, so that float64 holds them exactly and the order of summation changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from cxr_dist.evaluate.metrics import FindingMetrics, Metric, Metrics, undefined_reason
from cxr_dist.evaluate.scores import ScoreTable

__all__ = [
    "RATES",
    "Ranked",
    "Resamples",
    "discrimination",
    "draws",
    "mean_over_findings",
    "measure",
    "rates",
    "resample",
    "with_interval",
]

Floats = NDArray[np.float64]

RATES = ("sensitivity", "specificity", "precision", "f1")
"""What is known of a finding at a threshold."""

_CHUNK = 32  # resamples at once: more fall out of the processor's cache and take three times as long
_LEAST_DEFINED = 0.5  # an interval from fewer resamples than this part would speak for the luckier ones only


@dataclass(frozen=True)
class Ranked:
    """One finding's images, counted by interval of scores and by patient: all that its AUROC and AP depend on.

    Row j is the j-th highest of the m distinct scores that positives have.
    """

    positives_MP: csr_array
    """Positives with score j."""
    negatives_MP: csr_array
    """Negatives with score j or between it and score j - 1."""
    tied_MP: csr_array
    """Negatives with exactly score j."""
    negatives_P: Floats
    """All negatives, those below the last positive too."""

    @classmethod
    def of(cls, scores: Floats, positive: NDArray[np.bool_], patient: NDArray[np.int64], num_patients: int) -> "Ranked":
        """Of images with these scores; `patient` counts from 0."""
        levels = np.unique(scores[positive])[::-1]
        row = np.searchsorted(-levels, -scores)  # the highest positive's score that is not above the image's
        inside = row < len(levels)
        tied = np.zeros(len(scores), np.bool_)
        tied[inside] = scores[inside] == levels[row[inside]]

        def table(images: NDArray[np.bool_]) -> csr_array:
            where = (row[images], patient[images])
            return csr_array((np.ones(len(where[0])), where), shape=(len(levels), num_patients))

        negative = ~positive
        counts = np.bincount(patient[negative], minlength=num_patients).astype(np.float64)
        return cls(table(positive), table(negative & inside), table(negative & tied), counts)

    def metrics(self, times_PB: Floats) -> tuple[Floats, Floats]:
        """AUROC and average precision, [B] each, with patient p counted times_PB[p, b] times; nan where undefined."""
        positives = self.positives_MP @ times_PB
        true_positives = np.cumsum(positives, axis=0)
        at_least = np.cumsum(self.negatives_MP @ times_PB, axis=0)
        above = at_least - self.tied_MP @ times_PB if self.tied_MP.nnz else at_least
        num_positives, num_negatives = positives.sum(axis=0), self.negatives_P @ times_PB
        twice_u = np.einsum("mb,mb->b", positives, 2 * num_negatives - at_least - above)
        precision = true_positives / np.maximum(true_positives + at_least, 1)
        gained = np.einsum("mb,mb->b", positives, precision)
        undefined = (num_positives == 0) | (num_negatives == 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            area = np.where(undefined, np.nan, twice_u / (2 * num_positives * num_negatives))
            return area, np.where(undefined, np.nan, gained / num_positives)


@dataclass(frozen=True)
class Resamples:
    """K findings of a table: as they are (column 0) and in each of B resamples (columns 1 to B); nan where undefined."""

    findings: tuple[str, ...]
    reasons: tuple[str | None, ...]
    """Why a finding has no AUROC in the table itself."""
    auroc: Floats
    """[K, 1 + B]"""
    average_precision: Floats
    """[K, 1 + B]"""
    positives: Floats
    """Images, [K, 1 + B]."""
    negatives: Floats
    """Images, [K, 1 + B]."""
    called: dict[str, tuple[Floats, Floats]]
    """Per rule: true and false positives at its thresholds, [K, 1 + B] each; nan for findings without a threshold."""
    no_interval: str | None = None
    """Why there are no resamples although they were asked for."""


def draws(num_patients: int, bootstrap: int, seed: int) -> Iterator[Floats]:
    """How often each patient is drawn, [P, B] for some resamples at a time, B in all; the same for equal arguments."""
    rng = np.random.default_rng(seed)
    chance = np.full(num_patients, 1 / max(num_patients, 1))
    for start in range(0, bootstrap, _CHUNK):
        times_BP = rng.multinomial(num_patients, chance, size=min(_CHUNK, bootstrap - start))
        yield np.ascontiguousarray(times_BP.T, np.float64)


def resample(
    table: ScoreTable,
    thresholds: Mapping[str, Sequence[float | None]] | None = None,
    *,
    bootstrap: int,
    seed: int,
) -> Resamples:
    """Every finding's AUROC, average precision and counts at the thresholds of each rule, in the table and in resamples.

    `thresholds` maps a rule to one threshold for each of the table's findings, None where there is none. A table of one
    patient is not resampled.
    """
    patients, patient = np.unique(table.patient_ids, return_inverse=True)
    num = bootstrap if len(patients) > 1 else 0
    thresholds = thresholds or {}
    columns = range(len(table.findings))
    labels_NK, scores_NK = table.labels_NK, table.probabilities_NK
    ranked = [Ranked.of(scores_NK[:, k], labels_NK[:, k], patient, len(patients)) for k in columns]

    def per_patient(images_NK: NDArray[np.bool_]) -> Floats:
        rows = [np.bincount(patient, weights=images_NK[:, k], minlength=len(patients)) for k in columns]
        return np.array(rows, np.float64).reshape(len(columns), len(patients))

    counted = [per_patient(labels_NK), per_patient(~labels_NK)]
    for values in thresholds.values():
        called_NK = scores_NK >= np.array([np.inf if value is None else value for value in values])
        counted += [per_patient(called_NK & labels_NK), per_patient(called_NK & ~labels_NK)]
    counts_SKP = np.stack(counted)

    areas, precisions = np.empty((2, len(columns), 1 + num))
    counts_SKB = np.empty((*counts_SKP.shape[:2], 1 + num))
    at = 0
    for times_PB in _as_is_and_drawn(len(patients), num, seed):
        chunk = slice(at, at := at + times_PB.shape[1])
        counts_SKB[:, :, chunk] = counts_SKP @ times_PB
        for k, one in enumerate(ranked):
            areas[k, chunk], precisions[k, chunk] = one.metrics(times_PB)
    called = {}
    for number, (rule, values) in enumerate(thresholds.items(), start=1):
        lacking = [k for k, value in enumerate(values) if value is None]
        counts_SKB[2 * number : 2 * number + 2, lacking] = np.nan
        called[rule] = counts_SKB[2 * number], counts_SKB[2 * number + 1]
    reasons = tuple(undefined_reason(labels_NK[:, k]) for k in columns)
    positives, negatives = counts_SKB[0], counts_SKB[1]
    alone = "no interval: all images are of one patient" if bootstrap and len(patients) == 1 else None
    return Resamples(table.findings, reasons, areas, precisions, positives, negatives, called, alone)


def rates(found: Resamples, rule: str) -> dict[str, Floats]:
    """Sensitivity, specificity, precision and F1 at a rule's thresholds, [K, 1 + B] each; nan where 0 / 0."""
    true_positives, false_positives = found.called[rule]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "sensitivity": true_positives / found.positives,
            "specificity": 1 - false_positives / found.negatives,
            "precision": true_positives / (true_positives + false_positives),
            "f1": 2 * true_positives / (true_positives + false_positives + found.positives),
        }


def with_interval(samples: Floats) -> tuple[Metric, str | None]:
    """The value (the first sample) with the 95 % percentile interval of the others, or without one and the reason.

    Samples that are nan are left out; where more than half are, there is no interval.
    """
    value, drawn = float(samples[0]), samples[1:]
    if np.isnan(value):
        return Metric(None), None
    if len(drawn) == 0:
        return Metric(value), None
    defined = drawn[~np.isnan(drawn)]
    if len(defined) < _LEAST_DEFINED * len(drawn):
        return Metric(value), f"no interval: defined in {len(defined)} of {len(drawn)} patient resamples"
    lower, upper = np.quantile(defined, [0.025, 0.975])
    return Metric(value, (float(lower), float(upper))), None


def mean_over_findings(samples: Floats) -> Floats:
    """The plain mean, [1 + B], of the findings [K, 1 + B] that the table itself defines; nan where one of them is nan."""
    defined = samples[~np.isnan(samples[:, 0])]
    return defined.mean(axis=0) if len(defined) else np.full(samples.shape[1], np.nan)


def measure(table: ScoreTable, *, bootstrap: int = 0, seed: int = 0) -> Metrics:
    """Every finding's AUROC and average precision and their means, with 95 % intervals; 0 resamples: no intervals."""
    return discrimination(resample(table, bootstrap=bootstrap, seed=seed))


def discrimination(found: Resamples) -> Metrics:
    """AUROC and average precision of what was resampled.

    A resample in which a finding has no positive or no negative is left out of that finding's interval and of the
    mean's; if fewer than half are left, there is no interval.
    """
    findings: dict[str, FindingMetrics] = {}
    for k, finding in enumerate(found.findings):
        (roc, reason), (pr, _) = with_interval(found.auroc[k]), with_interval(found.average_precision[k])
        positives, negatives = int(found.positives[k, 0]), int(found.negatives[k, 0])
        findings[finding] = FindingMetrics(
            roc, pr, positives, negatives, found.reasons[k] or reason or found.no_interval
        )
    mean_roc, reason = with_interval(mean_over_findings(found.auroc))
    mean_pr, _ = with_interval(mean_over_findings(found.average_precision))
    if mean_roc.value is None:
        reason = "no finding has both positives and negatives"
    return Metrics(findings, mean_roc, mean_pr, reason or found.no_interval)


def _as_is_and_drawn(num_patients: int, bootstrap: int, seed: int) -> Iterator[Floats]:
    yield np.ones((num_patients, 1))
    yield from draws(num_patients, bootstrap, seed)
