"""The manifest: what is saved is what is loaded, and a changed, cut or unknown file is refused by name. No Ray."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist import storage
from cxr_dist.data import assemble, nih, record
from cxr_dist.data.assemble import ShardInfo, ShardSpec, build_shard
from cxr_dist.data.images import to_grey
from cxr_dist.data.manifest import Manifest, Shard, Split
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import DataError
from tests.releases import noise, png, write_release

ROW_GROUP = 4
SHARD_ROWS = 8
SIZE = 16


def sources_of(files: dict[str, bytes], ids: list[str]) -> pa.Table:
    columns = [[f"images/{i}" for i in ids], [-1] * len(ids), [len(files[i]) for i in ids]]
    return pa.table(columns, schema=assemble.SOURCES_SCHEMA)


def make_dataset(tmp_path, encoding: str = "pixels") -> tuple[Manifest, dict[str, bytes]]:
    """A saved dataset of 14 train, 0 validation and 5 test rows, made without Ray."""
    release, uri = tmp_path / "release", str(tmp_path / "data")
    files = write_release(release, num_patients=19, per_patient=1, side=32)
    labels = nih.read_labels((release / "Data_Entry_2017.csv").read_bytes(), "labels")
    spec = ShardSpec(uri=uri, release=str(release), encoding=encoding, size=SIZE, row_group=ROW_GROUP)
    rows = {"train": labels.slice(0, 14), "validation": labels.slice(0, 0), "test": labels.slice(14, 5)}
    shards: dict[str, list[ShardInfo]] = {split: [] for split in rows}
    for split, table in rows.items():
        for at in range(0, table.num_rows, SHARD_ROWS):
            part = table.slice(at, SHARD_ROWS)
            path = f"{split}/part-{at // SHARD_ROWS:05d}.parquet"
            info = build_shard(spec, path, part, sources_of(files, part["image_id"].to_pylist()))
            assert isinstance(info, ShardInfo)
            shards[split].append(info)
    groups = record.shard_groups(shards, ROW_GROUP)
    splits = {
        split: Split(
            shards=tuple(Shard(path=s.path, bytes=s.bytes, sha256=s.sha256, rows=s.rows) for s in shards[split]),
            num_rows=table.num_rows,
            num_row_groups=groups[split].num_rows,
            patients=table.num_rows,
            positives=nih.positives(table, "nih8"),
        )
        for split, table in rows.items()
    }
    manifest = Manifest(
        label_set="nih8",
        findings=nih.NIH8,
        encoding=encoding,
        size=SIZE,
        pixels_version="v",
        row_group=ROW_GROUP,
        in_place=False,
        seed=0,
        validation_fraction=0.2,
        splits=splits,
        audit={"patients_shared": 0},
        sources={},
        settings={},
        counts={"quarantined": 150},
        quarantine=(),
    )
    left_out = [(f"{i}.png", "truncated PNG") for i in range(150)]
    return manifest.save(uri, rows, groups, left_out), files


def test_load_gives_what_was_saved(tmp_path):
    saved, _ = make_dataset(tmp_path)
    loaded = Manifest.load(saved.uri)
    assert loaded == saved
    assert loaded.hash == saved.hash
    assert len(loaded.hash) == 64
    assert loaded.findings == nih.NIH8
    assert len(loaded.quarantine) == 100
    assert loaded.all_quarantined().num_rows == 150


def test_rows_and_row_groups_are_in_placement_order(tmp_path):
    manifest, _ = make_dataset(tmp_path)
    assert manifest.rows("train")["image_id"].to_pylist() == [f"{p:08d}_000.png" for p in range(1, 15)]
    assert manifest.rows("validation").num_rows == 0
    assert manifest.rows("test")["patient_id"].to_pylist() == [15, 16, 17, 18, 19]
    groups = manifest.row_groups("train")
    assert groups["rows"].to_pylist() == [4, 4, 4, 2]
    assert groups["row_group_in_file"].to_pylist() == [0, 1, 0, 1]
    assert groups["path"].to_pylist() == ["train/part-00000.parquet"] * 2 + ["train/part-00001.parquet"] * 2
    assert groups["offset"][0].as_py() == 4
    assert groups["offset"][1].as_py() == 4 + groups["bytes"][0].as_py()
    labels = manifest.labels("train")
    assert labels.shape == (14, 8)
    assert labels[6].tolist() == [True] + [False] * 7
    with pytest.raises(DataError, match="no split 'valid'"):
        manifest.rows("valid")


def test_the_same_dataset_has_the_same_hash_wherever_it_lies(tmp_path):
    assert make_dataset(tmp_path / "a")[0].hash == make_dataset(tmp_path / "b")[0].hash


@pytest.mark.parametrize("encoding", ["pixels", "png"])
def test_reader_gives_row_groups_in_the_asked_order(tmp_path, encoding):
    manifest, files = make_dataset(tmp_path, encoding)
    reader = pickle.loads(pickle.dumps(ShardReader.from_manifest(manifest, "train")))
    table = reader.read(np.array([3, 0, 2]))
    expected = [f"{p:08d}_000.png" for p in [13, 14, 1, 2, 3, 4, 9, 10, 11, 12]]
    assert table["image_id"].to_pylist() == expected
    rows = manifest.rows("train")
    assert (nih.findings_matrix(table) == nih.findings_matrix(rows)[[12, 13, 0, 1, 2, 3, 8, 9, 10, 11]]).all()
    stored = [files[i] if encoding == "png" else to_grey(files[i], SIZE).tobytes() for i in expected]
    assert table["image"].to_pylist() == stored


def test_reader_names_a_missing_a_cut_and_a_flipped_shard(tmp_path):
    manifest, _ = make_dataset(tmp_path)
    shard = tmp_path / "data" / "train" / "part-00001.parquet"
    data = shard.read_bytes()
    flipped = bytearray(data)
    group = manifest.row_groups("train").slice(3).to_pylist()[0]
    flipped[group["offset"] + group["bytes"] - 1] ^= 1  # the last pixel of its last image
    for content, words in (
        (data[:-1], "bytes, the manifest says"),
        (bytes(flipped), "broken shard"),
        (None, "no file"),
    ):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        reader = ShardReader.from_manifest(manifest, "train")
        assert reader.read([0, 1]).num_rows == 8
        with pytest.raises(DataError, match=f"part-00001.*{words}"):
            reader.read([0, 3])
        shard.write_bytes(data)


def test_a_changed_side_table_is_refused(tmp_path):
    manifest, _ = make_dataset(tmp_path)
    path = tmp_path / "data" / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-5] + b"xxxxx")
    fresh = dataclasses.replace(manifest, uri=manifest.uri + "/")
    with pytest.raises(DataError, match=r"rows\.parquet: found a SHA-256 that is not the manifest's"):
        fresh.rows("train")
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.parquet: found no file"):
        fresh.rows("train")


def test_manifests_that_cannot_be_read_say_what_to_do(tmp_path):
    manifest, _ = make_dataset(tmp_path)
    where = storage.join(manifest.uri, "manifest.json")
    raw = json.loads(storage.read_bytes(where))
    for content, words in (
        (json.dumps({**raw, "format": 7}), "found manifest format 7, this version reads 1"),
        (json.dumps({**raw, "extra": 1}), r"missing or unknown: \['extra'\]"),
        ("{", "no manifest of this project"),
        ("[]", "no manifest of this project"),
    ):
        storage.put_atomic(where, content.encode())
        with pytest.raises(DataError, match=words):
            Manifest.load(manifest.uri)
    for content in (b'{"format": 1, "format": 1}', b"[" * 100_000, b'{"format": NaN}', b"\xff"):
        storage.put_atomic(where, content)
        with pytest.raises(DataError, match="no manifest of this project"):
            Manifest.load(manifest.uri)
    storage.delete(where)
    with pytest.raises(DataError, match=r"manifest\.json: found no manifest; run jobs/ingest\.py"):
        Manifest.load(manifest.uri)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (("size",), "16", "manifest.size: found '16', expected a whole number"),
        (("size",), True, "manifest.size: found True, expected a whole number"),
        (("seed",), -1, "manifest.seed: found -1, expected a whole number"),
        (("findings",), "Mass", "manifest.findings: found 'Mass', expected a list"),
        (("splits", "test", "num_rows"), None, "manifest.splits.test.num_rows: found None, expected a whole number"),
        (("tables", "rows"), [], r"manifest.tables.rows: found \[\], expected keys and values"),
        (("tables", "rows", "more"), 1, r"manifest.tables.rows: found fields that are missing or unknown: \['more'\]"),
        (("label_set",), "nih14", "found label set 'nih14' with findings Pneumothorax.*expected the set's own"),
        (("encoding",), "jpeg", "found encoding 'jpeg', expected png or pixels"),
        (("row_group",), 0, "found a size, row_group or validation_fraction of nothing"),
        (("row_group",), 8, "found 4 row groups in train, expected 14 rows in groups of 8"),
        (("splits", "train", "num_rows"), 13, "found 13 rows in train, expected the 14 of its shards"),
        (("splits", "test", "patients"), 6, "more patients or positives than the 5 rows of test"),
        (("splits", "test", "positives"), {}, "found positives of in test, expected the findings"),
        (("splits", "dev"), None, "manifest.splits.dev: found None, expected keys and values"),
        (("tables", "rows", "rows"), 20, "found 19 rows in the splits, expected the 20 of their table"),
        (("tables", "quarantine", "rows"), 99, "found 100 quarantined images, expected those of their table"),
        (("tables", "rows", "path"), "../rows.parquet", "found path '../rows.parquet', expected one under the dataset"),
        (("tables", "rows", "sha256"), "0", "found SHA-256 '0' of rows.parquet, expected 64 hexadecimal digits"),
        (("tables", "rows", "path"), "row_groups.parquet", "row_groups.parquet: found a SHA-256 that is not"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, at, value, words):
    manifest, _ = make_dataset(tmp_path)
    where = storage.join(manifest.uri, "manifest.json")
    raw = json.loads(storage.read_bytes(where))
    holder = raw
    for name in at[:-1]:
        holder = holder[name]
    holder[at[-1]] = value
    storage.put_atomic(where, json.dumps(raw).encode())
    with pytest.raises(DataError, match=words) as caught:
        Manifest.load(manifest.uri).rows("test")
    assert str(tmp_path) in str(caught.value)


def test_a_finished_shard_is_kept_and_a_changed_one_made_again(tmp_path):
    manifest, files = make_dataset(tmp_path)
    spec = ShardSpec(uri=manifest.uri, release=str(tmp_path / "release"), encoding="pixels", size=SIZE, row_group=4)
    rows = manifest.rows("test")
    ids = rows["image_id"].to_pylist()
    path = tmp_path / "data" / "test" / "part-00000.parquet"
    before, data = path.stat().st_mtime_ns, path.read_bytes()
    build_shard(spec, "test/part-00000.parquet", rows, sources_of(files, ids))
    assert path.stat().st_mtime_ns == before
    path.write_bytes(data[:-1])
    build_shard(spec, "test/part-00000.parquet", rows, sources_of(files, ids))
    assert path.read_bytes() == data
    again = build_shard(spec, "test/part-00000.parquet", rows.slice(1), sources_of(files, ids).slice(1))
    assert isinstance(again, ShardInfo)
    assert again.rows == 4


def test_unreadable_images_stop_their_shard(tmp_path):
    manifest, files = make_dataset(tmp_path)
    rows = manifest.rows("test")
    ids = rows["image_id"].to_pylist()
    bad = png(noise(1, 32))[:200]
    (tmp_path / "release" / "images" / ids[2]).write_bytes(bad)
    for encoding in ("pixels", "png"):
        spec = ShardSpec(uri=str(tmp_path / "new"), release=str(tmp_path / "release"), encoding=encoding, size=SIZE, row_group=4)  # fmt: skip
        found = build_shard(spec, "test/part-00000.parquet", rows, sources_of({**files, ids[2]: bad}, ids))
        assert found == [(ids[2], "truncated PNG")]
        assert not (tmp_path / "new").exists()


def test_placement_keeps_the_order_of_any_two_images():
    names = [f"{i}.png" for i in range(200)]
    order = [names[i] for i in assemble.place(names, 1)]
    some = names[::3]
    assert [some[i] for i in assemble.place(some, 1)] == [name for name in order if name in set(some)]
    assert sorted(order) == sorted(names)
    assert order != [names[i] for i in assemble.place(names, 2)] != names


def test_shard_length_by_hand():
    assert assemble.rows_per_shard(100, 100 * 50_176, 1, 8) == 16
    assert assemble.rows_per_shard(100, 100 * 50_176, 128, 8) == 2672
    assert assemble.rows_per_shard(10, 10 << 30, 1, 8) == 8
    assert assemble.rows_per_shard(0, 0, 1, 8) == (1 << 20)
