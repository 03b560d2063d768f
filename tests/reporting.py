"""Made-up evaluations and runs in the layouts that a report is made of: every value differs, so that a page can be searched for it."""

import datetime
import itertools
from typing import Any

import numpy as np

from cxr_dist.cost import NodeTime, bill
from cxr_dist.evaluate.bootstrap import measure
from cxr_dist.evaluate.runrecord import RunRecord
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.prices import Kind, Price, Prices

RULES = {
    "youden": "Youden's J",
    "f1": "best F1",
    "corner": "closest to the corner",
    "sensitivity_90": "sensitivity 0.9",
    "specificity_90": "specificity 0.9",
}
KINDS = {
    "raw": "as the network says",
    "calibrated": "Platt, fitted on validation",
    "prior_shift": "and prior shift by EM, without labels",
    "oracle": "oracle: prevalence of the test labels",
}


def made_up_scores(findings: tuple[str, ...], *, num: int = 240, split: str = "test", seed: int = 0) -> ScoreTable:
    """Scores that know something; three images a patient, and no positive of the last finding in the test split."""
    rng = np.random.default_rng(seed)
    labels = rng.random((num, len(findings))) < 0.25
    if split == "test":
        labels[:, -1] = False
    first = {"test": 1, "validation": 100_001}[split]
    return ScoreTable(
        image_ids=np.array([f"{first + i // 3:08d}_{i % 3:03d}.png" for i in range(num)], dtype=np.str_),
        patient_ids=first + np.arange(num) // 3,
        split=split,
        findings=findings,
        probabilities_NK=np.clip(rng.normal(0.3 + 0.2 * labels, 0.15), 0, 1),
        logits_NK=None,
        labels_NK=labels,
    )


def made_up_evaluation(scores: ScoreTable) -> dict[str, Any]:
    """evaluation.json of these scores: counts and curves are theirs, intervals and what comes of fitting are invented."""
    metrics = measure(scores)
    serial = itertools.count(1)
    findings = list(scores.findings)
    defined = [f for f in findings if metrics.findings[f].auroc.value is not None]
    empty = {"value": None, "lower": None, "upper": None}

    def value(middle: float | None = None) -> dict[str, float]:
        middle = 0.5 + 0.0007 * next(serial) if middle is None else middle
        return {"value": middle, "lower": middle - 0.0213, "upper": middle + 0.0171}

    def reason(finding: str) -> str | None:
        return metrics.findings[finding].reason

    def point(finding: str, k: int, threshold: float) -> dict[str, Any]:
        if finding not in defined:
            counts = dict.fromkeys(("tp", "fp", "fn", "tn"))
            return {"threshold": None, **{m: empty for m in _RATES}, **counts, "reason": reason(finding)}
        called, truth = scores.probabilities_NK[:, k] >= threshold, scores.labels_NK[:, k]
        counts = {
            "tp": int((called & truth).sum()),
            "fp": int((called & ~truth).sum()),
            "fn": int((~called & truth).sum()),
            "tn": int((~called & ~truth).sum()),
        }
        return {"threshold": threshold, **{m: value() for m in _RATES}, **counts, "reason": None}

    discrimination = {
        f: {
            "auroc": value(one.auroc.value) if f in defined else empty,
            "average_precision": value(one.average_precision.value) if f in defined else empty,
            "positives": one.positives,
            "negatives": one.negatives,
            "reason": one.reason,
        }
        for f, one in metrics.findings.items()
    }
    discrimination["mean"] = {
        "auroc": value(metrics.mean_auroc.value),
        "average_precision": value(metrics.mean_average_precision.value),
        "positives": None,
        "negatives": None,
        "reason": None,
    }
    return {
        "format": "cxr-dist/evaluation/1",
        "split": scores.split,
        "n_images": len(scores),
        "n_patients": len(np.unique(scores.patient_ids)),
        "findings": findings,
        "bootstrap": {"resamples": 2000, "seed": 0, "unit": "patient", "level": 0.95},
        "discrimination": discrimination,
        "operating_points": {
            rule: {
                "label": label,
                "chosen_on": "validation, 240 images",
                "findings": {f: point(f, k, 0.3 + 0.031 * r + 0.003 * k) for k, f in enumerate(findings)},
                "mean": {m: value() for m in _RATES},
            }
            for r, (rule, label) in enumerate(RULES.items())
        },
        "calibration": {
            "method": "platt",
            "fitted_on": "validation, 240 images",
            "kinds": {
                kind: {
                    "label": label,
                    "findings": {f: _calibrated(scores, k, kind, reason(f)) for k, f in enumerate(findings)},
                    "mean": {"ece": 0.0007 * next(serial), "brier": 0.1 + 0.0007 * next(serial)},
                }
                for kind, label in KINDS.items()
            },
        },
        "decision_curves": {f: _decision(scores, findings.index(f)) for f in defined},
        "subgroups": {
            kind: {
                name: {
                    "n_images": 11 * next(serial),
                    "n_patients": 4 * next(serial),
                    "findings": {
                        f: {
                            "positives": next(serial) if f in defined else 0,
                            "auroc": value() if f in defined else empty,
                            "sensitivity": value() if f in defined else empty,
                            "specificity": value() if f in defined else empty,
                            "reason": reason(f),
                        }
                        for f in findings
                    },
                    "mean": {"auroc": value()},
                }
                for name in names
            }
            for kind, names in {"sex": ("F", "M"), "age": ("0-39", "40-64", "65+"), "view": ("AP", "PA")}.items()
        },
        "no_finding": {
            "n_images": 77,
            "n_patients": 31,
            "any_called": value(),
            "auroc": value(),
            "per_finding": {f: value() for f in findings},
        },
        "second_labels": {
            "source": "four radiologists",
            "mapping": [{"theirs": "nodule or mass", "ours": ["Nodule", "Mass"], "n_images": 60, "positives": 17}],
            "findings": {
                "nodule or mass": {
                    "n_images": 60,
                    "positives": 17,
                    "auroc": value(),
                    "auroc_first_labels": value(),
                    "reason": None,
                }
            },
        },
    }


