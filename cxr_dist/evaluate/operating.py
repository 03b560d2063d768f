"""What a table's scores do at operating points chosen elsewhere, and the net benefit of acting on them.

Everything is plain JSON types, None where undefined, with the reason beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_dist.evaluate.bootstrap import RATES, Resamples, mean_over_findings, rates, with_interval

__all__ = ["DECISION_THRESHOLDS", "decision_curve", "operating_point"]

DECISION_THRESHOLDS = tuple(step / 200 for step in range(1, 101))
"""Probabilities at which one might act, 0.005 to 0.5: findings are rare, and nobody waits for certainty."""


def operating_point(
    found: Resamples,
    rule: str,
    thresholds: Sequence[float | None],
    reasons: Sequence[str | None],
    *,
    label: str,
    chosen_on: str,
) -> dict[str, Any]:
    """Counts and rates with intervals of every finding at its threshold, and the plain means of the rates.

    `found` holds resamples with `rule` among their thresholds; `reasons` says why a threshold is None. A mean is over
    the findings that have the rate.
    """
    samples = rates(found, rule)
    true_positives, false_positives = found.called[rule]
    findings: dict[str, Any] = {}
    for k, finding in enumerate(found.findings):
        metrics = {name: with_interval(samples[name][k]) for name in RATES}
        counts: dict[str, int | None] = dict.fromkeys(("tp", "fp", "fn", "tn"))
        why = [reasons[k]]
        if thresholds[k] is not None:
            positives, negatives = int(found.positives[k, 0]), int(found.negatives[k, 0])
            tp, fp = int(true_positives[k, 0]), int(false_positives[k, 0])
            counts = {"tp": tp, "fp": fp, "fn": positives - tp, "tn": negatives - fp}
            why += [found.reasons[k], found.no_interval, None if tp + fp else "nothing is called present: no precision"]
            why += [reason for _, reason in metrics.values()]
        values = {name: metric.to_json() for name, (metric, _) in metrics.items()}
        findings[finding] = {"threshold": thresholds[k], **values, **counts, "reason": joined(why)}
    mean = {name: with_interval(mean_over_findings(samples[name]))[0].to_json() for name in RATES}
    return {"label": label, "chosen_on": chosen_on, "findings": findings, "mean": mean}


def decision_curve(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> dict[str, list[float]]:
    """Net benefit per image of acting on probability >= t, and of acting on all images, for each t (Vickers & Elkin 2006).

    Net benefit is TP / N - FP / N * t / (1 - t): who acts at t deems a missed case (1 - t) / t times as bad as an action
    in vain. Acting on none has 0.
    """
    t = np.array(DECISION_THRESHOLDS)
    num = len(positive)
    cases, others = np.sort(probabilities[positive]), np.sort(probabilities[~positive])
    true_positives = len(cases) - np.searchsorted(cases, t, side="left")
    false_positives = len(others) - np.searchsorted(others, t, side="left")
    odds = t / (1 - t)
    model = (true_positives - false_positives * odds) / num
    everyone = (len(cases) - len(others) * odds) / num
    return {"thresholds": t.tolist(), "model": model.tolist(), "all": everyone.tolist()}


def joined(reasons: Sequence[str | None]) -> str | None:
    """The different reasons, or None if there is none."""
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or None
