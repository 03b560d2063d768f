"""Tables of other programs: any model's probabilities, as Parquet or CSV, with the labels joined by image id."""

import difflib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cxr_dist.data import nih, texts
from cxr_dist.errors import DataError
from cxr_dist.evaluate.scores import (
    PREFIX,
    ScoreTable,
    check_probabilities,
    check_unique,
    metadata_of,
    parquet_table,
    read_bytes,
    unreadable,
)

__all__ = ["frame_and_ids", "read_external"]

ID_COLUMNS = ("image_id", "Image Index")
_INDEXES = ("Unnamed:", "__index_level_")
"""What pandas calls the row numbers of a table that was written with them."""
_NOT_SCORES = {*ID_COLUMNS, "patient_id", "Patient ID", "split", nih.NO_FINDING}


def read_external(path: str | Path, labels: pa.Table, findings: tuple[str, ...], *, split: str = "test") -> ScoreTable:
    """Read any model's probabilities and join the labels by image id.

    The file is Parquet or CSV (plain or .gz), told apart by content, with a column `image_id` or `Image Index` and one
    column of probabilities per finding, named <finding> or prob_<finding>; where any column has the prefix, only those
    with it are scores. Columns come in any order; findings that are absent are left out, at least one must be there.

    `labels` is the table of `nih.read_labels`. `split` says what the images are; a table that `write` wrote knows it
    itself. Raises DataError naming the column, row or image for anything that cannot be scored.
    """
    data = read_bytes(path)
    frame, image_ids = frame_and_ids(data, str(path))
    columns = _score_columns(frame, findings, str(path))
    present = tuple(finding for finding in findings if finding in columns)

    probabilities = np.empty((len(frame), len(present)))
    for k, finding in enumerate(present):
        probabilities[:, k] = _numbers(frame[columns[finding]], image_ids, str(path))
    check_probabilities(probabilities, tuple(columns[f] for f in present), image_ids, str(path))

    rows = pd.Index(labels["image_id"].to_pylist()).get_indexer(pd.Index(image_ids.tolist()))
    missing = image_ids[rows < 0].tolist()
    if len(missing):
        raise DataError(
            f"{path}: {len(missing)} of {len(image_ids)} image ids have no label, first {', '.join(texts.shown(i) for i in missing[:3])}; "
            "expected the file names of the label CSV, such as 00000001_000.png"
        )
    return ScoreTable(
        image_ids=image_ids,
        patient_ids=labels["patient_id"].to_numpy().astype(np.int64)[rows],
        split=metadata_of(data).get("split", split),
        findings=present,
        probabilities_NK=probabilities,
        logits_NK=None,
        labels_NK=nih.findings_matrix(labels)[rows][:, [nih.FINDINGS.index(finding) for finding in present]],
    )


def frame_and_ids(data: bytes, name: str) -> tuple[pd.DataFrame, NDArray[np.str_]]:
    """A Parquet or CSV table and its image ids, which are there once each. DataError otherwise."""
    frame = _read_frame(data, name)
    id_column = next((column for column in ID_COLUMNS if column in frame.columns), None)
    if id_column is None:
        raise DataError(
            f"{name}: no column image_id or 'Image Index' among {', '.join(texts.shown(str(c)) for c in frame.columns[:8])}"
        )
    image_ids = frame[id_column].astype(str).to_numpy(dtype=np.str_)
    for number, image_id in enumerate(image_ids.tolist(), start=1):
        texts.image_name(image_id, f"{name}: row {number}")
    check_unique(image_ids, name)
    return frame, image_ids


def _read_frame(data: bytes, name: str) -> pd.DataFrame:
    if data[:4] == b"PAR1":
        return parquet_table(data, name).to_pandas()
    text = texts.unpack(data, name)
    ids: dict[Any, Any] = dict.fromkeys(ID_COLUMNS, str)
    try:
        return pd.read_csv(io.BytesIO(text), dtype=ids, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from None


def _score_columns(frame: pd.DataFrame, findings: tuple[str, ...], name: str) -> dict[str, str]:
    """Finding → its column; NIH findings that are not wanted are ignored, other names are errors."""
    names = [str(column) for column in frame.columns]
    prefixed = [column for column in names if column.startswith(PREFIX)]
    numeric = {str(column) for column in frame.columns if pd.api.types.is_numeric_dtype(frame[column])}
    columns: dict[str, str] = {}
    for column in prefixed or names:
        finding = column.removeprefix(PREFIX)
        if finding in findings:
            columns[finding] = column
        elif finding in (*nih.FINDINGS, *_NOT_SCORES) or column.startswith(_INDEXES):
            continue
        elif column in numeric and column.removeprefix("logit_") in nih.FINDINGS:
            raise DataError(
                f"{name}: column {column} holds logits by its name, expected probabilities; give {PREFIX}{column[6:]} = "
                "1 / (1 + exp(-logit))"
            )
        elif prefixed or column in numeric:
            near = difflib.get_close_matches(finding, nih.FINDINGS, n=1, cutoff=0.0)[0]
            raise DataError(
                f"{name}: column {texts.shown(column)} is no finding, the nearest is {near!r}; rename or drop it"
            )
    if not columns:
        raise DataError(f"{name}: no column of scores, expected at least one of {', '.join(findings)}")
    return columns


def _numbers(column: pd.Series, image_ids: NDArray[np.str_], name: str) -> NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(np.isnan(numbers))
    if len(bad):
        row = int(bad[0])
        found = "NaN or nothing" if pd.isna(column.iloc[row]) else texts.shown(str(column.iloc[row]))
        raise DataError(
            f"{name}: row {row + 1} ({image_ids[row]}), column {column.name}: found {found}, expected a probability "
            f"({len(bad)} such rows); score the image or leave its row out"
        )
    return numbers
