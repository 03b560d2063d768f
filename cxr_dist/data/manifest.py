"""The manifest: what a dataset holds, where every row lies, where it came from, and what was left out.

`manifest.json` is small and written last; what has one row an image lies in Parquet side tables beside it, whose SHA-256
it records. Rows of a split have a fixed place: row i lies in row group i // row_group, and every row group is full but
the last of the split. Shard paths are relative to the dataset's URI, or to `root` (the release) of an in-place manifest.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cxr_dist import storage
from cxr_dist.data import fields
from cxr_dist.data.nih import LABEL_SETS, LABELS_SCHEMA, SPLITS, finding_columns, findings_matrix
from cxr_dist.data.sidetables import SideTable, opened, put_table
from cxr_dist.errors import DataError

FORMAT = 1
"""Version of manifest.json and its side tables."""

MANIFEST = "manifest.json"
NAMED_QUARANTINED = 100
"""Quarantined images named in manifest.json itself; all of them are in quarantine.parquet."""

ROW_GROUPS_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("row_group_in_file", pa.int32()),
        ("rows", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
"""A row a row group: file, place in it, images, and the byte range that holds it."""

_TABLES = ("rows", "row_groups", "quarantine")

QUARANTINE_SCHEMA = pa.schema([("image_id", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of a split."""

    path: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """Counts of one split, and its files (none listed for an in-place manifest: they are in the row group table)."""

    shards: tuple[Shard, ...]
    num_rows: int
    num_row_groups: int
    patients: int
    positives: dict[str, int]
    """Images with each finding of the label set."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset as training and evaluation see it; `uri` and `hash` belong to the copy that was loaded or saved."""

    label_set: str
    findings: tuple[str, ...]
    """The findings that are trained and scored, in order; shards hold all fourteen."""
    encoding: str
    """`png`: a row holds the original file; `pixels`: size*size grey bytes."""
    size: int
    pixels_version: str
    row_group: int
    in_place: bool
    root: str = ""
    """URI that the paths of an in-place manifest are relative to; empty: the dataset's own."""
    seed: int
    validation_fraction: float
    splits: dict[str, Split]
    audit: dict
    sources: dict
    """Where the rows came from: names and SHA-256 of label file and lists, the release's file list."""
    settings: dict
    """What decides the dataset's bytes; ingest compares it before it goes on or calls the work done."""
    counts: dict[str, int]
    """missing_images, duplicate_images, cleaned_images, quarantined."""
    quarantine: tuple[dict[str, str], ...]
    """The first images left out, as {image_id, reason}."""
    tables: dict[str, SideTable] = field(default_factory=dict)
    uri: str = ""
    hash: str = ""
    """SHA-256 of manifest.json, hex: the dataset's identity."""

    @classmethod
    def load(cls, uri: str) -> "Manifest":
        """The manifest of the dataset at `uri`. Raises DataError for none, an unknown format or a broken file."""
        where = storage.join(uri, MANIFEST)
        try:
            data = storage.read_bytes(where)
        except FileNotFoundError:
            raise DataError(
                f"{storage.shown(where)}: found no manifest; run jobs/ingest.py with this data.uri (it ends by writing one)"
            ) from None
        return cls.from_json(data, uri)

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> "Manifest":
        """The manifest in the bytes of a manifest.json that lies at `uri`."""
        where = storage.shown(storage.join(uri, MANIFEST))
        try:
            raw = fields.loads(data)
            version = raw.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(
                f"{where}: found no manifest of this project in it; delete {where}, then ingest again"
            ) from None
        if version != FORMAT:
            raise DataError(
                f"{where}: found manifest format {_brief(str(version))}, this version reads {FORMAT}; "
                f"read it with the cxr-dist whose data.manifest.FORMAT is that, or ingest again to another data.uri"
            )
        try:
            if not {"uri", "hash"}.isdisjoint(raw):
                raise fields.WrongFieldError("manifest: found uri or hash, expected neither")
            digest = hashlib.sha256(data).hexdigest()
            manifest = fields.typed(cls, {**raw, "uri": uri, "hash": digest}, "manifest")
        except fields.WrongFieldError as error:
            raise DataError(f"{where}: {_brief(str(error))}; ingest again to another data.uri") from None
        if wrong := next(_contradictions(manifest), ""):
            raise DataError(f"{where}: found {_brief(wrong)}; the file was changed, ingest again to another data.uri")
        return manifest

    def to_json(self) -> bytes:
        """The bytes of manifest.json: the same manifest gives the same bytes, wherever it lies."""
        raw = dataclasses.asdict(self)
        del raw["uri"], raw["hash"]
        return (json.dumps({"format": FORMAT, **raw}, indent=1, ensure_ascii=False) + "\n").encode()

    def save(
        self,
        uri: str,
        rows: Mapping[str, pa.Table | Iterable[pa.Table]],
        row_groups: Mapping[str, pa.Table | Iterable[pa.Table]],
        quarantine: Sequence[tuple[str, str]] = (),
    ) -> "Manifest":
        """Write side tables, then manifest.json, and give the manifest as `load` would.

        `rows` and `row_groups` hold each split's table in placement order, whole or in pieces; `quarantine` all
        (image id, reason) pairs.
        """
        left_out = pa.Table.from_pylist([{"image_id": i, "reason": r} for i, r in quarantine], QUARANTINE_SCHEMA)
        tables = {
            "rows": put_table(uri, "rows.parquet", _pieces(rows), LABELS_SCHEMA),
            "row_groups": put_table(uri, "row_groups.parquet", _pieces(row_groups), ROW_GROUPS_SCHEMA),
            "quarantine": put_table(uri, "quarantine.parquet", [left_out], QUARANTINE_SCHEMA),
        }
        named = tuple({"image_id": image_id, "reason": reason} for image_id, reason in quarantine[:NAMED_QUARANTINED])
        manifest = dataclasses.replace(self, tables=tables, quarantine=named)
        data = manifest.to_json()
        storage.put_atomic(storage.join(uri, MANIFEST), data)
        return dataclasses.replace(manifest, uri=uri, hash=hashlib.sha256(data).hexdigest())

    def rows(self, split: str) -> pa.Table:
        """The label rows of a split in placement order: image_id, patient_id, view, age, sex, follow_up, findings[14]."""
        start, length = self._part("rows", split)
        return opened(self.uri, self.tables["rows"]).read(start, length).cast(LABELS_SCHEMA)

    def row_batches(self, split: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of `rows`, some tens of thousands of rows at a time: a split may be larger than memory."""
        start, length = self._part("rows", split)
        schema = pa.schema([LABELS_SCHEMA.field(name) for name in columns])
        for table in opened(self.uri, self.tables["rows"]).batches(start, length, columns):
            yield table.select(list(columns)).cast(schema)

    def row_groups(self, split: str) -> pa.Table:
        """The row groups of a split in placement order: path, row_group_in_file, rows, offset, bytes."""
        return opened(self.uri, self.tables["row_groups"]).read(*self._part("row_groups", split))

    def row_group_batches(self, split: str) -> Iterator[pa.Table]:
        """`row_groups`, some tens of thousands at a time."""
        return opened(self.uri, self.tables["row_groups"]).batches(*self._part("row_groups", split))

    def labels(self, split: str) -> np.ndarray:
        """bool [rows, findings]: the label set's findings in its order."""
        return findings_matrix(self.rows(split))[:, finding_columns(self.label_set)]

    def all_quarantined(self) -> pa.Table:
        """Every image that was left out: image_id, reason."""
        return opened(self.uri, self.tables["quarantine"]).read()

    @property
    def files_uri(self) -> str:
        """URI that the paths of the row group table are relative to."""
        return self.root or self.uri

    def _part(self, table: str, split: str) -> tuple[int, int]:
        """First row and number of rows of a split in a side table."""
        if split not in self.splits:
            raise DataError(
                f"{storage.shown(self.uri)}: found no split {split!r}, expected one of {', '.join(self.splits)}"
            )
        lengths = [found.num_rows if table == "rows" else found.num_row_groups for found in self.splits.values()]
        at = list(self.splits).index(split)
        return sum(lengths[:at]), lengths[at]


def _brief(text: str) -> str:
    """What was found, on one line: it may hold anything."""
    return " ".join(text.split())[:300]


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What in a manifest cannot be, or does not agree with the rest of it: found, expected."""
    if LABEL_SETS.get(manifest.label_set) != manifest.findings:
        yield f"label set {manifest.label_set!r} with findings {', '.join(manifest.findings)}, expected the set's own"
    if manifest.encoding not in ("png", "pixels"):
        yield f"encoding {manifest.encoding!r}, expected png or pixels"
    if not (manifest.size and manifest.row_group and 0 < manifest.validation_fraction < 1):
        yield "a size, row_group or validation_fraction of nothing, expected more"
    if tuple(manifest.splits) != SPLITS:
        yield f"splits {', '.join(manifest.splits)}, expected {', '.join(SPLITS)}"
    for name, split in manifest.splits.items():
        yield from _split_contradictions(name, split, manifest)
    if set(manifest.tables) != set(_TABLES):
        yield f"tables {', '.join(manifest.tables)}, expected {', '.join(_TABLES)}"
    counted = {
        "rows": sum(split.num_rows for split in manifest.splits.values()),
        "row_groups": sum(split.num_row_groups for split in manifest.splits.values()),
    }
    for name, rows in counted.items():
        if manifest.tables[name].rows != rows:
            yield f"{rows} {name} in the splits, expected the {manifest.tables[name].rows} of their table"
    if len(manifest.quarantine) != min(NAMED_QUARANTINED, manifest.tables["quarantine"].rows):
        yield f"{len(manifest.quarantine)} quarantined images, expected those of their table"
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    files: list[Shard | SideTable] = [*manifest.tables.values(), *shards]
    for file in files:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", file.path) or ".." in file.path.split("/"):
            yield f"path {file.path!r}, expected one under the dataset"
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            yield f"SHA-256 {file.sha256!r} of {file.path}, expected 64 hexadecimal digits"


def _split_contradictions(name: str, split: Split, manifest: Manifest) -> Iterator[str]:
    in_shards = sum(shard.rows for shard in split.shards)
    if not manifest.in_place and in_shards != split.num_rows:
        yield f"{split.num_rows} rows in {name}, expected the {in_shards} of its shards"
    if split.num_row_groups != -(-split.num_rows // manifest.row_group):
        yield f"{split.num_row_groups} row groups in {name}, expected {split.num_rows} rows in groups of {manifest.row_group}"
    if tuple(split.positives) != manifest.findings:
        yield f"positives of {', '.join(split.positives)} in {name}, expected the findings"
    if max(split.patients, *split.positives.values()) > split.num_rows:
        yield f"more patients or positives than the {split.num_rows} rows of {name}, expected at most as many"


def _pieces(parts: Mapping[str, pa.Table | Iterable[pa.Table]]) -> Iterator[pa.Table]:
    for split in SPLITS:
        part = parts[split]
        yield from [part] if isinstance(part, pa.Table) else part
