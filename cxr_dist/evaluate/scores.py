"""Score tables: one row per scored image, the only thing that metrics, thresholds, figures and reports are made of.

A table written here is Parquet with the columns image_id, patient_id, split and, per finding, logit_<finding> (where
the model gave logits), prob_<finding> and label_<finding>. `read` gives it back exactly. Tables of other programs are
read in `external`.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cxr_dist import storage
from cxr_dist.data import nih
from cxr_dist.data.tables import read_table
from cxr_dist.errors import DataError

__all__ = ["FORMAT", "MAX_ROWS", "PREFIX", "ScoreTable", "encoded", "from_logits", "read", "write"]

FORMAT = "cxr-dist/scores/1"
PREFIX = "prob_"
MAX_ROWS = 10_000_000
"""Rows of a score table that are believed; NIH has 112,120 images."""


@dataclass(frozen=True)
class ScoreTable:
    """What a model said about N images and K findings, with the truth beside it; every row is a readable image.

    Rows are unique by image id, in any order: nothing downstream depends on it. Raises DataError if a shape, a
    probability or an id is not what it should be.
    """

    image_ids: NDArray[np.str_]
    """File names of the images, [N]."""
    patient_ids: NDArray[np.int64]
    """Patient of each image, [N]: what intervals resample."""
    split: str
    """train, validation or test."""
    findings: tuple[str, ...]
    """Names of the K findings, in the order of the columns."""
    probabilities_NK: NDArray[np.float64]
    """Probability of each finding, 0 to 1."""
    logits_NK: NDArray[np.float32] | None
    """Logits as the network gave them; None for a table that came with probabilities only."""
    labels_NK: NDArray[np.bool_]
    """True where the finding is labelled present."""

    def __post_init__(self) -> None:
        shape = (len(self.image_ids), len(self.findings))
        arrays = {"probabilities": self.probabilities_NK, "labels": self.labels_NK, "logits": self.logits_NK}
        for name, array in arrays.items():
            if array is not None and array.shape != shape:
                raise DataError(f"score table: {name} are {array.shape}, expected {shape} (images, findings)")
        if self.patient_ids.shape != shape[:1]:
            raise DataError(f"score table: {len(self.patient_ids)} patient ids for {shape[0]} image ids")
        check_unique(self.image_ids, "score table")
        check_probabilities(self.probabilities_NK, self.findings, self.image_ids, "score table")

    def __len__(self) -> int:
        return len(self.image_ids)

    def select(self, keep_N: NDArray[np.bool_]) -> "ScoreTable":
        """The rows where `keep_N` is True."""
        return replace(
            self,
            image_ids=self.image_ids[keep_N],
            patient_ids=self.patient_ids[keep_N],
            probabilities_NK=self.probabilities_NK[keep_N],
            logits_NK=None if self.logits_NK is None else self.logits_NK[keep_N],
            labels_NK=self.labels_NK[keep_N],
        )

    def with_findings(self, findings: tuple[str, ...]) -> "ScoreTable":
        """These columns, in this order; DataError if one is not there."""
        lacking = [finding for finding in findings if finding not in self.findings]
        if lacking:
            raise DataError(
                f"score table: found no scores of {', '.join(lacking)}, expected them among {', '.join(self.findings)}"
            )
        columns = [self.findings.index(finding) for finding in findings]
        return replace(
            self,
            findings=findings,
            probabilities_NK=self.probabilities_NK[:, columns],
            logits_NK=None if self.logits_NK is None else self.logits_NK[:, columns],
            labels_NK=self.labels_NK[:, columns],
        )


def from_logits(
    rows: pa.Table,
    split: str,
    findings: tuple[str, ...],
    logits_NK: NDArray[np.float32],
    labels_NK: NDArray[np.bool_],
) -> ScoreTable:
    """A score table from logits and the manifest's rows of the same images."""
    return ScoreTable(
        image_ids=np.array(rows["image_id"].to_pylist()),
        patient_ids=rows["patient_id"].to_numpy().astype(np.int64),
        split=split,
        findings=findings,
        probabilities_NK=1 / (1 + np.exp(-logits_NK.astype(np.float64))),
        logits_NK=logits_NK,
        labels_NK=labels_NK,
    )


def write(table: ScoreTable, uri_or_path: str | Path) -> None:
    """Write a table as one Parquet file, whole or not at all."""
    storage.put_atomic(str(uri_or_path), encoded(table))


