"""Row groups out of their bytes alone: what pyarrow reads with the footer, and nothing from broken bytes."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_dist.data.nih import LABELS_SCHEMA
from cxr_dist.data.pages import WRITE_OPTIONS, BrokenPagesError, read_row_groups

SCHEMA = LABELS_SCHEMA.append(pa.field("image", pa.binary()))


def shard(table: pa.Table, row_group: int) -> tuple[bytes, list[memoryview], list[int]]:
    """A shard with what its footer says of it: bytes and rows of each row group."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group, **WRITE_OPTIONS)
    data = sink.getvalue()
    footer = pq.read_metadata(io.BytesIO(data))
    pieces, rows = [], []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        start = min(column.data_page_offset for column in columns)
        pieces.append(memoryview(data)[start : start + sum(column.total_compressed_size for column in columns)])
        rows.append(group.num_rows)
    return data, pieces, rows


def rows_of(num_rows: int, image_bytes: int, fixed: bool, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    kind = pa.binary(image_bytes) if fixed else pa.binary()
    sizes = [image_bytes] * num_rows if fixed else rng.integers(0, image_bytes + 1, num_rows).tolist()
    columns = {
        "image_id": [f"{number:08d}_000.png" for number in range(num_rows)],
        "patient_id": rng.integers(0, 1 << 31, num_rows).tolist(),
        "view": ["PA", "AP"] * (num_rows // 2) + ["AP"] * (num_rows % 2),
        "age": rng.integers(0, 99, num_rows).tolist(),
        "sex": ["F"] * num_rows,
        "follow_up": rng.integers(0, 99, num_rows).tolist(),
        "findings": rng.integers(0, 2, (num_rows, 14)).astype(bool).tolist(),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in LABELS_SCHEMA]
    images = pa.array([rng.bytes(size) for size in sizes], kind)
    return pa.table([*arrays, images], schema=LABELS_SCHEMA.append(pa.field("image", kind)))


@given(
    num_rows=st.integers(1, 40),
    row_group=st.integers(1, 41),
    image_bytes=st.integers(1, 300),
    fixed=st.booleans(),
    columns=st.lists(st.sampled_from(SCHEMA.names), min_size=1, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_row_groups_in_any_order_are_what_pyarrow_reads(num_rows, row_group, image_bytes, fixed, columns, data):
    table = rows_of(num_rows, image_bytes, fixed)
    _, pieces, rows = shard(table, row_group)
    wanted = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=6))
    found = read_row_groups(table.schema, columns, [pieces[n] for n in wanted], [rows[n] for n in wanted])
    expected = pa.concat_tables([table.slice(n * row_group, row_group) for n in wanted]).select(columns)
    assert found.schema == expected.schema
    assert found.equals(expected)


@pytest.mark.parametrize("fixed", [True, False])
def test_columns_of_several_pages(fixed):
    table = rows_of(2500, 2000, fixed)  # pages are cut at 1 MiB, or 1024 values
    data, pieces, rows = shard(table, 2500)
    assert data.count(b"\x15\x00\x15\x06\x15\x06") > len(table.schema)  # page headers
    assert read_row_groups(table.schema, table.schema.names, pieces, rows).equals(table)


def test_nulls_and_small_integers():
    table = pa.table({"state": pa.array([0, 1, 2, 0], pa.uint8()), "reason": pa.array([None, "truncated", None, ""])})
    _, pieces, rows = shard(table, 3)
    assert read_row_groups(table.schema, ["state", "reason"], pieces, rows).equals(table)


def test_many_row_groups():
    table = rows_of(200, 10, True)
    _, pieces, rows = shard(table, 1)
    assert read_row_groups(table.schema, ["image_id", "image"], pieces, rows).equals(
        table.select(["image_id", "image"])
    )


def test_every_flipped_bit_of_what_is_read_is_found():
    table = rows_of(3, 20, True)
    _, (piece,), rows = shard(table, 3)
    whole = read_row_groups(table.schema, ["findings", "image"], [piece], rows)
    missed = 0
    for at in range(len(piece)):
        flipped = bytearray(piece)
        flipped[at] ^= 16
        try:
            found = read_row_groups(table.schema, ["findings", "image"], [memoryview(flipped)], rows)
        except BrokenPagesError:
            continue
        missed += 1
        assert found.equals(whole), at  # in a column that is not read
    assert missed < len(piece) / 2


@pytest.mark.parametrize("change", ["cut", "longer", "shifted", "empty", "other rows", "other schema", "other file"])
def test_what_is_no_row_group_is_refused(change):
    table = rows_of(8, 20, True)
    data, pieces, rows = shard(table, 8)
    piece, schema = pieces[0], table.schema
    if change == "other rows":
        rows = [7]
    if change == "other schema":
        schema = LABELS_SCHEMA.append(pa.field("image", pa.binary(21)))
    replaced = {
        "cut": piece[:-1],
        "longer": memoryview(data)[4 : 4 + len(piece) + 1],
        "shifted": memoryview(data)[3 : 3 + len(piece)],
        "empty": piece[:0],
        "other file": memoryview(np.random.default_rng(0).bytes(len(piece))),
    }
    with pytest.raises(BrokenPagesError, match=r"found|page|Unexpected"):
        read_row_groups(schema, ["image_id", "image"], [replaced.get(change, piece)], rows)


def test_shards_written_otherwise_are_refused():
    table = rows_of(8, 20, True)
    for option in ({"compression": "zstd"}, {"use_dictionary": True}, {"write_page_checksum": False}):
        sink = io.BytesIO()
        pq.write_table(table, sink, **{**WRITE_OPTIONS, **option})
        group = pq.read_metadata(io.BytesIO(sink.getvalue())).row_group(0)
        size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        with pytest.raises(BrokenPagesError):
            read_row_groups(table.schema, ["image"], [memoryview(sink.getvalue())[4 : 4 + size]], [8])


def test_lists_of_any_length_are_not_for_this_module():
    with pytest.raises(ValueError, match="fixed-size list"):
        read_row_groups(pa.schema([("a", pa.list_(pa.int32()))]), ["a"], [memoryview(b"x")], [1])
