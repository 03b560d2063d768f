"""Row groups out of their bytes alone, without the footer of the shard that they lie in.

The manifest says where the bytes of a row group begin and end, and ingest writes every shard in one way, so a footer
tells nothing that is not known: reading it would cost every decoding process a request a shard, 450 bytes a row group
(0.5 % of the pixels in row groups of two), and 1 to 3 kB of memory a row group for as long as it lives. Instead the
few row groups that are wanted become a Parquet file in memory: their bytes where they are, and a footer made for them
from their page headers. pyarrow reads it, and checks each page's checksum.

Layout and numbers: Apache Parquet format (parquet.thrift) in Thrift's compact protocol.
"""

import bisect
import functools
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["WRITE_OPTIONS", "BrokenPagesError", "read_row_groups"]

WRITE_OPTIONS = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
    "store_schema": True,
}
"""How shards are written (`pyarrow.parquet.write_table`); shards written otherwise are refused."""

_TYPES = {"BOOLEAN": 0, "INT32": 1, "INT64": 2, "FLOAT": 4, "DOUBLE": 5, "BYTE_ARRAY": 6, "FIXED_LEN_BYTE_ARRAY": 7}
_PLAIN, _RLE = 0, 3
_MAGIC = b"PAR1"
_NO_ROW_GROUPS = b"\x16\x00\x19\x0c"
"""FileMetaData of no rows: num_rows (field 3) 0, row_groups (field 4) an empty list of structs."""

_NUMBER = rb"[\x80-\xff]*[\x00-\x7f]"
_PAGE_HEADER = re.compile(
    rb"\x15\x00\x15" + _NUMBER + rb"\x15(" + _NUMBER + rb")\x15" + _NUMBER  # data page, size, size as stored, checksum
    + rb"\x1c\x15(" + _NUMBER + rb")\x15\x00\x15\x06\x15\x06"  # its values: how many, plain, levels in RLE
    + rb"(?:\x1c\x00)?\x00\x00",  # no statistics
    re.DOTALL,
)  # fmt: skip
"""A page header as pyarrow writes it with `WRITE_OPTIONS`: one match costs 1 us, a general parser 10."""


class BrokenPagesError(ValueError):
    """Bytes that are not the whole row group they should be."""


