"""The same model on parts of the images: by sex, age and view; and what it says of images without any finding.

Thresholds are those of the whole; a subgroup chooses none of its own. Intervals resample the patients of the subgroup.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cxr_dist.data import nih, texts
from cxr_dist.errors import DataError
from cxr_dist.evaluate.bootstrap import mean_over_findings, rates, resample, with_interval
from cxr_dist.evaluate.operating import joined
from cxr_dist.evaluate.scores import ScoreTable

__all__ = ["AGE_BANDS", "no_finding", "rows_of", "subgroups"]

AGE_BANDS = (("0-17", 0, 17), ("18-39", 18, 39), ("40-59", 40, 59), ("60-79", 60, 79), ("80+", 80, nih.MAX_AGE))
"""Name, first and last year of life; children apart."""
UNKNOWN = "unknown"

_RULE = "youden"


def rows_of(table: ScoreTable, rows: pa.Table) -> pa.Table:
    """The rows (of a manifest, or of `nih.read_labels`) of the table's images, in the table's order.

    DataError naming images that `rows` lacks or has twice.
    """
    index = pd.Index(rows["image_id"].to_pylist())
    if not index.is_unique:
        raise DataError(
            f"subgroups: found image {texts.shown(index[index.duplicated()][0])} in two rows, expected one each"
        )
    at = index.get_indexer(pd.Index(table.image_ids.tolist()))
    lacking = table.image_ids[at < 0].tolist()
    if lacking:
        raise DataError(
            f"subgroups: found no row for {len(lacking)} of {len(table)} scored images (first {texts.shown(lacking[0])}), "
            "expected sex, age and view of each; give the rows of the dataset that was scored"
        )
    return rows.take(pa.array(at))


def subgroups(
    table: ScoreTable, rows: pa.Table, thresholds: Sequence[float | None], *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Per attribute and group: counts, each finding's AUROC, and sensitivity and specificity at `thresholds`.

    `rows` are the table's (`rows_of`), with the columns sex, age (years) and view. Groups without images are left out;
    images without the attribute are the group `unknown`.
    """
    groups: dict[str, Any] = {}
    for attribute, names_N in (
        ("sex", _named(rows["sex"])),
        ("age", _bands(rows["age"])),
        ("view", _named(rows["view"])),
    ):
        groups[attribute] = {
            name: _measured(table.select(names_N == name), thresholds, bootstrap=bootstrap, seed=seed)
            for name in _in_order(attribute, names_N)
        }
    return groups


def no_finding(
    table: ScoreTable, rows: pa.Table | None, thresholds: Sequence[float | None], *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """What is called present in images that are labelled with no finding at all, and how well they are told apart.

    With `rows`, an image is without finding if it has none of the fourteen; without, if it has none of the table's. AUROC
    is of 1 - the greatest probability, images without finding against the others.
    """
    labels_NK = table.labels_NK if rows is None else nih.findings_matrix(rows)
    none_N: NDArray[np.bool_] = ~np.any(labels_NK, axis=1)
    limits = np.array([np.inf if value is None else value for value in thresholds])
    called_NK = table.probabilities_NK >= limits
    least_N = 1 - table.probabilities_NK.max(axis=1, initial=0)
    # Each column asks of how many images without finding something is true: their sensitivity at a half.
    columns = np.column_stack([least_N, called_NK.any(axis=1), called_NK])
    asked = ScoreTable(
        image_ids=table.image_ids,
        patient_ids=table.patient_ids,
        split=table.split,
        findings=(nih.NO_FINDING, "any", *table.findings),
        probabilities_NK=columns.astype(np.float64),
        logits_NK=None,
        labels_NK=np.repeat(none_N[:, None], columns.shape[1], axis=1),
    )
    given = [None if value is None else 0.5 for value in thresholds]
    some = 0.5 if any(value is not None for value in given) else None
    found = resample(asked, {_RULE: [None, some, *given]}, bootstrap=bootstrap, seed=seed)
    part = rates(found, _RULE)["sensitivity"]
    any_called, few = with_interval(part[1])
    roc, rare = with_interval(found.auroc[0])
    why = [found.reasons[0], found.no_interval, None if some else "no thresholds", few, rare]
    return {
        "definition": f"none of the {'table’s findings' if rows is None else 'fourteen findings'} is labelled present",
        "n_images": int(none_N.sum()),
        "n_patients": len(np.unique(table.patient_ids[none_N])),
        "any_called": any_called.to_json(),
        "auroc": roc.to_json(),
        "per_finding": {f: with_interval(part[k])[0].to_json() for k, f in enumerate(table.findings, start=2)},
        "reason": joined(why),
    }


def _measured(table: ScoreTable, thresholds: Sequence[float | None], *, bootstrap: int, seed: int) -> dict[str, Any]:
    found = resample(table, {_RULE: thresholds}, bootstrap=bootstrap, seed=seed)
    part = rates(found, _RULE)
    absent = ["no threshold" if value is None else None for value in thresholds]
    findings: dict[str, Any] = {}
    for k, finding in enumerate(found.findings):
        (roc, few), (sensitivity, _), (specificity, _) = (
            with_interval(samples[k]) for samples in (found.auroc, part["sensitivity"], part["specificity"])
        )
        findings[finding] = {
            "positives": int(found.positives[k, 0]),
            "auroc": roc.to_json(),
            "sensitivity": sensitivity.to_json(),
            "specificity": specificity.to_json(),
            "reason": joined([found.reasons[k], few, found.no_interval, absent[k]]),
        }
    mean, few = with_interval(mean_over_findings(found.auroc))
    return {
        "n_images": len(table),
        "n_patients": len(np.unique(table.patient_ids)),
        "findings": findings,
        "mean": {"auroc": mean.to_json(), "reason": joined([few, found.no_interval])},
    }


def _named(column: pa.ChunkedArray) -> NDArray[np.str_]:
    return np.array([value or UNKNOWN for value in column.to_pylist()], dtype=np.str_)


def _bands(column: pa.ChunkedArray) -> NDArray[np.str_]:
    def band(age: int | None) -> str:
        return next((name for name, first, last in AGE_BANDS if age is not None and first <= age <= last), UNKNOWN)

    return np.array([band(age) for age in column.to_pylist()], dtype=np.str_)


def _in_order(attribute: str, names_N: NDArray[np.str_]) -> Iterator[str]:
    """The groups that have images, in an order of their own and not that of the data."""
    order = {"sex": nih.SEXES, "age": tuple(band[0] for band in AGE_BANDS), "view": nih.VIEWS}[attribute]
    there = set(names_N.tolist())
    yield from (name for name in (*order, UNKNOWN) if name in there)
