"""Whether one model is better than another on the same images: differences of AUROC and AP, with patients resampled.

Both models are judged on the same draws of patients, so that what makes a draw hard or easy cancels. The paired
bootstrap decides, Holm-corrected over the findings; DeLong's test is given beside it.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_dist.data.texts import shown
from cxr_dist.errors import DataError
from cxr_dist.evaluate.bootstrap import mean_over_findings, resample, with_interval
from cxr_dist.evaluate.delong import LABEL, delong
from cxr_dist.evaluate.metrics import Metric
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.significance import ALPHA, holm

__all__ = ["FORMAT", "Comparison", "Difference", "align", "compare", "least_resamples"]

FORMAT = "cxr-dist/comparison/1"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One number of two models, and its difference a - b; None where undefined, with the reason."""

    a: Metric
    b: Metric
    difference: Metric
    p: float | None = None
    """Two-sided, from the part of draws on either side of 0: (1 + count) / (1 + draws), doubled."""
    p_holm: float | None = None
    """Corrected for the number of findings; that of a mean is `p`, for it is one question."""
    decision: str | None = None
    """win (a is better), loss, or tie; None where nothing can be decided."""
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        metrics = {name: getattr(self, name).to_json() for name in ("a", "b", "difference")}
        return metrics | {"p": self.p, "p_holm": self.p_holm, "decision": self.decision, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same images."""

    split: str
    num_images: int
    num_patients: int
    bootstrap: int
    seed: int
    auroc: dict[str, Difference]
    """Per finding, and `mean`."""
    average_precision: dict[str, Difference]
    """Per finding, and `mean`."""
    delong: dict[str, dict[str, Any] | None]
    """Per finding: AUROCs, difference, interval, z, p and p_holm; None where a class has fewer than two images."""

    def counts(self, metric: str = "auroc") -> dict[str, int]:
        """Findings on which a wins, loses and ties by the corrected decision, and those undecided."""
        found = [one.decision for finding, one in getattr(self, metric).items() if finding != "mean"]
        return {name: found.count(name) for name in ("win", "loss", "tie")} | {"undecided": found.count(None)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        out: dict[str, Any] = {
            "format": FORMAT,
            "split": self.split,
            "n_images": self.num_images,
            "n_patients": self.num_patients,
            "bootstrap": {"resamples": self.bootstrap, "seed": self.seed, "unit": "patient", "level": 0.95},
            "decided_by": "paired patient bootstrap, Holm-corrected over the findings, at 0.05",
        }
        for metric in ("auroc", "average_precision"):
            out[metric] = {finding: one.to_json() for finding, one in getattr(self, metric).items()}
            out[f"{metric}_counts"] = self.counts(metric)
        return out | {"delong": {"label": LABEL, "findings": self.delong}}


def least_resamples(num_findings: int) -> int:
    """The fewest draws with which a difference can be shown after the correction: its p is at least 2 / (draws + 1)."""
    return int(np.ceil(2 * num_findings / ALPHA))


def compare(a: ScoreTable, b: ScoreTable, *, bootstrap: int, seed: int) -> Comparison:
    """Model a against model b. DataError unless both tables have the same split, findings, images, patients and labels,
    in the same order (see `align`).

    A draw in which a finding has no positive or no negative is left out for that finding and for the mean.
    """
    _check_same(a, b)
    drawn = [resample(table, bootstrap=bootstrap, seed=seed) for table in (a, b)]
    return Comparison(
        split=a.split,
        num_images=len(a),
        num_patients=len(np.unique(a.patient_ids)),
        bootstrap=bootstrap,
        seed=seed,
        auroc=_differences(a.findings, drawn[0].auroc, drawn[1].auroc, drawn[0].reasons, drawn[0].no_interval),
        average_precision=_differences(
            a.findings,
            drawn[0].average_precision,
            drawn[1].average_precision,
            drawn[0].reasons,
            drawn[0].no_interval,
        ),
        delong=_delong(a, b),
    )


def align(a: ScoreTable, b: ScoreTable) -> tuple[ScoreTable, ScoreTable]:
    """Both tables with their common findings in a's order, and b's rows in a's order.

    DataError naming images that one of them lacks, or if they have no finding in common.
    """
    findings = tuple(finding for finding in a.findings if finding in b.findings)
    if not findings:
        raise DataError(
            f"comparison: found no finding in common ({', '.join(a.findings)} and {', '.join(b.findings)}), expected at "
            "least one; compare models of the same findings"
        )
    at = pd.Index(b.image_ids.tolist()).get_indexer(pd.Index(a.image_ids.tolist()))
    missing = a.image_ids[at < 0]
    extra = np.setdiff1d(b.image_ids, a.image_ids)
    if len(missing) or len(extra):
        said = [
            f"{len(ids)} images that only the {name} has (first {shown(str(ids[0]))})"
            for name, ids in (("first", missing), ("second", extra))
            if len(ids)
        ]
        raise DataError(
            f"comparison: found {' and '.join(said)}, expected the same images in both score tables; score the missing "
            "ones, or leave the others out of both"
        )
    return a.with_findings(findings), b.with_findings(findings).select(at)


def _check_same(a: ScoreTable, b: ScoreTable) -> None:
    if a.split != b.split:
        raise DataError(f"comparison: found scores of the splits {a.split} and {b.split}, expected one split")
    if a.findings != b.findings:
        raise DataError(
            f"comparison: found the findings {', '.join(a.findings)} and {', '.join(b.findings)}, expected the same in the "
            "same order; align the tables first"
        )
    if not np.array_equal(a.image_ids, b.image_ids):
        raise DataError(
            f"comparison: found other images, or another order, in tables of {len(a)} and {len(b)}; align the tables first"
        )
    if not np.array_equal(a.patient_ids, b.patient_ids):
        first = str(a.image_ids[np.flatnonzero(a.patient_ids != b.patient_ids)[0]])
        raise DataError(f"comparison: found another patient for {shown(first)} in each table, expected the same")
    if not np.array_equal(a.labels_NK, b.labels_NK):
        row, k = (int(index[0]) for index in np.nonzero(a.labels_NK != b.labels_NK))
        raise DataError(
            f"comparison: found {int((a.labels_NK != b.labels_NK).sum())} labels that differ (first {a.findings[k]} of "
            f"{shown(str(a.image_ids[row]))}), expected the same truth for both; join both with one label CSV"
        )


def _differences(
    findings: tuple[str, ...],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    reasons: tuple[str | None, ...],
    no_interval: str | None,
) -> dict[str, Difference]:
    ones = [_difference(a[k], b[k], reasons[k] or no_interval) for k in range(len(findings))]
    enough = a.shape[1] - 1 >= least_resamples(sum(one.p is not None for one in ones))
    out: dict[str, Difference] = {}
    for finding, one, p in zip(findings, ones, holm([one.p for one in ones]), strict=True):
        if p is not None and not enough:
            least = least_resamples(sum(other.p is not None for other in ones))
            few = f"undecided: {a.shape[1] - 1} resamples can show no difference of so many findings, {least} can"
            one = replace(one, p_holm=p, reason=few)
        elif p is not None:
            one = replace(one, p_holm=p, decision=_decision(p, one.difference))
        out[finding] = one
    mean = _difference(mean_over_findings(a), mean_over_findings(b), no_interval)
    if mean.difference.value is None:
        mean = replace(mean, reason="no finding has both positives and negatives")
    elif mean.p is not None and a.shape[1] - 1 >= least_resamples(1):
        mean = replace(mean, p_holm=mean.p, decision=_decision(mean.p, mean.difference))
    return out | {"mean": mean}


def _difference(a: NDArray[np.float64], b: NDArray[np.float64], reason: str | None) -> Difference:
    (metric_a, _), (metric_b, _), (difference, few) = (with_interval(samples) for samples in (a, b, a - b))
    p = None
    if difference.interval is not None:
        draws = (a - b)[1:]
        draws = draws[~np.isnan(draws)]
        least = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        p = min(1.0, 2 * (1 + least) / (1 + len(draws)))
    return Difference(a=metric_a, b=metric_b, difference=difference, p=p, reason=reason or few)


def _decision(p: float, difference: Metric) -> str:
    if p >= ALPHA or not difference.value:
        return "tie"
    return "win" if difference.value > 0 else "loss"


def _delong(a: ScoreTable, b: ScoreTable) -> dict[str, dict[str, Any] | None]:
    found: dict[str, dict[str, Any] | None] = {}
    for k, finding in enumerate(a.findings):
        positive = a.labels_NK[:, k]
        enough = min(int(positive.sum()), int((~positive).sum())) >= 2
        scores = a.probabilities_NK[:, k], b.probabilities_NK[:, k]
        found[finding] = delong(*scores, positive).to_json() if enough else None
    corrected = holm([None if one is None else one["p"] for one in found.values()])
    for one, p in zip(found.values(), corrected, strict=True):
        if one is not None:
            one["p_holm"] = p
    return found
