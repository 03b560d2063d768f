"""Several models on the same images as the plain JSON of compare.json ("cxr-dist/models/1"): a pure function of score tables.

Each model is judged alone (AUROC, average precision, precision, recall and F1) and against the reference (differences
with intervals over patients). Findings that not all models score are judged where they are scored and are in no mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from cxr_dist.compare.classification import CHOSEN_HERE, Thresholds, classify, half, own, swept
from cxr_dist.data.texts import shown
from cxr_dist.errors import ConfigError, DataError
from cxr_dist.evaluate.analysis import check_disjoint
from cxr_dist.evaluate.bootstrap import measure
from cxr_dist.evaluate.metrics import Metrics
from cxr_dist.evaluate.paired import align, compare
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.evaluate.thresholds import RULES

__all__ = ["FORMAT", "Entry", "common_images", "judge"]

FORMAT = "cxr-dist/models/1"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model by what it said."""

    name: str
    scores: ScoreTable
    validation: ScoreTable | None = None
    """Its own scores of the validation split: what its thresholds are chosen on."""
    origin: str = ""
    """Where the scores are from, for people."""
    cleaned: int = 0
    """Images that the label set's cleaning left out."""


def common_images(entries: Sequence[Entry], *, common: bool) -> list[Entry]:
    """The entries with the same images in the same order, those of the first.

    DataError naming images that not all have scored, unless `common` asks for the others alone; and if none is left.
    """
    first = entries[0].scores.image_ids
    everywhere = set(first.tolist()).intersection(*(one.scores.image_ids.tolist() for one in entries[1:]))
    lacking = []
    for one in entries:
        others = [other.scores.image_ids for other in entries if other is not one]
        missing = np.setdiff1d(np.concatenate(others), one.scores.image_ids)
        if len(missing):
            lacking.append(f"{one.name} lacks {len(missing):,} that another has (first {shown(str(missing[0]))})")
    if lacking and not common:
        raise DataError(
            f"images: found other ones in each table ({'; '.join(lacking)}), expected the same in all; score the missing "
            f"ones, or judge the {len(everywhere):,} that all have with --common"
        )
    if not everywhere:
        raise DataError("images: found none that all models have scored, expected the same images in all tables")
    ids = pd.Index([image_id for image_id in first.tolist() if image_id in everywhere])
    at = [pd.Index(one.scores.image_ids.tolist()).get_indexer(ids) for one in entries]
    return [replace(one, scores=one.scores.select(rows)) for one, rows in zip(entries, at, strict=True)]


def judge(
    entries: Sequence[Entry],
    *,
    reference: str = "",
    rule: str = "youden",
    common: bool = False,
    bootstrap: int,
    seed: int,
) -> tuple[dict[str, Any], list[Entry]]:
    """What compare.json holds, and the entries as they were judged: the same images in the same order.

    `reference` is the name of the model that the others are held against (the first). InputError for fewer than two
    models, names that are not unique, tables of other splits, images, patients or labels, and for validation scores
    that hold judged images.
    """
    _check(entries, reference, rule)
    reference = reference or entries[0].name
    scored = {one.name: len(one.scores) for one in entries}
    entries = common_images(entries, common=common)
    base = next(one for one in entries if one.name == reference)
    everybody = _findings(base, entries)
    shared = tuple(finding for finding in everybody if all(finding in one.scores.findings for one in entries))
    if not shared:
        raise DataError("findings: found none that all models score, expected at least one; compare fewer models")
    differences = {
        one.name: _difference(one, base, shared, bootstrap=bootstrap, seed=seed) for one in entries if one is not base
    }
    judged = [replace(one, scores=one.scores.with_findings(_in_order(one, everybody))) for one in entries]
    result = {
        "format": FORMAT,
        "split": base.scores.split,
        "n_images": len(base.scores),
        "n_patients": len(np.unique(base.scores.patient_ids)),
        "findings": list(everybody),
        "shared_findings": list(shared),
        "reference": reference,
        "bootstrap": {"resamples": bootstrap, "seed": seed, "unit": "patient", "level": 0.95},
        "models": {one.name: _model(one, judged, everybody, scored[one.name]) for one in judged},
        "discrimination": {
            one.name: _discrimination(one.scores, shared, bootstrap=bootstrap, seed=seed) for one in judged
        },
        "classification": _classification(judged, shared, rule),
        "differences": differences,
    }
    return result | {"cautions": _cautions(result, judged)}, judged


def _check(entries: Sequence[Entry], reference: str, rule: str) -> None:
    names = [one.name for one in entries]
    if len(entries) < 2:
        raise ConfigError(
            f"models: found {len(entries)}, expected at least two; jobs/evaluate.py judges one model by itself"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"models: found two that are called {shown(twice[0])}, expected names; give them as NAME=URI")
    if reference and reference not in names:
        raise ConfigError(f"--reference: found {shown(reference)}, expected one of {', '.join(names)}")
    if rule not in RULES:
        raise ConfigError(f"--rule: found {shown(rule)}, expected one of {', '.join(RULES)}")
    first = entries[0]
    for one in entries:
        if one.scores.split != first.scores.split:
            raise DataError(
                f"{one.name}: found scores of split {one.scores.split}, expected {first.scores.split} as {first.name} has"
            )
        try:
            check_disjoint(one.scores, one.validation)
        except DataError as error:
            raise DataError(f"{one.name}: {error}") from None


