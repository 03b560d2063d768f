"""Side tables: written from pieces, checked whole, read in parts; the same rows whichever way. No Ray."""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.data import sidetables
from cxr_dist.data.sidetables import SideTable, opened, put_table
from cxr_dist.errors import DataError

SCHEMA = pa.schema([("image_id", pa.string()), ("n", pa.int32())])


def rows(count: int) -> pa.Table:
    return pa.table([[f"{n}.png" for n in range(count)], pa.array(range(count), pa.int32())], schema=SCHEMA)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of 100 rows, ten at a time."""
    monkeypatch.setattr(sidetables, "ROWS_TOGETHER", 100)
    monkeypatch.setattr(sidetables, "BATCH_ROWS", 10)


@pytest.mark.parametrize("cuts", [[], [1], [100, 200], [99, 101, 350], list(range(1, 351))])
def test_the_same_rows_give_the_same_bytes_however_they_are_cut(tmp_path: Path, small: None, cuts: list[int]) -> None:
    table = rows(351)
    pieces = [table.slice(start, end - start) for start, end in zip([0, *cuts], [*cuts, 351], strict=True)]
    whole = put_table(str(tmp_path / "a"), "rows.parquet", [table], SCHEMA)
    cut = put_table(str(tmp_path / "b"), "rows.parquet", iter(pieces), SCHEMA)
    assert cut == whole
    assert (whole.rows, whole.path) == (351, "rows.parquet")
    data = (tmp_path / "b" / "rows.parquet").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (whole.bytes, whole.sha256)
    # what pyarrow writes by itself: datasets of earlier versions have these bytes
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=100)
    assert sink.getvalue() == data


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_any_part_is_read_alike_from_memory_and_from_disk(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(sidetables, "KEPT_BYTES", kept)
    side = put_table(str(tmp_path), "rows.parquet", [rows(351)], SCHEMA)
    table = opened(str(tmp_path), side)
    assert table.num_rows == 351
    for start, length in ((0, None), (0, 0), (0, 1), (99, 2), (100, 100), (155, 50), (350, 1), (351, 0), (7, 344)):
        stop = 351 if length is None else start + length
        expected = list(range(start, stop))
        assert table.read(start, length)["n"].to_pylist() == expected
        assert table.read(start, length).schema == SCHEMA
        batches = list(table.batches(start, length, ["image_id"]))
        assert [name for batch in batches for name in batch["image_id"].to_pylist()] == [f"{n}.png" for n in expected]
        assert all(0 < batch.num_rows <= 10 and batch.column_names == ["image_id"] for batch in batches)


def test_a_large_remote_table_is_copied_to_a_file_without_a_name(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = put_table(str(tmp_path / "data"), "rows.parquet", [rows(351)], SCHEMA)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(sidetables.tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(sidetables, "PIECE", 64)
    file, digest = sidetables._copied(str(tmp_path / "data" / "rows.parquet"))
    assert digest == side.sha256
    assert list((tmp_path / "scratch").iterdir()) == []
    assert sidetables.OpenedTable(file).read(120, 3)["n"].to_pylist() == [120, 121, 122]


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_table_that_is_not_the_manifests_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(sidetables, "KEPT_BYTES", kept)
    side = put_table(str(tmp_path), "rows.parquet", [rows(20)], SCHEMA)
    path = tmp_path / "rows.parquet"
    good = path.read_bytes()
    for content, words in (
        (good[:-1], "found a SHA-256 that is not the manifest's"),
        (good + b"x", "found a SHA-256 that is not the manifest's"),
        (good[:-1] + b"x", "found a SHA-256 that is not the manifest's"),
        (None, "found no file, expected the manifest's table"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"rows\.parquet: {words}"):
            opened(str(tmp_path), side)
        path.write_bytes(good)
    wrong = SideTable(path=side.path, bytes=side.bytes, sha256=side.sha256, rows=21)
    with pytest.raises(DataError, match="found 20 rows, expected the manifest's 21"):
        opened(str(tmp_path), wrong)


def test_an_empty_table_has_its_columns(tmp_path: Path) -> None:
    side = put_table(str(tmp_path), "rows.parquet", [], SCHEMA)
    assert side.rows == 0
    assert opened(str(tmp_path), side).read().schema == SCHEMA
    assert list(opened(str(tmp_path), side).batches()) == []
