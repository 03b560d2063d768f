"""A second opinion on the same images: labels of another source, joined by image id, and the AUROC that they give.

The labels of ChestX-ray14 were mined from reports and are wrong for some of its images. A source is any CSV or Parquet
table with the image ids and columns of 0/1 (or no/yes) named as findings; the columns of the radiologist-adjudicated
labels of Majkowska et al. (Radiology 2020; google2019_nih-chest-xray-labels.csv) are known by their names too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_dist.data import nih, texts
from cxr_dist.errors import DataError
from cxr_dist.evaluate.bootstrap import resample, with_interval
from cxr_dist.evaluate.external import frame_and_ids
from cxr_dist.evaluate.operating import joined
from cxr_dist.evaluate.scores import ScoreTable, read_bytes

__all__ = ["OTHER_NAMES", "SecondLabels", "read_second_labels", "second_opinion"]

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "Pneumothorax": ("Pneumothorax",),
    "Nodule or mass": ("Nodule", "Mass"),
    "Airspace opacity": ("Atelectasis", "Consolidation", "Edema", "Infiltration", "Pneumonia"),
    "Fracture": (),
}
"""Columns that are not called as ours, and which of our findings speak of the same. Airspace opacity is broader than any of
ours: the findings that fill airspaces stand for it by our choice. No finding of ours is a fracture."""

_MEANINGS = {"0": False, "1": True, "0.0": False, "1.0": True, "no": False, "yes": True, "false": False, "true": True}


@dataclass(frozen=True, kw_only=True)
class SecondLabels:
    """Labels of N images by another source."""

    source: str
    """What it is called."""
    image_ids: NDArray[np.str_]
    columns: dict[str, NDArray[np.float64]]
    """1 present, 0 absent, nan not judged, [N] each, by the source's name of the finding."""


def read_second_labels(path: str | Path, source: str = "") -> SecondLabels:
    """Read a source; columns that are neither a finding of ours nor in `OTHER_NAMES` are left aside.

    DataError if there is no such column, if one holds anything but 0, 1, no, yes, false, true and nothing, or if an
    image is there twice.
    """
    name = str(path)
    frame, image_ids = frame_and_ids(read_bytes(path), name)
    known = {*nih.FINDINGS, *OTHER_NAMES}
    columns = {str(column): _judged(frame[column], image_ids, name) for column in frame.columns if column in known}
    if not columns:
        raise DataError(
            f"{name}: found no column named as a finding among {', '.join(texts.shown(str(c)) for c in frame.columns[:8])}, "
            f"expected at least one of {', '.join([*nih.FINDINGS, *OTHER_NAMES][:4])} and so on"
        )
    return SecondLabels(source=source or Path(name).name, image_ids=image_ids, columns=columns)


def second_opinion(table: ScoreTable, second: SecondLabels, *, bootstrap: int, seed: int) -> dict[str, Any]:
    """The AUROC of each of the source's findings on its images that were scored, beside that by the first labels there.

    The score of a finding that several of ours stand for is the greatest of their probabilities; by the first labels it
    is present where one of them is. Intervals of both are from the same draws of patients.
    """
    at = pd.Index(table.image_ids.tolist()).get_indexer(pd.Index(second.image_ids.tolist()))
    mapping, findings = [], {}
    for theirs, judged in second.columns.items():
        ours = [f for f in OTHER_NAMES.get(theirs, (theirs,)) if f in table.findings]
        counts = {"n_images": int((~np.isnan(judged)).sum()), "positives": int(np.nansum(judged))}
        mapping.append({"theirs": theirs, "ours": ours, **counts})
        if ours:
            rows = (at >= 0) & ~np.isnan(judged)
            part = table.with_findings(tuple(ours)).select(at[rows])
            findings[theirs] = _compared(part, theirs, judged[rows] == 1, bootstrap=bootstrap, seed=seed)
    return {"source": second.source, "n_images_scored": int((at >= 0).sum()), "mapping": mapping, "findings": findings}


def _compared(
    part: ScoreTable, theirs: str, positive: NDArray[np.bool_], *, bootstrap: int, seed: int
) -> dict[str, Any]:
    score = part.probabilities_NK.max(axis=1)
    both = ScoreTable(
        image_ids=part.image_ids,
        patient_ids=part.patient_ids,
        split=part.split,
        findings=(theirs, "first labels"),
        probabilities_NK=np.column_stack([score, score]),
        logits_NK=None,
        labels_NK=np.column_stack([positive, part.labels_NK.any(axis=1)]),
    )
    found = resample(both, bootstrap=bootstrap, seed=seed)
    (roc, few), (first, few_first) = with_interval(found.auroc[0]), with_interval(found.auroc[1])
    none = "none of its images was scored" if not len(part) else found.reasons[0]
    first_reason = found.reasons[1] if len(part) else None
    why = [none, found.no_interval, few, *(f"first labels: {r}" for r in (first_reason, few_first) if r)]
    return {
        "n_images": len(part),
        "n_patients": len(np.unique(part.patient_ids)),
        "positives": int(positive.sum()),
        "auroc": roc.to_json(),
        "positives_first_labels": int(both.labels_NK[:, 1].sum()),
        "auroc_first_labels": first.to_json(),
        "reason": joined(why),
    }


def _judged(column: pd.Series, image_ids: NDArray[np.str_], name: str) -> NDArray[np.float64]:
    out = np.full(len(column), np.nan)
    for row, value in enumerate(column.tolist()):
        text = "" if value is None or value != value else str(value).strip()
        if not text:
            continue
        meaning = _MEANINGS.get(text.lower())
        if meaning is None:
            raise DataError(
                f"{name}: row {row + 1} ({image_ids[row]}), column {column.name}: found {texts.shown(text)}, expected 0 or 1 "
                "(or no or yes), or nothing where it was not judged"
            )
        out[row] = meaning
    return out
