"""The report of one score table: figures, tables and numbers in a directory, and the same numbers as plain JSON.

Everything is a function of the score tables, so that any model is judged by the same code; thresholds come from the
validation table only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import classification_report

from cxr_dist.evaluate.analysis import analyse, check_disjoint, resampled
from cxr_dist.evaluate.bootstrap import discrimination
from cxr_dist.evaluate.figures import pr_figure, roc_figure
from cxr_dist.evaluate.metrics import Metric, Metrics, pr_curve, roc_curve, thin
from cxr_dist.evaluate.page import FIGURES, Illustrate, write_page
from cxr_dist.evaluate.plots.panels import save
from cxr_dist.evaluate.runrecord import RunRecord
from cxr_dist.evaluate.scores import ScoreTable, write
from cxr_dist.evaluate.second_labels import SecondLabels
from cxr_dist.evaluate.thresholds import DEFAULT_THRESHOLD, fit

__all__ = ["AVERAGES", "DEFAULT_THRESHOLD", "table", "write_report"]

AVERAGES = ("micro avg", "macro avg", "weighted avg", "samples avg")
_COLUMNS = ("precision", "recall", "f1-score", "support")


def write_report(
    directory: str | Path,
    scores: ScoreTable,
    validation: ScoreTable | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    title: str = "Scores",
    rows: pa.Table | None = None,
    second: SecondLabels | None = None,
    calibration: Literal["platt", "isotonic"] = "platt",
    run: RunRecord | None = None,
    illustrate: Illustrate | None = None,
    commands: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the report of `scores` into a directory and return its numbers as plain JSON types, None where undefined.

    Files: report.html, everything on one page; evaluation.json, all that is said of the scores (`analysis`), with sex, age
    and view from `rows` (the manifest's) and another source's labels from `second` where they are given; figures, each as
    PNG and SVG; auroc.csv; classification_report.json and .md at the thresholds of Youden's J on `validation` (0.5 without
    one); thresholds.json; curves.csv, each curve thinned to at most 2,000 points that keep its ends and its shape;
    scores.parquet, and validation_scores.parquet if given; run_record.json if the `run` that the scores came from is given.
    `illustrate` gives the worst errors their pictures, `commands` make a report without a run again.

    Raises DataError if `validation` is of another split than validation, or shares images with a `scores` that is not
    that split itself.
    """
    folder = Path(directory)
    thresholds = _thresholds(scores, validation)
    found = resampled(scores, validation, bootstrap=bootstrap, seed=seed)
    metrics = discrimination(found)
    called_NK = scores.probabilities_NK >= np.array([thresholds["used"][finding] for finding in scores.findings])
    classes = _classification(scores, called_NK, metrics)
    report = _summary(scores, metrics, thresholds, classes)
    evaluation = analyse(
        scores,
        validation,
        rows=rows,
        second=second,
        bootstrap=bootstrap,
        seed=seed,
        calibration=calibration,
        found=found,
    )
    if second is not None:
        report["second_labels"] = evaluation["second_labels"]

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # which patients have what, by image
    _write_json(folder / "thresholds.json", thresholds)
    _write_json(folder / "evaluation.json", evaluation)
    _write_json(folder / "classification_report.json", classes)
    (folder / "classification_report.md").write_text(_markdown(report, classes, title), encoding="utf-8")
    _auroc_frame(metrics).to_csv(folder / "auroc.csv", index=False)
    tables = [scores] if validation is None or validation.split == scores.split else [validation, scores]
    pd.concat([_curve_frame(one) for one in tables]).to_csv(folder / "curves.csv", index=False, float_format="%.7g")
    roc_points, pr_points = _operating_points(scores, called_NK, thresholds, metrics)
    drawn = {
        "roc_curves": roc_figure(scores, evaluation["discrimination"], roc_points, title=title),
        "pr_curves": pr_figure(scores, evaluation["discrimination"], pr_points, title=title),
    }
    write(scores, folder / "scores.parquet")
    if validation is not None:
        write(validation, folder / "validation_scores.parquet")
    write_page(
        folder,
        evaluation,
        scores,
        title=title,
        thresholds=thresholds,
        pictures={name: save(figure, folder / FIGURES, name) for name, figure in drawn.items()},
        run=run,
        illustrate=illustrate,
        commands=commands,
    )
    return report


