"""Parquet tables beside a manifest, one row an image or a row group: written in pieces, checked once, read in parts.

A hundred million rows are more than a process should hold. A table is therefore written from pieces as they come, and
opening one holds nothing of a large file but its footer: its bytes are hashed on their way (a remote file's on its way to
a file without a name on this machine's disk), and what is asked for is decoded when it is asked for.
"""

import functools
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.data.tables import open_table
from cxr_dist.errors import DataError

__all__ = ["KEPT_BYTES", "OpenedTable", "SideTable", "opened", "put_table"]

ROWS_TOGETHER = 1 << 20
"""Rows of a row group of these tables: what is decoded to read any of them."""

BATCH_ROWS = 1 << 14
"""Rows that are in memory at a time where a table is gone through."""

KEPT_BYTES = 16 << 20
"""Largest file that stays in memory; NIH's row table has 0.6 MB. Of larger ones only what is asked for is read."""

PIECE = 4 << 20
"""Bytes that are hashed and copied at a time."""


@dataclass(frozen=True, kw_only=True)
class SideTable:
    """One Parquet table beside manifest.json."""

    path: str
    bytes: int
    sha256: str
    rows: int


class OpenedTable:
    """A side table whose bytes were found to be the manifest's; any number of threads may read it."""

    def __init__(self, file: pa.NativeFile):
        self._file = file
        parquet = open_table(file)
        self.metadata: pq.FileMetaData = parquet.metadata
        sizes = (self.metadata.row_group(number).num_rows for number in range(self.metadata.num_row_groups))
        self._ends = list(itertools.accumulate(sizes))

    @property
    def num_rows(self) -> int:
        return int(self.metadata.num_rows)

    def read(self, start: int = 0, length: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows from `start` on as one table, of those columns (all)."""
        schema = open_table(self._file, self.metadata).schema_arrow
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        return pa.concat_tables([schema.empty_table(), *self.batches(start, length, columns)])

    def batches(
        self, start: int = 0, length: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """The same rows, some tens of thousands at a time; what was given is not held."""
        stop = self.num_rows if length is None else start + length
        before = [0, *self._ends[:-1]]
        wanted = [n for n, end in enumerate(self._ends) if before[n] < stop and end > start]
        if not wanted or stop <= start:
            return
        at = before[wanted[0]]
        parquet = open_table(self._file, self.metadata)
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=wanted, columns=columns, use_threads=False):
            first, last = max(start - at, 0), min(stop - at, batch.num_rows)
            at += batch.num_rows
            if first < last:
                yield pa.Table.from_batches([batch]).slice(first, last - first).replace_schema_metadata(None)


@functools.lru_cache(maxsize=8)
def opened(uri: str, side: SideTable) -> OpenedTable:
    """The table beside the manifest at `uri`. DataError for one that is not there, is another, or is no plain Parquet."""
    where = storage.join(uri, side.path)
    shown = storage.shown(where)
    try:
        file, digest = _checked_file(where, side)
    except FileNotFoundError:
        raise DataError(f"{shown}: found no file, expected the manifest's table; ingest again") from None
    if digest != side.sha256:
        raise DataError(
            f"{shown}: found a SHA-256 that is not the manifest's ({side.sha256[:12]}…); "
            f"the file was changed or cut, delete {shown}, then ingest again"
        )
    try:
        table = OpenedTable(file)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{shown}: cannot be read ({reason}); ingest again") from None
    if table.num_rows != side.rows:
        raise DataError(f"{shown}: found {table.num_rows} rows, expected the manifest's {side.rows}; ingest again")
    return table


def put_table(uri: str, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> SideTable:
    """Write the rows of the tables, one after another, as the Parquet file `name` beside the manifest at `uri`.

    The same rows give the same bytes, however they are cut.
    """
    rows = 0
    with tempfile.TemporaryDirectory(prefix="cxr-dist-table-") as folder:
        path = os.path.join(folder, name)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in _together(tables, schema):
                writer.write_table(table, row_group_size=ROWS_TOGETHER)
                rows += table.num_rows
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
        storage.upload_atomic(path, storage.join(uri, name))
        return SideTable(path=name, bytes=os.path.getsize(path), sha256=digest.hexdigest(), rows=rows)


def _together(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of ROWS_TOGETHER, each in one piece; an empty one if there are none."""
    held = schema.empty_table()
    for table in itertools.chain(tables, [None]):
        if table is not None:
            held = pa.concat_tables([held, table.replace_schema_metadata(None).cast(schema)])
        while held.num_rows >= ROWS_TOGETHER:
            yield held.slice(0, ROWS_TOGETHER).combine_chunks()
            held = held.slice(ROWS_TOGETHER)
    if held.num_rows:
        yield held.combine_chunks()


def _checked_file(where: str, side: SideTable) -> tuple[pa.NativeFile, str]:
    """The file's bytes, wherever they stay, and their SHA-256 (of whatever is there, if it is of another size)."""
    if side.bytes <= KEPT_BYTES:
        data = storage.read_bytes(where)
        return pa.BufferReader(data), hashlib.sha256(data).hexdigest()
    if storage.is_local(where):
        # no memory map: its pages would count as this process's memory
        file = pa.OSFile(storage.resolve(where)[1], "r")
        digest = hashlib.sha256()
        while piece := file.read(PIECE):
            digest.update(piece)
        return file, digest.hexdigest()
    return storage.retry(lambda: _copied(where), where)


def _copied(where: str) -> tuple[pa.NativeFile, str]:
    """A copy on this machine's disk that is gone with the process, and its SHA-256."""
    digest, target = hashlib.sha256(), _unnamed()
    with storage.open_stream(where) as source:
        while piece := source.read(PIECE):
            digest.update(piece)
            target.write(piece)
    target.flush()
    return pa.PythonFile(target, mode="r"), digest.hexdigest()


def _unnamed() -> Any:
    return tempfile.TemporaryFile(prefix="cxr-dist-table-")