_RATES = ("sensitivity", "specificity", "precision", "f1")


def _calibrated(scores: ScoreTable, k: int, kind: str, reason: str | None) -> dict[str, Any]:
    if reason:
        nothing = dict.fromkeys(("ece", "brier", "mean_probability", "observed", "prior"))
        return {**nothing, "bins": [], "reason": reason}
    shift = {"raw": 0.0, "calibrated": 0.14, "prior_shift": 0.11, "oracle": 0.12}[kind]
    p, y = np.clip(scores.probabilities_NK[:, k] - shift, 0, 1), scores.labels_NK[:, k]
    bins = []
    for low in np.arange(0, 1, 0.1):
        inside = (p >= low) & (p < low + 0.1)
        n = int(inside.sum())
        observed = float(y[inside].mean()) if n else None
        bins.append(
            {
                "mean_probability": float(p[inside].mean()) if n else None,
                "observed": observed,
                "count": n,
                "lower": max(0.0, observed - 0.4 / n**0.5) if observed is not None else None,
                "upper": min(1.0, observed + 0.4 / n**0.5) if observed is not None else None,
            }
        )
    full = [one for one in bins if one["count"]]
    return {
        "ece": sum(one["count"] * abs(one["mean_probability"] - one["observed"]) for one in full) / len(p),
        "brier": float(((p - y) ** 2).mean()),
        "mean_probability": float(p.mean()),
        "observed": float(y.mean()),
        "prior": float(y.mean()) if kind in ("prior_shift", "oracle") else None,
        "bins": bins,
        "reason": None,
    }


def _decision(scores: ScoreTable, k: int) -> dict[str, list[float]]:
    p, y = scores.probabilities_NK[:, k], scores.labels_NK[:, k]
    thresholds = np.linspace(0.01, 0.6, 30)
    odds, prevalence = thresholds / (1 - thresholds), y.mean()
    called = p[:, None] - 0.12 >= thresholds
    model = (called & y[:, None]).mean(0) - (called & ~y[:, None]).mean(0) * odds
    everyone = prevalence - (1 - prevalence) * odds
    return {"thresholds": thresholds.tolist(), "model": model.tolist(), "all": everyone.tolist()}


def made_up_cost(*, prices: bool = True) -> dict[str, Any]:
    """An hour of a CPU node and two of GPU nodes, of which the second has no price without `prices`."""
    day, source = datetime.date(2026, 11, 3), "an invented bill"
    rows = [Price(instance="head.large", market="on-demand", usd_per_hour=0.19, date=day, source=source)]
    if prices:
        rows.append(Price(instance="gpu.xlarge", market="spot", usd_per_hour=0.4321, date=day, source=source))
    gpu = Kind(instance="gpu.xlarge", market="spot")
    times = [
        NodeTime(node_id="head", kind=Kind(instance="head.large", market="on-demand"), seconds=3600.0),
        NodeTime(node_id="a", kind=gpu, seconds=2400.0),
        NodeTime(node_id="b", kind=gpu, seconds=4800.0),
    ]
    table = Prices(rows=tuple(rows), where="the table")
    return bill(times, table, attempts=2, images=54_321, gpu_utilization=0.8765).to_json()