def table(report: dict[str, Any]) -> str:
    """A report's AUROC, interval, average precision and positives per finding, as text for a terminal; below it the
    AUROC by the second source of labels, where one was given."""
    width = max(len(finding) for finding in [*report["auroc"], "finding"])
    lines = [f"{'finding':<{width}}  AUROC  95 % interval     AP  95 % interval  positives"]
    for finding, value in report["auroc"].items():
        reason = report["reasons"].get(finding)
        if value is None:
            lines.append(f"{finding:<{width}}  {'-':>5}  {reason}")
            continue
        pairs = [
            f"{_number(report[name][finding]):>5}  {_span(report[f'{name}_interval'][finding]):^13}"
            for name in ("auroc", "average_precision")
        ]
        positives = report["positives"].get(finding)
        end = "" if positives is None else f"{positives:>9,}"
        lines.append(f"{finding:<{width}}  {'  '.join(pairs)}  {end}".rstrip() + (f"  ({reason})" if reason else ""))
    lines.append(
        f"{report['split']} split: {report['n_scored']:,} images of {report['n_patients']:,} patients; macro F1 "
        f"{_number(report['report']['macro_f1'])} (thresholds: {report['thresholds']['source']})"
    )
    return "\n".join([*lines, *_second_lines(report.get("second_labels"))])


def _second_lines(second: dict[str, Any] | None) -> list[str]:
    if second is None:
        return []
    lines = [f"by the labels of {second['source']} ({second['n_images_scored']:,} of its images were scored):"]
    ours = {one["theirs"]: " or ".join(one["ours"]) for one in second["mapping"]}
    for name, one in second["findings"].items():
        values = [
            f"{_number(value['value'])} {_span(None if value['lower'] is None else [value['lower'], value['upper']])}"
            for value in (one["auroc"], one["auroc_first_labels"])
        ]
        reason = f" ({one['reason']})" if one["reason"] else ""
        lines.append(
            f"  {name}, {one['positives']:,} positives: {values[0]}; by the first labels there {values[1]}{reason}"
        )
        if ours[name] != name:
            lines.append(f"    scored by the greatest of {ours[name]}")
    unmapped = [name for name, finding in ours.items() if not finding]
    return [*lines, f"  none of the scored findings is like {', '.join(unmapped)}"] if unmapped else lines


def _thresholds(scores: ScoreTable, validation: ScoreTable | None) -> dict[str, Any]:
    findings: dict[str, Any] = {}
    source = f"{DEFAULT_THRESHOLD} for every finding, for no validation scores were given"
    if validation is not None:
        findings = {**fit(validation)}
        check_disjoint(scores, validation)
        source = f"Youden's J on the validation split, {len(validation):,} images"
        if scores.split == "validation":
            source += ", which are the very images judged here"
    best = {finding: (findings.get(finding) or {}).get("youden") for finding in scores.findings}
    lacking = [finding for finding in scores.findings if best[finding] is None]
    if validation is not None and lacking:
        source += f" ({DEFAULT_THRESHOLD} for {', '.join(lacking)}: undefined there)"
    used = {finding: DEFAULT_THRESHOLD if value is None else value for finding, value in best.items()}
    rule = "present where probability >= threshold"
    return {"source": source, "rule": rule, "used": used, "findings": findings}


def _classification(scores: ScoreTable, called_NK: NDArray[np.bool_], metrics: Metrics) -> dict[str, Any]:
    """scikit-learn's report of the findings with positives; the others are rows of None and in no average."""
    present = [k for k, finding in enumerate(scores.findings) if metrics.findings[finding].positives]
    rows: dict[str, Any] = {f: {**dict.fromkeys(_COLUMNS[:3]), "support": 0} for f in scores.findings}
    rows |= {average: dict.fromkeys(_COLUMNS) for average in AVERAGES}
    if not present:
        return rows
    # One more column, left out by `labels`: scikit-learn takes a single one for a two-class problem.
    truth, called = (
        np.pad(array[:, present].astype(np.int8), ((0, 0), (0, 1))) for array in (scores.labels_NK, called_NK)
    )
    names = [scores.findings[k] for k in present]
    found = classification_report(
        truth, called, labels=range(len(names)), target_names=names, output_dict=True, zero_division=0
    )
    for name, row in found.items():
        rows[name] = {column: float(row[column]) for column in _COLUMNS[:3]} | {"support": int(row["support"])}
    return rows


