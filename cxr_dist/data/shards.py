"""Reading whole row groups of a dataset: out of its Parquet shards, or the PNG files of an in-place one.

A reader is small and picklable: arrays, and no object an image.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS, LABELS_SCHEMA, findings_matrix
from cxr_dist.data.nodecache import NodeCache
from cxr_dist.data.pages import BrokenPagesError, read_row_groups
from cxr_dist.data.places import Lookup, places
from cxr_dist.data.ranges import AHEAD_BYTES, ByteRanges
from cxr_dist.errors import DataError

__all__ = ["COLUMNS", "FileReader", "ShardReader", "reading"]

log = logging.getLogger(__name__)

COLUMNS = ("image_id", "findings", "image")

_MEND_SHARD = "the file was changed or cut, delete {uri}, then ingest again"
_MEND_IN_PLACE = "put the file back, or delete the dataset's manifest.json, then ingest again with --in-place"


class StoredFile(Protocol):
    """A shard as whatever lists it knows it."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardReader:
    """Row groups of Parquet shards that were written as ingest writes them."""

    ranges: ByteRanges
    num_rows: Lookup
    """Rows of each row group [G]."""
    schema: pa.Schema
    """What the shards were written with."""
    columns: tuple[str, ...] = COLUMNS
    """What is read of it."""

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, split: str, config: DataConfig | None = None
    ) -> "ShardReader | FileReader":
        """The reader of one split of a dataset; `config` says how it is read."""
        if manifest.in_place:
            return FileReader.from_manifest(manifest, split, config)
        image = pa.binary(manifest.size**2) if manifest.encoding == "pixels" else pa.binary()
        return cls.of_shards(
            manifest.files_uri,
            manifest.splits[split].shards,
            manifest.row_group_batches(split),
            schema=LABELS_SCHEMA.append(pa.field("image", image)),
            config=config,
        )

    @classmethod
    def of_shards(
        cls,
        root: str,
        shards: Sequence[StoredFile],
        row_groups: pa.Table | Iterable[pa.Table],
        *,
        schema: pa.Schema,
        columns: tuple[str, ...] = COLUMNS,
        missing: str = "expected a shard; ingest again",
        mend: str = _MEND_SHARD,
        config: DataConfig | None = None,
    ) -> "ShardReader":
        """The reader of any shards under `root`; `row_groups` says, whole or in pieces, where each lies: path, rows, offset, bytes.

        `missing` and `mend` are what a person is told of a lost and of a changed shard, `{uri}` in them.
        """
        paths = pa.array([shard.path for shard in shards], pa.string())
        pieces = [row_groups] if isinstance(row_groups, pa.Table) else row_groups
        found = places(_columns(pieces, paths))
        ranges = ByteRanges(
            root=root,
            paths=paths,
            file_bytes=np.array([shard.bytes for shard in shards], np.int64),
            file_sha256=pa.array([shard.sha256 for shard in shards], pa.string()),
            file_index=found.file_index,
            offset=found.offset,
            length=found.length,
            missing=missing,
            mend=mend,
            **reading(config),
        )
        return cls(ranges=ranges, num_rows=found.rows, schema=schema, columns=columns)

    def read(self, groups: npt.ArrayLike) -> pa.Table:
        """The rows of the row groups in the given order: `columns`, as stored.

        Raises DataError that names a file which is missing, or is not the one the manifest was written for.
        """
        return next(self.stream([groups]))

    def stream(self, runs: Iterable[npt.ArrayLike], ahead_bytes: int = AHEAD_BYTES) -> Iterator[pa.Table]:
        """`read` of each run of row groups in turn, while the bytes of the next are in flight (`ByteRanges.stream`)."""
        for numbers, pieces in self.ranges.stream(runs, ahead_bytes):
            yield self._rows(numbers, pieces)

    def _rows(self, numbers: npt.NDArray[np.int64], pieces: list[memoryview]) -> pa.Table:
        try:
            return read_row_groups(self.schema, self.columns, pieces, self.num_rows[numbers].tolist())
        except BrokenPagesError:
            pieces = [self._whole(number, piece) for number, piece in zip(numbers.tolist(), pieces, strict=True)]
            return read_row_groups(self.schema, self.columns, pieces, self.num_rows[numbers].tolist())

    def _whole(self, number: int, piece: memoryview) -> memoryview:
        """The bytes of a row group; read again, past the cache, if they are broken."""
        uri = storage.shown(self.ranges.uri(int(self.ranges.file_index[number])))
        for last in (False, True):
            try:
                read_row_groups(self.schema, self.columns, [piece], [int(self.num_rows[number])])
                return piece
            except BrokenPagesError as error:
                self.ranges.forget(number)
                if last:
                    raise DataError(
                        f"{uri}: found a broken shard ({error}); {self.ranges.mend.format(uri=uri)}"
                    ) from None
                log.warning("%s: found a broken row group (%s), read it again", uri, error)
                ((_, (piece,)),) = self.ranges.stream([[number]])
        raise AssertionError("unreachable")


