"""Reading a dataset's row groups: any shards of this layout, past what is broken only for a moment. Local files."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr_dist.config import DataConfig
from cxr_dist.data.manifest import ROW_GROUPS_SCHEMA, Shard
from cxr_dist.data.pages import WRITE_OPTIONS
from cxr_dist.data.ranges import counters
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import DataError
from tests.unit.test_manifest import make_dataset

ORDER = [[3], [0, 2], [1]]


def images(tables) -> list[list[bytes]]:
    return [table["image"].to_pylist() for table in tables]


@pytest.mark.parametrize("encoding", ["pixels", "png"])
def test_a_stream_of_runs_is_read_of_each(tmp_path, encoding):
    manifest, _ = make_dataset(tmp_path, encoding)
    reader = ShardReader.from_manifest(manifest, "train")
    streamed = list(reader.stream(ORDER))
    assert [table.num_rows for table in streamed] == [2, 8, 4]
    for run, table in zip(ORDER, streamed, strict=True):
        assert table.equals(reader.read(run))
        assert table.column_names == ["image_id", "findings", "image"]


def test_bytes_read_are_those_of_the_row_groups(tmp_path):
    manifest, _ = make_dataset(tmp_path)
    reader = ShardReader.from_manifest(manifest, "train")
    before = counters()
    reader.read([0, 1, 2, 3])
    read = counters() - before
    assert read.bytes_read == sum(manifest.row_groups("train")["bytes"].to_pylist())
    assert read.requests == 2  # one a shard: the row groups of each touch


def test_what_a_cached_reader_gives_is_what_lies_in_the_shards(tmp_path):
    manifest, _ = make_dataset(tmp_path)
    plain = ShardReader.from_manifest(manifest, "train")
    cached = ShardReader.from_manifest(manifest, "train", DataConfig(cache_dir=str(tmp_path / "cache")))
    expected = images(plain.stream(ORDER))
    assert images(cached.stream(ORDER)) == expected
    for shard in (tmp_path / "data" / "train").glob("*.parquet"):
        shard.unlink()
    before = counters()
    assert images(cached.stream(ORDER)) == expected
    assert (counters() - before).bytes_read == 0


def test_a_row_group_broken_for_a_moment_is_read_again(tmp_path, caplog):
    """As after a fault on the way: what was cached then is broken too, though its checksum is right."""
    manifest, _ = make_dataset(tmp_path)
    shard = tmp_path / "data" / "train" / "part-00001.parquet"
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    reader = ShardReader.from_manifest(manifest, "train", config)
    expected = images([reader.read([0, 3])])
    good = shard.read_bytes()
    group = manifest.row_groups("train").slice(3).to_pylist()[0]
    last = group["offset"] + group["bytes"] - 1
    cache, sha256 = reader.ranges.cache, manifest.splits["train"].shards[1].sha256
    cache.put(sha256, group["offset"], good[group["offset"] : last] + bytes([good[last] ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert images([reader.read([0, 3])]) == expected
    assert "part-00001.parquet: found a broken row group" in caplog.text
    assert images([reader.read([0, 3])]) == expected
    shard.write_bytes(good[:last] + bytes([good[last] ^ 1]) + good[last + 1 :])
    cache.drop(sha256, group["offset"])
    for _ in range(2):  # what is broken in storage does not stay in the cache
        with pytest.raises(DataError, match=r"part-00001\.parquet: found a broken shard .*delete .*then ingest again"):
            reader.read([0, 3])
    shard.write_bytes(good)
    assert images([reader.read([0, 3])]) == expected


def test_a_shard_replaced_by_another_of_its_size_is_refused(tmp_path):
    manifest, _ = make_dataset(tmp_path, "png")
    shard = tmp_path / "data" / "train" / "part-00000.parquet"
    shard.write_bytes(np.random.default_rng(0).bytes(shard.stat().st_size))
    reader = ShardReader.from_manifest(manifest, "train")
    with pytest.raises(DataError, match=r"part-00000\.parquet: found a broken shard"):
        reader.read([2, 1])
    assert reader.read([2]).num_rows == 4


def test_any_shards_of_this_layout_can_be_read(tmp_path):
    """As features are kept: other columns, and no manifest."""
    schema = pa.schema([("name", pa.string()), ("state", pa.uint8()), ("reason", pa.string()), ("data", pa.binary(6))])
    shards, places, tables = [], [], []
    for number in range(2):
        columns = [
            [f"{number}-{row}" for row in range(5)],
            [0, 0, 2, 0, 1],
            [None, None, "broken", None, ""],
            [bytes([number, row] * 3) for row in range(5)],
        ]
        tables.append(pa.table(columns, schema=schema))
        path, footers = f"{number}.parquet", []
        pq.write_table(tables[-1], tmp_path / path, row_group_size=2, metadata_collector=footers, **WRITE_OPTIONS)
        size = (tmp_path / path).stat().st_size
        shards.append(Shard(path=path, bytes=size, sha256=f"{number}" * 64, rows=5))
        for at in range(3):
            group = footers[0].row_group(at)
            chunks = [group.column(i) for i in range(4)]
            length = sum(chunk.total_compressed_size for chunk in chunks)
            places.append((path, at, group.num_rows, chunks[0].data_page_offset, length))
    names = ROW_GROUPS_SCHEMA.names
    table = pa.Table.from_pylist([dict(zip(names, place, strict=True)) for place in places], ROW_GROUPS_SCHEMA)
    reader = ShardReader.of_shards(
        str(tmp_path), shards, table, schema=schema, columns=("data", "reason"), missing="make {uri} again"
    )
    expected = pa.concat_tables([tables[1].slice(4), tables[0].slice(0, 2)]).select(["data", "reason"])
    assert reader.read([5, 0]).equals(expected)
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(DataError, match=r"1\.parquet: found no file, make .*1\.parquet again"):
        reader.read([5])