def read_row_groups(
    schema: pa.Schema, columns: Sequence[str], pieces: Sequence[memoryview], num_rows: Sequence[int]
) -> pa.Table:
    """The columns of row groups, given as their bytes, one after another. `schema` is what the shard was written with.

    Raises BrokenPagesError if any piece is not a row group of so many rows, or a page's checksum is wrong.
    """
    layout = _layout(schema, tuple(columns))
    bases = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    groups = [layout.row_group(piece, base, n) for piece, base, n in zip(pieces, bases, num_rows, strict=False)]
    total = sum(num_rows)
    # num_rows is field 3 of the footer, row_groups field 4
    footer = b"".join((layout.head, b"\x16", _zigzag(total), _list_header(len(groups), 12), *groups, layout.tail))
    file = b"".join((_MAGIC, footer, len(footer).to_bytes(4, "little"), _MAGIC))
    try:
        metadata = pq.read_metadata(pa.BufferReader(file))
        source = pa.PythonFile(_Pieces(pieces, bases), mode="r")
        # pre-buffering would read across the pieces
        with pq.ParquetFile(source, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as parquet:
            table = parquet.read(columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise BrokenPagesError(" ".join(str(error).split())[:160]) from None
    if table.num_rows != total:
        raise BrokenPagesError(f"found {table.num_rows} rows, expected {total}")
    return table.select(list(columns))


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One Parquet column: what of its metadata is the same in every row group."""

    wanted: bool
    values_a_row: int
    head: bytes
    """ColumnMetaData as far as the codec: type, encodings, path."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What the footers of all shards of a schema share."""

    head: bytes
    """FileMetaData as far as the schema."""
    tail: bytes
    """FileMetaData after the row groups."""
    leaves: tuple[_Leaf, ...]

    def row_group(self, piece: memoryview, base: int, rows: int) -> bytes:
        """The RowGroup struct of a piece that lies at `base` of the file in memory."""
        at = 0
        chunks = [_list_header(len(self.leaves), 12)]
        for leaf in self.leaves:
            start, values, expected = at, 0, rows * leaf.values_a_row
            while values < expected:
                header = _PAGE_HEADER.match(piece, at)
                if header is None:
                    raise BrokenPagesError(f"found no page header at byte {at} of a row group")
                values += _number(header[2])
                at = header.end() + _number(header[1])
            if values != expected:
                raise BrokenPagesError(f"found {values} values in a column, expected {expected}")
            if leaf.wanted:
                chunks.append(_chunk(leaf.head, expected, at - start, base + start))
            else:
                chunks.append(_unread_chunk(leaf.head, expected))
        if at != len(piece):
            raise BrokenPagesError(f"found pages of {at} bytes in a row group of {len(piece)}")
        return b"".join((*chunks, b"\x16", _zigzag(len(piece)), b"\x16", _zigzag(rows), b"\x00"))


@functools.lru_cache(maxsize=16)
def _layout(schema: pa.Schema, columns: tuple[str, ...]) -> _Layout:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema, **WRITE_OPTIONS).close()
    data = sink.getvalue()
    footer_head, mark, tail = data[4:-8].partition(_NO_ROW_GROUPS)
    if not mark or _NO_ROW_GROUPS in tail:
        raise AssertionError("pyarrow writes the footer of an empty table in another way than this module knows")
    parquet = pq.read_schema(io.BytesIO(data))
    if parquet != schema:
        raise ValueError(f"found a schema that Parquet gives back as another: {schema}")
    leaves = []
    written = pq.read_metadata(io.BytesIO(data)).schema
    for number in range(len(written)):
        column = written.column(number)
        path = column.path.split(".")
        kind = schema.field(path[0]).type
        if pa.types.is_nested(kind) and not pa.types.is_fixed_size_list(kind):
            raise ValueError(f"{path[0]}: found {kind}, expected plain values or a fixed-size list of them")
        leaves.append(
            _Leaf(
                wanted=path[0] in columns,
                values_a_row=kind.list_size if pa.types.is_fixed_size_list(kind) else 1,
                head=_metadata_head(_TYPES[column.physical_type], path),
            )
        )
    return _Layout(head=footer_head, tail=tail, leaves=tuple(leaves))


def _metadata_head(physical_type: int, path: list[str]) -> bytes:
    """Fields 1 to 4 of a ColumnMetaData: type, encodings, path, no compression."""
    names = b"".join(_varint(len(name.encode())) + name.encode() for name in path)
    encodings = _list_header(2, 5) + _zigzag(_PLAIN) + _zigzag(_RLE)
    return b"\x15" + _zigzag(physical_type) + encodings + _list_header(len(path), 8) + names + b"\x15\x00"


def _chunk(head: bytes, values: int, num_bytes: int, offset: int) -> bytes:
    """A ColumnChunk: file_offset (2), meta_data (3) with values (5), sizes (6, 7) and data_page_offset (9)."""
    size, place = _zigzag(num_bytes), _zigzag(offset)
    return b"".join(
        (b"\x26", place, b"\x1c", head, b"\x16", _zigzag(values), b"\x16", size, b"\x16", size, b"\x26", place, b"\0\0")
    )


@functools.lru_cache(maxsize=256)
def _unread_chunk(head: bytes, values: int) -> bytes:
    """The ColumnChunk of a column that is not asked for. It has no place, but pyarrow counts rows by its values."""
    return _chunk(head, values, 0, 4)


def _list_header(length: int, kind: int) -> bytes:
    """A list as the next field of a struct: field header, then length and kind of its elements."""
    return b"\x19" + (bytes([length << 4 | kind]) if length < 15 else bytes([0xF0 | kind]) + _varint(length))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _zigzag(value: int) -> bytes:
    return _varint(value << 1)  # never negative here


def _number(data: bytes) -> int:
    value = 0
    for shift, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * shift
    return value >> 1


class _Pieces:
    """Buffers one after another as a file for pyarrow, which copies nothing out of it.

    Joining them instead costs 25 us an image in steps larger than the processor's cache.
    """

    closed = False

    def __init__(self, pieces: Sequence[memoryview], bases: Sequence[int]):
        self.pieces, self.bases, self.at = pieces, bases, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.bases[-1])[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read_buffer(self, nbytes: int) -> memoryview:
        """Bytes that lie in one piece, as every column of a row group does."""
        number = bisect.bisect_right(self.bases, self.at) - 1
        start = self.at - self.bases[number]
        self.at += nbytes
        return self.pieces[number][start : start + nbytes]

    read = read_buffer

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass
