"""report.html: evaluation, figures, examples and the run's record as one page that needs nothing else.

No script, no font, no picture comes from anywhere: the page opens from a disk, in a mail, and in MLflow's sandboxed
artifact viewer. All names come from data and are escaped. A part that is missing says so and why.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from cxr_dist.evaluate.inline import inline_figure, inline_thumbnail
from cxr_dist.evaluate.plots.panels import Picture, colour
from cxr_dist.evaluate.rules import chosen_rules, main_rule
from cxr_dist.evaluate.runrecord import RunRecord

__all__ = ["SECTIONS", "render"]

SECTIONS = {
    "results": "Results",
    "curves": "Curves",
    "operating": "Operating points",
    "calibration": "Calibration",
    "decision": "Decision curves",
    "subgroups": "Subgroups",
    "errors": "Worst errors",
    "data": "Data",
    "training": "Training",
    "cost": "Cost",
    "reproduce": "Reproduce",
    "methods": "Methods",
}
"""Ids of the page's sections and their names in its list, in order."""

_CALIBRATIONS = {
    "raw": "Raw",
    "calibrated": "Calibrated",
    "prior_shift": "Prior shift",
    "prior_shift_checked": "Shift, checked",
    "oracle": "Oracle",
}
_BOX_LIMITS = ("0.1", "0.3", "0.5")
_KINDS = ("false positive", "false negative", "true positive")
_PARTS = (
    "operating_points",
    "calibration",
    "decision_curves",
    "subgroups",
    "no_finding",
    "second_labels",
    "bootstrap",
    "validation",
)