def made_up_run(findings: tuple[str, ...], *, epochs: int = 6) -> RunRecord:
    """A run of 40 steps an epoch that went on with one rank instead of two in its third epoch."""
    rng = np.random.default_rng(1)
    steps = [10 * i for i in range(1, 4 * epochs + 1)]
    ends = [40 * e for e in range(1, epochs + 1)]

    def series(at: list[int], values: Any) -> list[list[float]]:
        return [[step, float(value)] for step, value in zip(at, values, strict=True)]

    history = {
        "train/loss": series(steps, 0.4 + 0.8 * np.exp(-np.array(steps) / 60) + 0.03 * rng.normal(size=len(steps))),
        "train/lr": series(steps, 1e-3 * (1 + np.cos(np.pi * np.array(steps) / steps[-1])) / 2),
        "train/images_per_s": series(steps, np.where(np.array(steps) > 80, 61, 118) + 3 * rng.normal(size=len(steps))),
        "train/data_wait_fraction": series(steps, 0.01 + 0.01 * rng.random(len(steps))),
        "train/rank_skew_fraction": series(steps, np.where(np.array(steps) > 80, 0, 0.03)),
        "train/world_size": series(steps, np.where(np.array(steps) > 80, 1, 2)),
        "train/read_mb": series(steps, np.array(steps) * 0.11),
        "val/loss": series(ends, 0.55 + 0.3 * np.exp(-np.arange(epochs) / 2)),
        "val/auroc_mean": series(ends, 0.8 - 0.2 * np.exp(-np.arange(epochs) / 2)),
        **{
            f"val/auroc/{f}": series(ends, 0.75 + 0.02 * k - (0.2 - 0.01 * k) * np.exp(-np.arange(epochs) / 2))
            for k, f in enumerate(findings)
        },
    }
    counts = {"train": (900, 350), "validation": (240, 80), "test": (240, 80)}
    audit: dict[str, Any] = {
        name: {
            "images": images,
            "patients": patients,
            "positives": {f: 31 + 7 * k for k, f in enumerate(findings)},
            "prevalence": {f: round((31 + 7 * k) / images, 6) for k, f in enumerate(findings)},
        }
        for name, (images, patients) in counts.items()
    }
    audit |= {
        "patients_shared": 0,
        "label_version": "v2020",
        "label_set": "nih8",
        "ages_missing": 3,
        "sha256": {"labels": "ab" * 32},
    }
    return RunRecord(
        name="nih8-first",
        run_id="0123456789abcdef",
        steps_per_epoch=40,
        history=history,
        history_missing="",
        trained={
            "epochs": epochs,
            "steps": ends[-1],
            "best_val_auroc": history["val/auroc_mean"][-1][1],
            "best_epoch": epochs - 1,
            "stopped_early": False,
            "images_per_s": 97.31,
            "data_wait_fraction": 0.0132,
            "peak_rss_mb": 1371.9,
            "read_mb": 26.4,
            "gradient_mb_per_step": 25.11,
            "samples_sha256": "5a" * 32,
            "weights_sha256": "c2" * 32,
        },
        spent={"wall_s": 913.0, "training_s": 71.2, "rank_hours": 0.0316, "node_hours": 3.0, "nodes": 3},
        cost=made_up_cost(),
        origin={
            "commit": "6098c2755aa1b2c3",
            "manifest_sha256": "d4" * 32,
            "plan_sha256": "e5" * 32,
            "dataset": "s3://bucket/nih8-224",
            "device": "CPU",
            "versions": {"python": "3.11.2", "torch": "2.9.0", "ray": "2.60.0"},
            "config": "run:\n  name: nih8-first\nmodel:\n  weights: random\n",
            "weights": "random",
        },
        audit=audit,
        left_out={"missing_images": 0, "duplicate_images": 0, "cleaned_images": 12, "quarantined": 2},
        unreadable=1,
        test_evaluation=3,
        test_evaluations=5,
    )