@dataclass(frozen=True, kw_only=True, eq=False)
class FileReader:
    """The PNG files of an in-place dataset, each a row group of its own."""

    ranges: ByteRanges
    findings: npt.NDArray[np.bool_]
    """The fourteen findings of each file [G, 14]."""

    @classmethod
    def from_manifest(cls, manifest: Manifest, split: str, config: DataConfig | None = None) -> "FileReader":
        """The reader of one split of an in-place dataset."""
        table = manifest.row_groups(split)
        paths = pa.array(table["path"].to_numpy(zero_copy_only=False), pa.string())
        ranges = ByteRanges(
            root=manifest.files_uri,
            paths=paths,
            file_bytes=table["bytes"].to_numpy().copy(),
            file_sha256=None,
            identity=manifest.hash,
            file_index=np.arange(table.num_rows, dtype=np.int32),
            offset=np.zeros(table.num_rows, np.int64),
            length=table["bytes"].to_numpy().copy(),
            missing=f"expected an image; {_MEND_IN_PLACE}",
            mend=_MEND_IN_PLACE,
            **reading(config),
        )
        return cls(ranges=ranges, findings=findings_matrix(manifest.rows(split)))

    def read(self, groups: npt.ArrayLike) -> pa.Table:
        """The rows of the row groups in the given order: `COLUMNS`, images as they lie.

        Raises DataError that names a file which is missing, or has another size than the manifest says.
        """
        return next(self.stream([groups]))

    def stream(self, runs: Iterable[npt.ArrayLike], ahead_bytes: int = AHEAD_BYTES) -> Iterator[pa.Table]:
        """`read` of each run of row groups in turn, while the bytes of the next are in flight (`ByteRanges.stream`)."""
        for numbers, pieces in self.ranges.stream(runs, ahead_bytes):
            paths = self.ranges.paths.take(pa.array(self.ranges.file_index[numbers])).to_pylist()
            flat = pa.array(self.findings[numbers].reshape(-1))
            columns = [
                pa.array([path.rsplit("/", 1)[-1] for path in paths], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, len(FINDINGS)),
                pa.array(pieces, pa.binary()),
            ]
            yield pa.table(columns, names=list(COLUMNS))


def _columns(row_groups: Iterable[pa.Table], paths: pa.Array) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Number of the file among `paths`, offset, bytes and rows of each row group, piece by piece."""
    for table in row_groups:
        files = pc.index_in(table["path"], value_set=paths)
        if files.null_count:
            unknown = table["path"].filter(pc.is_null(files))[0].as_py()
            raise DataError(
                f"row groups: found the shard {unknown!r}, expected one that the manifest lists; ingest again"
            )
        yield tuple(column.to_numpy() for column in (files, table["offset"], table["bytes"], table["rows"]))


def reading(config: DataConfig | None) -> dict[str, Any]:
    """How `ByteRanges` reads, as the config says: its options of that name."""
    if config is None:
        return {}
    cache = NodeCache(folder=os.path.abspath(config.cache_dir), max_bytes=int(config.cache_gb * 1e9))
    return {"cache": cache if config.cache_dir else None, "timeout_s": config.read_timeout_s}