def _summary(scores: ScoreTable, metrics: Metrics, thresholds: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    per = metrics.findings
    roc = {f: one.auroc for f, one in per.items()} | {"mean": metrics.mean_auroc}
    pr = {f: one.average_precision for f, one in per.items()} | {"mean": metrics.mean_average_precision}
    reasons = {f: one.reason for f, one in per.items()} | {"mean": metrics.reason}
    averages = {
        f"{average.split()[0]}_{short}": rows[average][column]
        for average in AVERAGES
        for short, column in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"))
    }
    return {
        "split": scores.split,
        "n_scored": len(scores),
        "n_patients": len(np.unique(scores.patient_ids)),
        "auroc": {f: metric.value for f, metric in roc.items()},
        "auroc_interval": {f: _list(metric) for f, metric in roc.items()},
        "average_precision": {f: metric.value for f, metric in pr.items()},
        "average_precision_interval": {f: _list(metric) for f, metric in pr.items()},
        "positives": {f: one.positives for f, one in per.items()},
        "negatives": {f: one.negatives for f, one in per.items()},
        "reasons": {f: reason for f, reason in reasons.items() if reason},
        "thresholds": thresholds,
        "report": averages,
    }


def _operating_points(
    scores: ScoreTable, called_NK: NDArray[np.bool_], thresholds: dict[str, Any], metrics: Metrics
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """(FPR, TPR) and (recall, precision) of each finding at its validation threshold, where it has one."""
    roc_points: dict[str, tuple[float, float]] = {}
    pr_points: dict[str, tuple[float, float]] = {}
    for k, finding in enumerate(scores.findings):
        one, called = metrics.findings[finding], called_NK[:, k]
        if one.auroc.value is None or (thresholds["findings"].get(finding) or {}).get("youden") is None:
            continue
        true_positives = int((called & scores.labels_NK[:, k]).sum())
        recall = true_positives / one.positives
        roc_points[finding] = ((int(called.sum()) - true_positives) / one.negatives, recall)
        if called.any():
            pr_points[finding] = (recall, true_positives / int(called.sum()))
    return roc_points, pr_points


def _auroc_frame(metrics: Metrics) -> pd.DataFrame:
    def row(
        name: str, roc: Metric, pr: Metric, positives: int | None, negatives: int | None, reason: str | None
    ) -> Any:
        roc_span, pr_span = roc.interval or (None, None), pr.interval or (None, None)
        return (name, roc.value, *roc_span, pr.value, *pr_span, positives, negatives, reason)

    rows = [
        row(finding, one.auroc, one.average_precision, one.positives, one.negatives, one.reason)
        for finding, one in metrics.findings.items()
    ]
    rows.append(row("mean", metrics.mean_auroc, metrics.mean_average_precision, None, None, metrics.reason))
    columns = ["finding", "auroc", "lower", "upper", "average_precision", "ap_lower", "ap_upper"]
    frame = pd.DataFrame(rows, columns=[*columns, "positives", "negatives", "reason"])
    return frame.astype({"positives": "Int64", "negatives": "Int64"})


def _curve_frame(scores: ScoreTable) -> pd.DataFrame:
    """Curve points of every defined finding: split, finding, kind (roc: x FPR, y TPR; pr: x recall, y precision).

    A curve begins where nothing is called present: threshold inf.
    """
    frames = [pd.DataFrame(columns=["split", "finding", "kind", "x", "y", "threshold"])]
    for k, finding in enumerate(scores.findings):
        labels = scores.labels_NK[:, k]
        if labels.all() or not labels.any():
            continue
        for kind, curve_of in (("roc", roc_curve), ("pr", pr_curve)):
            curve = thin(curve_of(scores.probabilities_NK[:, k], labels))
            points = {"x": curve.x, "y": curve.y, "threshold": curve.threshold}
            frames.append(pd.DataFrame({"split": scores.split, "finding": finding, "kind": kind, **points}))
    return pd.concat(frames[1:]) if len(frames) > 1 else frames[0]


def _markdown(report: dict[str, Any], rows: dict[str, Any], title: str) -> str:
    used = report["thresholds"]["used"]
    lines = [
        f"# {title}",
        "",
        f"{report['split']} split: {report['n_scored']:,} images of {report['n_patients']:,} patients.",
        f"Thresholds: {report['thresholds']['source']}; a finding is {report['thresholds']['rule']}.",
        "",
        "| finding | threshold | precision | recall | F1 | support |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        threshold = _number(used[name], 4) if name in used else ""
        cells = [_number(row[column], 4) for column in _COLUMNS[:3]]
        support = "-" if row["support"] is None else f"{row['support']:,}"
        lines.append(f"| {name} | {threshold} | {' | '.join(cells)} | {support} |")
    empty = [name for name in used if not rows[name]["support"]]
    if empty:
        lines += ["", f"-: no positives, and in no average: {', '.join(empty)}."]
    return "\n".join(lines) + "\n"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _list(metric: Metric) -> list[float] | None:
    return None if metric.interval is None else list(metric.interval)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _span(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} - {interval[1]:.3f}"
