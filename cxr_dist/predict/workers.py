"""What the tasks and actors of a prediction do: a part decoded by one, scored and stored by the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cxr_dist.data.rows import CORRUPT, OK, PADDING
from cxr_dist.errors import RunError
from cxr_dist.evaluate.inference import DecodeGroups, Scorer
from cxr_dist.predict.part import make_part, write_part
from cxr_dist.predict.source import MAX_IMAGE_BYTES, ImageReader, Section

__all__ = ["DecodeParts", "ScoreParts", "Store", "without_long"]


@dataclass(frozen=True)
class DecodeParts:
    """A Ray Data task: {"item": [part of the section]} to its decoded rows and the file of each."""

    groups: DecodeGroups
    section: Section

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        for table in self.groups(batch):
            yield self._named(table)

    def _named(self, table: pa.Table) -> pa.Table:
        rows = table["row"].to_numpy()
        uris = [self.section.uri(row) if row >= 0 else "" for row in rows.tolist()]
        if isinstance(self.section.reader, ImageReader):
            table = without_long(table, self.section.reader.ranges.file_bytes)
        return table.append_column("uri", pa.array(uris, pa.string()))


def without_long(table: pa.Table, file_bytes: npt.NDArray[np.int64]) -> pa.Table:
    """The rows, those of files that are too long to be read marked as unreadable."""
    rows = table["row"].to_numpy()
    sizes = np.where(rows >= 0, file_bytes[rows], 0)
    if not (sizes > MAX_IMAGE_BYTES).any():
        return table
    reasons = [
        f"{size} bytes, more than the {MAX_IMAGE_BYTES} that are read" if size > MAX_IMAGE_BYTES else reason
        for size, reason in zip(sizes.tolist(), table["reason"].to_pylist(), strict=True)
    ]
    states = np.where(sizes > MAX_IMAGE_BYTES, CORRUPT, table["state"].to_numpy()).astype(np.uint8)
    for name, column in (("state", pa.array(states)), ("reason", pa.array(reasons, pa.string()))):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where the parts of a section go, and what is in them beside scores."""

    out: str
    plan_sha256: str
    thresholds: dict[str, float]
    model_version: str
    first_part: int
    part_rows: int

    def put(self, rows: pa.Table, logits_NK: npt.NDArray[np.float32]) -> int:
        """Store the part that these rows are; its number. RunError if they are not one part, in order."""
        found = rows["row"].to_numpy()
        number, at = divmod(int(found[0]), self.part_rows)
        if at or len(found) > self.part_rows or not np.array_equal(found, np.arange(found[0], found[0] + len(found))):
            raise RunError(
                f"part {number}: found other rows than its own; this is a fault of the pipeline, please report it"
            )
        readable = pc.equal(rows["state"], OK).to_pylist()
        reasons = [None if good else why or "" for good, why in zip(readable, rows["reason"].to_pylist(), strict=True)]
        table = make_part(
            rows["image_id"].to_pylist(),
            rows["uri"].to_pylist(),
            reasons,
            logits_NK,
            thresholds=self.thresholds,
            model_version=self.model_version,
        )
        write_part(self.out, self.first_part + number, table, self.plan_sha256)
        return self.first_part + number


class ScoreParts:
    """A Ray Data actor: the decoded rows of a part to the part in storage; gives how many rows it has."""

    def __init__(self, checkpoint_uri: str, threads: int, store: Store):
        self.scorer, self.store = Scorer(checkpoint_uri, threads), store

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.filter(pc.not_equal(table["state"], PADDING)).combine_chunks()
        good = rows.filter(pc.equal(rows["state"], OK)).combine_chunks()
        logits = np.zeros((0, len(self.store.thresholds)), np.float32)
        number = self.store.put(rows, self.scorer.logits(good) if len(good) else logits)
        return pa.table({"part": [number], "rows": [len(rows)]})