def render(
    evaluation: Mapping[str, Any],
    *,
    title: str,
    thresholds_source: str,
    pictures: Mapping[str, Picture],
    examples: Sequence[Mapping[str, Any]] = (),
    run: RunRecord | None = None,
    commands: Sequence[str] = (),
    scores_sha256: str = "",
    localisation: Mapping[str, Any] | None = None,
) -> str:
    """The page. `evaluation` is evaluation.json, parts of which may be missing, `localisation` is localisation.json;
    `commands` make the model or the report."""
    boxes = {name: one for name, one in (localisation or {}).get("findings", {}).items() if one["n_boxes"]}
    e = dict.fromkeys(_PARTS) | dict(evaluation)
    youden = main_rule(e)
    return _template().render(
        e=e,
        rules=chosen_rules(e),
        title=title,
        css=_css(),
        sections=SECTIONS.items(),
        thresholds_source=thresholds_source,
        boot=e["bootstrap"],
        youden=youden,
        axis=_Axis(_values(e)),
        cards=_cards(e, youden),
        cautions=_cautions(e, run),
        figures={name: inline_figure(picture, _alt(name, e)) for name, picture in pictures.items()},
        examples=_by_finding(examples),
        pictured=any(one.get("thumbnail_png") for one in examples),
        mapped=any(one["overlay_png"] for one in examples),
        boxes=boxes,
        box_limits=_BOX_LIMITS,
        truly=any(one["kind"] == "true positive" for one in examples),
        run=run,
        splits=[name for name in ("train", "validation", "test") if run and run.audit and name in run.audit],
        world_sizes=_world_sizes(run),
        commands=commands,
        identity=_identity(run, scores_sha256),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cxr_dist.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["colour"] = colour
    environment.filters |= {
        "words": lambda name: name.replace("_", " "),
        "sentence": lambda text: text[:1].upper() + text[1:],
        "kind_name": lambda kind: _CALIBRATIONS.get(kind, kind),
        "percent": _percent,
        "prevalence": lambda d: _percent(_ratio(d["positives"], d["positives"] + d["negatives"])),
        "duration": _duration,
        "money": lambda amount: f"{amount:,.2f}" if amount >= 1 else f"{amount:.3g}",
        "shift": _shift,
    }
    return environment.get_template("report.html.j2")


def _css() -> Markup:
    style = resources.files("cxr_dist.evaluate").joinpath("templates/report.css").read_text(encoding="utf-8")
    return Markup(style)  # noqa: S704 - a file of this package


class _Axis:
    """Where an AUROC lies on the small axis of a table row, 4 to 128: from the lowest bound, at most 0.5, to 1."""

    def __init__(self, values: Sequence[float]):
        self.low = min(0.5, int(10 * min(values, default=0.5)) / 10)
        self.ticks = [self.low, round((1 + self.low) / 2, 2), 1.0]

    def at(self, value: float) -> float:
        return round(4 + 124 * (value - self.low) / (1 - self.low), 2)


def _values(e: Mapping[str, Any]) -> list[float]:
    means = [group["mean"]["auroc"] for groups in (e["subgroups"] or {}).values() for group in groups.values()]
    shown = [one["auroc"] for one in e["discrimination"].values()] + means
    return [v["value"] if v["lower"] is None else v["lower"] for v in shown if v and v["value"] is not None]


def _cards(e: Mapping[str, Any], youden: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    mean = e["discrimination"]["mean"]
    cards = [
        _card("Mean AUROC", mean["auroc"]),
        _card("Mean AP", mean["average_precision"]),
    ]
    if youden:
        cards.append(_card("Mean sensitivity", youden["mean"]["sensitivity"], youden["name"]))
        cards.append(_card("Mean specificity", youden["mean"]["specificity"], youden["name"]))
    kinds = (e["calibration"] or {}).get("kinds", {})
    if "calibrated" in kinds:
        ece = {"value": kinds["calibrated"]["mean"]["ece"], "lower": None, "upper": None}
        cards.append(_card("Mean ECE", ece, "after calibration"))
    return cards


def _card(name: str, value: Mapping[str, Any], more: str = "") -> dict[str, Any]:
    if value["value"] is None:
        return {"name": name, "shown": "–", "more": ["undefined"]}
    span = "" if value["lower"] is None else f"{value['lower']:.3f}–{value['upper']:.3f}"
    return {"name": name, "shown": f"{value['value']:.3f}", "more": list(filter(None, (span, more)))}


def _cautions(e: Mapping[str, Any], run: RunRecord | None) -> list[str]:
    """What a reader must know before quoting a number."""
    out = []
    if e["split"] != "test":
        out.append(
            f"These are {e['split']} figures: the checkpoint, the thresholds and the calibration were chosen on these "
            "images, so they flatter the model."
        )
    shared = (e["validation"] or {}).get("patients_shared")
    if shared and e["split"] != "validation":
        out.append(f"Patients of these images who are in the validation scores too: {shared:,}.")
    if e.get("note"):
        out.append(f"{e['note']}.")
    undefined = [name for name in e["findings"] if e["discrimination"][name]["auroc"]["value"] is None]
    if undefined:
        names = ", ".join(name.replace("_", " ") for name in undefined)
        out.append(f"In no mean, for it is undefined on these images: {names}.")
    if run is None:
        out.append("These are scores alone: how the model was trained, and on what, is not known here.")
        return out
    if run.origin.get("weights") == "random":
        out.append("The network started from random weights, as in the demo: this says that the job works, no more.")
    if run.test_evaluations and run.test_evaluations > 1:
        out.append(
            f"The test images have been evaluated {run.test_evaluations} times in this experiment"
            + (f"; this was number {run.test_evaluation}." if run.test_evaluation else ".")
        )
    if run.unreadable:
        out.append(f"Images that could not be read, and are in no number here: {run.unreadable:,}.")
    if run.audit and run.audit["patients_shared"]:
        out.append(f"Patients in more than one split: {run.audit['patients_shared']:,}.")
    return out


def _alt(name: str, e: Mapping[str, Any]) -> str:
    """What a figure shows, for those who do not see it; the tables have its numbers."""
    mean = e["discrimination"]["mean"]["auroc"]["value"]
    kinds = {
        "roc_curves": "ROC curves, a panel for each finding"
        + ("" if mean is None else f"; their mean AUROC is {mean:.3f}"),
        "pr_curves": "Precision-recall curves, a panel for each finding",
        "reliability": "Reliability diagrams before and after calibration, a panel for each finding",
        "decision_curves": "Net benefit over threshold probability, a panel for each finding",
        "subgroups": "AUROC with intervals by sex, age and view, a panel for each finding",
        "training_curves": "Loss, validation AUROC and learning rate over epochs",
        "throughput": "Images a second, waiting, number of ranks and bytes read over epochs",
    }
    rule = chosen_rules(e).get(name.removeprefix("confusion_"), {}).get("name", "")
    return kinds.get(name, f"Confusion matrices at the thresholds of {rule}, a panel for each finding")


def _by_finding(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The examples of each finding, errors first, with their pictures ready for the page."""
    out: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(examples, key=lambda one: _KINDS.index(one["kind"])):
        thumbnail, overlay = (png and inline_thumbnail(png) for png in (one["thumbnail_png"], one["overlay_png"]))
        out.setdefault(one["finding"], []).append({**one, "thumbnail": thumbnail, "overlay": overlay})
    return out


def _world_sizes(run: RunRecord | None) -> str:
    """The numbers of ranks in the order in which the run had them."""
    points = run.history.get("train/world_size", []) if run else []
    return ", then ".join(f"{size:g}" for size, _ in itertools.groupby(value for _, value in points))


def _identity(run: RunRecord | None, scores_sha256: str) -> list[tuple[str, str]]:
    out = []
    if run is not None:
        versions = run.origin.get("versions") or {}
        out = [
            ("Run", f"{run.name} ({run.run_id})" if run.run_id else run.name),
            ("Commit", run.origin.get("commit") or "unknown: the code was no git checkout; give run.commit"),
            ("Dataset", run.origin.get("dataset") or "unknown"),
            ("Manifest SHA-256", run.origin.get("manifest_sha256") or "unknown"),
            ("Plan SHA-256", run.origin.get("plan_sha256") or "unknown"),
            ("Images trained on, SHA-256", run.trained.get("samples_sha256") or "unknown"),
            ("Trained weights, SHA-256", run.trained.get("weights_sha256") or "unknown"),
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"),
        ]
    return [*out, ("Score table, SHA-256", scores_sha256)] if scores_sha256 else out


def _ratio(part: float | None, whole: float) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _shift(audit: Mapping[str, Any], finding: str) -> str:
    before, after = (audit[split]["prevalence"].get(finding) for split in ("train", "test"))
    return "–" if not before or after is None else f"× {after / before:.2f}"
