"""Parquet files that somebody else may have written, as tables of plain values.

Where Ray Data is imported, Arrow knows a type whose cells are pickles, and `to_pylist` or `to_pandas` of such a column
runs what is in them: not reading such a file, but looking at it. Ray's own readers refuse it
(pull request 63470 of ray-project/ray), pyarrow's know nothing of it. Nothing that this project writes has such a column.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["open_table", "read_table"]


def read_table(
    data: bytes | pa.Buffer, *, page_checksum_verification: bool = False, use_threads: bool = True
) -> pa.Table:
    """The table in the bytes of a Parquet file. Raises pa.ArrowException or OSError for any other, and for one with a
    column of an extension type, on whatever level."""
    source = pa.BufferReader(data) if isinstance(data, pa.Buffer) else io.BytesIO(data)
    table = pq.read_table(source, page_checksum_verification=page_checksum_verification, use_threads=use_threads)
    _check_plain(table.schema)
    return table


def open_table(file: pa.NativeFile, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """The Parquet file, nothing of it read but its footer (not even that where its `metadata` is given). Raises as `read_table`."""
    parquet = pq.ParquetFile(file, metadata=metadata, pre_buffer=False)
    _check_plain(parquet.schema_arrow)
    return parquet


def _check_plain(schema: pa.Schema) -> None:
    for field in schema:
        if not _is_plain(field.type):
            raise pa.ArrowTypeError(f"column {field.name} of type {field.type}, expected plain values")


def _is_plain(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return False
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return all(_is_plain(kind.field(number).type) for number in range(kind.num_fields))
