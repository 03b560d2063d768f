"""Reading whole row groups of a dataset: large ranged reads of Parquet shards, or the PNG files of an in-place one.

A `ShardReader` is small and picklable (arrays, no object an image); opened files and their footers are kept per process.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cxr_dist import storage
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS, findings_matrix
from cxr_dist.errors import DataError

COLUMNS = ("image_id", "findings", "image")
OPEN_FILES = 256
"""Shards whose footers a process keeps."""
READ_THREADS = 8
"""Files read at the same time; it hides the latency of an object store."""

_MEND_IN_PLACE = "put the file back, or delete the dataset's manifest.json, then ingest again with --in-place"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardReader:
    """Where the row groups of one split lie: file, place in it, and what each file must be."""

    root: str
    in_place: bool
    paths: pa.StringArray
    """Files, relative to `root` [F]."""
    file_bytes: npt.NDArray[np.int64]
    """Size that each file must have [F]."""
    file_index: npt.NDArray[np.int32]
    """File of each row group [G]."""
    row_group_in_file: npt.NDArray[np.int32]
    """Row group's place in its file [G]."""
    num_rows: npt.NDArray[np.int32]
    """Images in each row group [G]."""
    findings: npt.NDArray[np.bool_]
    """In place only: the fourteen findings of each row [G, 14]; shards hold their own."""
    columns: tuple[str, ...] = COLUMNS
    """What is read of a shard."""

    @classmethod
    def from_manifest(cls, manifest: Manifest, split: str) -> "ShardReader":
        """The reader of one split of a dataset."""
        table = manifest.row_groups(split)
        in_place = manifest.in_place
        if in_place:
            paths = pa.array(table["path"].to_numpy(zero_copy_only=False), pa.string())
            file_index = np.arange(table.num_rows, dtype=np.int32)
            file_bytes = table["bytes"].to_numpy()
        else:
            shards = manifest.splits[split].shards
            at = {shard.path: index for index, shard in enumerate(shards)}
            paths = pa.array([shard.path for shard in shards], pa.string())
            file_index = np.fromiter((at[path] for path in table["path"].to_pylist()), np.int32, table.num_rows)
            file_bytes = np.array([shard.bytes for shard in shards], np.int64)
        findings = findings_matrix(manifest.rows(split)) if in_place else np.zeros((0, len(FINDINGS)), bool)
        return cls(
            root=manifest.files_uri,
            in_place=in_place,
            paths=paths,
            file_bytes=file_bytes.copy(),
            file_index=file_index,
            row_group_in_file=table["row_group_in_file"].to_numpy().copy(),
            num_rows=table["rows"].to_numpy().copy(),
            findings=findings,
        )

    def read(self, groups: npt.ArrayLike) -> pa.Table:
        """The rows of the row groups in the given order: image_id, findings[14], image (as stored).

        Raises DataError that names a file which is missing, or is not the one the manifest was written for.
        """
        wanted = np.asarray(groups, np.int64)
        if wanted.size == 0:
            raise ValueError("found no row groups to read, expected at least one")
        return self._read_files(wanted) if self.in_place else self._read_shards(wanted)

    def _read_shards(self, wanted: npt.NDArray[np.int64]) -> pa.Table:
        files = np.unique(self.file_index[wanted])
        pieces: dict[int, pa.Table] = {}

        def read(file: int) -> None:
            mine = wanted[self.file_index[wanted] == file]
            mine = np.unique(mine)
            table = self._row_groups_of(file, self.row_group_in_file[mine].tolist())
            ends = np.cumsum(self.num_rows[mine])
            if table.num_rows != ends[-1]:
                raise DataError(
                    f"{storage.shown(self._where(file))}: found {table.num_rows} rows, expected {ends[-1]}; "
                    + _mend(self._where(file))
                )
            for group, end in zip(mine.tolist(), ends.tolist(), strict=True):
                pieces[group] = table.slice(end - int(self.num_rows[group]), int(self.num_rows[group]))

        _each(read, files.tolist())
        return pa.concat_tables([pieces[group] for group in wanted.tolist()])

    def _row_groups_of(self, file: int, row_groups: list[int]) -> pa.Table:
        uri = storage.join(self.root, self.paths[file].as_py())

        def read() -> pa.Table:
            source, footer = _open(uri, int(self.file_bytes[file]))
            # A new ParquetFile each time: one keeps what it pre-buffered, and is not for several threads.
            with pq.ParquetFile(source, metadata=footer, pre_buffer=True, page_checksum_verification=True) as parquet:
                return parquet.read_row_groups(row_groups, columns=list(self.columns), use_threads=False)

        try:
            return storage.retry(read, uri)
        except FileNotFoundError:
            raise DataError(f"{storage.shown(uri)}: found no file, expected a shard; ingest again") from None
        except (pa.ArrowInvalid, OSError) as error:
            _open.cache_clear()
            raise DataError(
                f"{storage.shown(uri)}: found a broken shard ({' '.join(str(error).split())[:160]}); {_mend(uri)}"
            ) from None

    def _read_files(self, wanted: npt.NDArray[np.int64]) -> pa.Table:
        data: dict[int, bytes] = {}

        def read(row: int) -> None:
            uri = self._where(row)
            try:
                data[row] = storage.read_bytes(uri)
            except FileNotFoundError:
                raise DataError(f"{storage.shown(uri)}: found no file, expected an image; {_MEND_IN_PLACE}") from None
            if len(data[row]) != self.file_bytes[row]:
                raise DataError(
                    f"{storage.shown(uri)}: found {len(data[row])} bytes, the manifest says {self.file_bytes[row]}; {_MEND_IN_PLACE}"
                )

        _each(read, wanted.tolist())
        names = [path.rsplit("/", 1)[-1] for path in self.paths.take(pa.array(wanted)).to_pylist()]
        flat = pa.array(self.findings[wanted].reshape(-1))
        findings = pa.FixedSizeListArray.from_arrays(flat, len(FINDINGS))
        images = pa.array([data[row] for row in wanted.tolist()], pa.binary())
        return pa.table([pa.array(names, pa.string()), findings, images], names=list(COLUMNS))

    def _where(self, file: int) -> str:
        return storage.join(self.root, self.paths[file].as_py())


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(uri: str, expected_bytes: int) -> tuple[pa.NativeFile, pq.FileMetaData]:
    source = storage.open_input(uri)
    if source.size() != expected_bytes:
        raise DataError(
            f"{storage.shown(uri)}: found {source.size()} bytes, the manifest says {expected_bytes}; {_mend(uri)}"
        )
    return source, pq.read_metadata(source)


def _mend(uri: str) -> str:
    return f"the file was changed or cut, delete {storage.shown(uri)}, then ingest again"


def _each(read: Callable[[int], None], numbers: list[int]) -> None:
    if len(numbers) == 1:
        read(numbers[0])
        return
    for _ in _pool().map(read, numbers):
        pass


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READ_THREADS, "read")