def encoded(table: ScoreTable) -> bytes:
    """A table as the Parquet file that `write` writes."""
    columns: dict[str, Any] = {
        "image_id": pa.array(table.image_ids.tolist(), pa.string()),
        "patient_id": pa.array(table.patient_ids, pa.int64()),
        "split": pa.array([table.split] * len(table), pa.string()),
    }
    for k, finding in enumerate(table.findings):
        if table.logits_NK is not None:
            columns[f"logit_{finding}"] = pa.array(table.logits_NK[:, k], pa.float32())
        columns[f"{PREFIX}{finding}"] = pa.array(table.probabilities_NK[:, k], pa.float64())
        columns[f"label_{finding}"] = pa.array(table.labels_NK[:, k], pa.bool_())
    metadata = {"format": FORMAT, "split": table.split}
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(columns, schema=_schema(table.findings, table.logits_NK is not None)).replace_schema_metadata(
            metadata
        ),
        buffer,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def read(path: str | Path) -> ScoreTable:
    """Read a table that `write` wrote, exactly; raises DataError for any other file."""
    data = read_bytes(path)
    metadata = metadata_of(data)
    found = metadata.get("format", "no format mark")
    if found != FORMAT:
        raise DataError(
            f"{path}: found {found}, expected {FORMAT}; the scores of another program need the label CSV to be joined "
            "with (data.labels)"
        )
    table = parquet_table(data, str(path))
    findings = tuple(name.removeprefix(PREFIX) for name in table.column_names if name.startswith(PREFIX))
    has_logits = bool(findings) and f"logit_{findings[0]}" in table.column_names
    columns_are_right = table.schema.remove_metadata() == _schema(findings, has_logits)
    if not columns_are_right or any(column.null_count for column in table.columns):
        raise DataError(f"{path}: found columns that are not those of {FORMAT}; write the scores again")
    split = metadata.get("split", "")
    if split not in nih.SPLITS or set(table["split"].to_pylist()) - {split}:
        raise DataError(f"{path}: found split {split!r} or rows of another; write the scores again")

    def stack(prefix: str, dtype: Any) -> NDArray[Any]:
        out = np.empty((table.num_rows, len(findings)), dtype)
        for k, finding in enumerate(findings):
            out[:, k] = table[prefix + finding].to_numpy()
        return out

    return ScoreTable(
        image_ids=np.array(table["image_id"].to_pylist(), dtype=np.str_),
        patient_ids=table["patient_id"].to_numpy(),
        split=split,
        findings=findings,
        probabilities_NK=stack(PREFIX, np.float64),
        logits_NK=stack("logit_", np.float32) if has_logits else None,
        labels_NK=stack("label_", np.bool_),
    )


def read_bytes(path: str | Path) -> bytes:
    try:
        return storage.read_bytes(str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected a table of scores") from None


def _schema(findings: tuple[str, ...], logits: bool) -> pa.Schema:
    """The columns of a table that `write` writes."""
    columns: dict[str, pa.DataType] = {"image_id": pa.string(), "patient_id": pa.int64(), "split": pa.string()}
    for finding in findings:
        if logits:
            columns[f"logit_{finding}"] = pa.float32()
        columns[f"{PREFIX}{finding}"] = pa.float64()
        columns[f"label_{finding}"] = pa.bool_()
    return pa.schema(columns)


def metadata_of(data: bytes) -> dict[str, str]:
    """What `write` noted in the schema; empty for any other file."""
    if data[:4] != b"PAR1":
        return {}
    try:
        found = pq.read_schema(io.BytesIO(data)).metadata or {}
        metadata = {key.decode(): value.decode() for key, value in found.items() if key in (b"format", b"split")}
    except (pa.ArrowException, OSError, ValueError):
        return {}
    return metadata if metadata.get("format", "").startswith("cxr-dist/") else {}


def parquet_table(data: bytes, name: str) -> pa.Table:
    """The table, without what pandas noted of it; pages that have a checksum are held to it."""
    try:
        rows = pq.read_metadata(io.BytesIO(data)).num_rows
        if rows > MAX_ROWS:
            raise DataError(f"{name}: found {rows} rows, expected at most {MAX_ROWS}; score fewer images at a time")
        table = read_table(data, page_checksum_verification=True)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(name, error) from None
    return table.replace_schema_metadata(None)


def check_probabilities(
    probabilities_NK: NDArray[np.float64], columns: tuple[str, ...], image_ids: NDArray[np.str_], name: str
) -> None:
    bad = ~((probabilities_NK >= 0) & (probabilities_NK <= 1))
    if bad.any():
        row, k = (int(index[0]) for index in np.nonzero(bad))
        value = probabilities_NK[row, k]
        hint = "expected a number" if np.isnan(value) else "expected 0 to 1; it looks like logits, apply the sigmoid"
        raise DataError(f"{name}: row {row + 1} ({image_ids[row]}), column {columns[k]}: found {value:g}, {hint}")


def check_unique(image_ids: NDArray[np.str_], name: str) -> None:
    values, counts = np.unique(image_ids, return_counts=True)
    if (counts > 1).any():
        first = values[counts > 1][0]
        raise DataError(f"{name}: image id {first} is there {counts.max()} times; expected every image once")


def unreadable(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:160]
    return DataError(f"{name}: cannot be read as Parquet or CSV ({reason}); expected a table of scores")
