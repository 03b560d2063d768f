"""The last files of a report: its remaining figures, report.html, and the record of the run that it is about."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_dist.evaluate.html import render
from cxr_dist.evaluate.plots.confusion import confusion_figure
from cxr_dist.evaluate.plots.decision import decision_figure
from cxr_dist.evaluate.plots.panels import Picture, save
from cxr_dist.evaluate.plots.reliability import reliability_figure
from cxr_dist.evaluate.plots.subgroups import subgroup_figure
from cxr_dist.evaluate.plots.training import throughput_figure, training_figure
from cxr_dist.evaluate.rules import chosen_rules
from cxr_dist.evaluate.runrecord import FILE, RunRecord
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.worst import Example, worst_errors

__all__ = ["FIGURES", "Illustrate", "commands_of", "write_page"]

FIGURES = "figures"
"""Folder of a report's figures."""

Illustrate = Callable[[list[Example]], Sequence[Mapping[str, Any]]]
"""Gives the worst errors their pictures, as far as it can, or other examples of `Example`'s keys in their place."""


def write_page(
    folder: Path,
    evaluation: Mapping[str, Any],
    scores: ScoreTable,
    *,
    title: str,
    thresholds: Mapping[str, Any],
    pictures: Mapping[str, Picture],
    run: RunRecord | None = None,
    illustrate: Illustrate | None = None,
    commands: Sequence[str] = (),
) -> None:
    """Write figures/*, report.html and, of a known run, run_record.json into a report's folder.

    `thresholds` is thresholds.json, `pictures` are the figures that are there already; `scores.parquet` must be written.
    """
    chosen = {finding: one["youden"] for finding, one in thresholds["findings"].items() if one["youden"] is not None}
    worst = worst_errors(scores, chosen or thresholds["used"])
    examples: Sequence[Mapping[str, Any]] = illustrate(worst) if illustrate else worst
    drawn_boxes = folder / "localisation.json"  # written beside the examples' heat maps
    page = render(
        evaluation,
        title=title,
        thresholds_source=thresholds["source"],
        pictures={**pictures, **_draw(folder / FIGURES, evaluation, run, title)},
        examples=examples,
        run=run,
        commands=commands_of(run) if run else commands,
        localisation=json.loads(drawn_boxes.read_bytes()) if illustrate and drawn_boxes.exists() else None,
        scores_sha256=hashlib.sha256((folder / "scores.parquet").read_bytes()).hexdigest(),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    if run is not None:
        (folder / FILE).write_text(run.to_json(), encoding="utf-8")


def commands_of(run: RunRecord) -> list[str]:
    """What makes the run again, from its commit and its config.yaml."""
    commit = run.origin.get("commit")
    manifest = run.origin.get("manifest_sha256") or ""
    return [
        f"git checkout {commit}" if commit else "# the commit is unknown",
        "make install && . .venv/bin/activate",
        f"python jobs/ingest.py --config config.yaml  # manifest {manifest[:12]}…",
        f"python jobs/train.py --config config.yaml --run.name {run.name}-again",
    ]


def _draw(folder: Path, evaluation: Mapping[str, Any], run: RunRecord | None, title: str) -> dict[str, Picture]:
    """Every figure that there are numbers for."""
    findings = list(evaluation["findings"])
    figures: dict[str, Any] = {}
    for rule, one in chosen_rules(evaluation).items():
        figures[f"confusion_{rule}"] = confusion_figure(one, findings, title=title)
    if (evaluation.get("calibration") or {}).get("kinds"):
        figures["reliability"] = reliability_figure(evaluation["calibration"], findings, title=title)
    if evaluation.get("decision_curves"):
        curves = {f: {"reason": evaluation["discrimination"][f]["reason"]} for f in findings}
        figures["decision_curves"] = decision_figure(curves | evaluation["decision_curves"], findings, title=title)
    if evaluation.get("subgroups"):
        groups, overall = evaluation["subgroups"], evaluation["discrimination"]
        figures["subgroups"] = subgroup_figure(groups, overall, findings, title=title)
    if run is not None and run.history:
        best = run.trained.get("best_epoch")
        per_epoch = run.steps_per_epoch
        figures["training_curves"] = training_figure(
            run.history, steps_per_epoch=per_epoch, best_epoch=best, title=title
        )
        figures["throughput"] = throughput_figure(run.history, steps_per_epoch=per_epoch, title=title)
    return {name: save(figure, folder, name) for name, figure in figures.items()}