def _difference(one: Entry, base: Entry, shared: tuple[str, ...], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """`compare` of every finding that both score; its means over those that all models score, as everywhere."""
    try:
        a, b = align(one.scores, base.scores)
        found = compare(a, b, bootstrap=bootstrap, seed=seed).to_json()
    except DataError as error:
        raise DataError(f"{one.name} and {base.name}: {error}") from None
    if set(a.findings) != set(shared):
        means = compare(a.with_findings(shared), b.with_findings(shared), bootstrap=bootstrap, seed=seed).to_json()
        for metric in ("auroc", "average_precision"):
            found[metric]["mean"] = means[metric]["mean"]
    return found


def _findings(base: Entry, entries: Sequence[Entry]) -> tuple[str, ...]:
    """Every model's findings once, the reference's first."""
    names = [*base.scores.findings, *(finding for one in entries for finding in one.scores.findings)]
    return tuple(dict.fromkeys(names))


def _in_order(one: Entry, findings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(finding for finding in findings if finding in one.scores.findings)


def _model(one: Entry, entries: Sequence[Entry], everybody: tuple[str, ...], scored: int) -> dict[str, Any]:
    same = [other.name for other in entries if other is not one and _same_scores(one.scores, other.scores)]
    validation = one.validation
    return {
        "origin": one.origin,
        "note": one.scores.note,
        "n_scored": scored,
        "n_cleaned": one.cleaned,
        "n_left_out": scored - len(one.scores),
        "lacks": [finding for finding in everybody if finding not in one.scores.findings],
        "n_validation": None if validation is None else len(validation),
        "same_scores_as": same,
    }


def _same_scores(a: ScoreTable, b: ScoreTable) -> bool:
    return a.findings == b.findings and np.array_equal(a.probabilities_NK, b.probabilities_NK)


def _discrimination(table: ScoreTable, shared: tuple[str, ...], *, bootstrap: int, seed: int) -> dict[str, Any]:
    """Every finding that the model scores; `mean` over the findings that all models score."""
    whole = measure(table, bootstrap=bootstrap, seed=seed)
    mean = whole if table.findings == shared else measure(table.with_findings(shared), bootstrap=bootstrap, seed=seed)
    return _values(whole) | {
        "mean": {
            "auroc": mean.mean_auroc.to_json(),
            "average_precision": mean.mean_average_precision.to_json(),
            "reason": mean.reason,
        }
    }


def _values(metrics: Metrics) -> dict[str, Any]:
    return {
        finding: {
            "auroc": one.auroc.to_json(),
            "average_precision": one.average_precision.to_json(),
            "positives": one.positives,
            "negatives": one.negatives,
            "reason": one.reason,
        }
        for finding, one in metrics.findings.items()
    }


def _classification(entries: Sequence[Entry], shared: tuple[str, ...], rule: str) -> dict[str, Any]:
    """The report by each origin of thresholds, on the findings that all models score."""
    tables = {one.name: one.scores.with_findings(shared) for one in entries}
    chosen: dict[str, dict[str, Thresholds | None]] = {
        "own": {one.name: own(tables[one.name], one.validation, rule) for one in entries},
        "half": {one.name: half(tables[one.name]) for one in entries},
        "chosen_here": {one.name: swept(tables[one.name]) for one in entries},
    }
    labels = {
        "own": f"each model's own thresholds, {rule} on its validation scores",
        "half": "0.5 for every finding",
        "chosen_here": f"one threshold for all findings, {CHOSEN_HERE} (the notebooks' sweep): no honest figure",
    }
    return {
        origin: {
            "label": labels[origin],
            "models": {
                name: {
                    "chosen_on": thresholds.chosen_on,
                    "thresholds": thresholds.values,
                    "rows": classify(tables[name], thresholds.values),
                }
                for name, thresholds in found.items()
                if thresholds is not None
            },
        }
        for origin, found in chosen.items()
    }


def _cautions(result: dict[str, Any], entries: Sequence[Entry]) -> list[str]:
    """What a reader of the figures must know first."""
    names = [one.name for one in entries]
    found = [f"{one.name}: {one.scores.note}" for one in entries if one.scores.note]
    for name, model in result["models"].items():
        before = [other for other in model["same_scores_as"] if names.index(other) < names.index(name)]
        if before:
            found.append(f"{name} has the very scores of {before[0]}")
        if model["lacks"]:
            found.append(
                f"{name} does not score {', '.join(model['lacks'])}: in no mean, average or difference with it"
            )
        if model["n_left_out"]:
            found.append(
                f"{name}: {model['n_left_out']:,} of its {model['n_scored']:,} images are not judged, as others lack them"
            )
    without = [one.name for one in entries if one.validation is None]
    if without:
        found.append(f"no validation scores of {', '.join(without)}: its own thresholds are 0.5")
    for one in entries:
        if one.validation is None or one.scores.split == "validation":
            continue
        both = len(np.intersect1d(one.validation.patient_ids, one.scores.patient_ids))
        if both:
            found.append(f"{one.name}: {both:,} patients of its validation scores are also judged")
    if one.scores.split == "validation":
        found.append("judged on validation images, which thresholds, stopping and selection have seen")
    if len(entries) > 2:
        found.append("p-values are corrected over the findings of each pair, not over the number of models")
    return found
