"""Ingest on a real local Ray: every layout and every fault has its outcome, and a killed run ends with the same bytes."""

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from cxr_dist.config import Config, DataConfig
from cxr_dist.data import images, nih
from cxr_dist.data.ingest import ingest, labels_only
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.release import find_images
from cxr_dist.data.shards import ShardReader
from cxr_dist.data.sidetables import opened
from cxr_dist.errors import DataError, InputError
from tests.ingesting import ROOT, config_of, copy_with, kill_at
from tests.releases import bomb, noise, png, write_archives, write_release, write_tar

NUM_IMAGES = 90


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    return folder


def run(release: Path, uri: Path, **changes) -> dict:
    return ingest(config_of(release, uri, **changes))


def read_all(uri: Path) -> dict[str, bytes]:
    """Every image of a dataset, by name, from its shards; raises what reading or a table raises."""
    opened.cache_clear()
    manifest = Manifest.load(str(uri))
    manifest.all_quarantined()
    seen: dict[str, bytes] = {}
    for split in nih.SPLITS:
        manifest.rows(split)
        table = ShardReader.from_manifest(manifest, split).read(np.arange(manifest.splits[split].num_row_groups))
        seen |= dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    return seen


def contents(uri: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file under a dataset but sidecars, by path."""
    files = [path for path in uri.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(uri)): path.read_bytes()
        for path in files
        if path.name not in but and not path.name.endswith(".parquet.json")
    }


@pytest.fixture(scope="module")
def dataset(cluster, release, tmp_path_factory) -> tuple[Path, dict]:
    uri = tmp_path_factory.mktemp("dataset") / "nih"
    return uri, run(release, uri)


def test_every_row_is_its_image(dataset, release):
    uri, result = dataset
    manifest = Manifest.load(str(uri))
    assert result["manifest_sha256"] == manifest.hash
    assert result["splits"]["train"]["shards"] >= 2
    seen = {}
    for split in nih.SPLITS:
        info, rows = manifest.splits[split], manifest.rows(split)
        groups = manifest.row_groups(split)["rows"].to_pylist()
        assert set(groups[:-1]) == {4}
        assert sum(groups) == rows.num_rows == info.num_rows
        table = ShardReader.from_manifest(manifest, split).read(np.arange(len(groups)))
        assert table["image_id"].to_pylist() == rows["image_id"].to_pylist()
        assert (nih.findings_matrix(table) == nih.findings_matrix(rows)).all()
        seen |= dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
        assert rows["image_id"].to_pylist() != sorted(rows["image_id"].to_pylist())
    assert len(seen) == NUM_IMAGES
    for name, stored in seen.items():
        assert stored == images.to_grey((release / "images" / name).read_bytes(), 224).tobytes()


def test_splits_are_by_patient_and_list(dataset, release):
    manifest = Manifest.load(str(dataset[0]))
    patients = {split: set(manifest.rows(split)["patient_id"].to_pylist()) for split in nih.SPLITS}
    assert patients["test"] == {p for p in range(1, 31) if p % 4 == 0}
    assert patients["validation"] == {p for p in range(1, 31) if p % 4 and nih.in_validation(p, 0.2, 0)}
    assert manifest.audit["patients_shared"] == 0


def test_shards_hash_to_what_the_manifest_says(dataset):
    uri, _ = dataset
    for split in Manifest.load(str(uri)).splits.values():
        for shard in split.shards:
            assert hashlib.sha256((uri / shard.path).read_bytes()).hexdigest() == shard.sha256
    assert not (uri / ".staging").exists()


def test_a_complete_dataset_is_left_alone(dataset, release):
    uri, first = dataset
    before = {path: path.stat().st_mtime_ns for path in uri.rglob("*")}
    again = run(release, uri)
    assert again["unchanged"]
    assert again["manifest_sha256"] == first["manifest_sha256"]
    assert {path: path.stat().st_mtime_ns for path in uri.rglob("*")} == before


def flip(path: Path) -> None:
    """Change the last byte of a shard's last image."""
    footer = pq.ParquetFile(path).metadata
    column = footer.row_group(footer.num_row_groups - 1).column(footer.num_columns - 1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte in a shard": ("train/part-00001.parquet", flip),
    "a cut shard": ("train/part-00001.parquet", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "a lost shard": ("test/part-00000.parquet", Path.unlink),
    "a changed table": ("rows.parquet", lambda path: path.write_bytes(path.read_bytes()[:-9] + bytes(9))),
    "a lost table": ("rows.parquet", Path.unlink),
    "a lost list of what was left out": ("quarantine.parquet", Path.unlink),
    "a cut manifest": ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:-9])),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=list(DAMAGE))
def test_the_advice_of_every_message_mends_the_dataset(dataset, release, tmp_path, name, damage):
    uri = copy_with(dataset[0], tmp_path / "nih", {})
    before = {path: path.stat().st_mtime_ns for path in uri.rglob("*.parquet") if path.parent != uri}
    damage(uri / name)
    with pytest.raises(DataError, match=name) as raised:
        read_all(uri)
    assert "ingest again" in str(raised.value)
    if advice := re.search(r"delete (\S+), then ingest again", str(raised.value)):
        Path(advice[1]).unlink()
    assert not run(release, uri)["unchanged"]
    assert len(read_all(uri)) == NUM_IMAGES
    assert contents(uri) == contents(dataset[0])
    assert {str(path.relative_to(uri)) for path, when in before.items() if path.stat().st_mtime_ns != when} <= {name}
    assert run(release, uri)["unchanged"]


def test_other_settings_or_another_release_over_a_dataset_are_refused(dataset, release, tmp_path):
    uri, _ = dataset
    with pytest.raises(DataError, match=r"data\.size 224, now 64.*choose another data\.uri"):
        run(release, uri, size=64)
    more = copy_with(release, tmp_path / "more", {"images/x.png": png(noise(1, 8))})
    with pytest.raises(DataError, match=r"90 release files, and now 91"):
        run(more, uri)


@pytest.mark.parametrize("encoding", ["pixels", "png"])
def test_archives_and_kaggle_folders_give_the_same_bytes_as_a_folder(cluster, release, tmp_path, encoding):
    changes = {"encoding": encoding, "size": 64, "shard_mb": 1, "row_group": 2}
    run(release, tmp_path / "folder", **changes)
    write_archives(tmp_path / "tars", release)
    run(tmp_path / "tars", tmp_path / "from-tars", **changes)
    for number, path in enumerate(sorted((release / "images").iterdir())):
        copy = tmp_path / "kaggle" / f"images_{number % 3 + 1:03d}" / "images" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for file in ("Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt"):
        (tmp_path / "kaggle" / file).write_bytes((release / file).read_bytes())
    run(tmp_path / "kaggle", tmp_path / "from-kaggle", **changes)
    but = ("manifest.json",)
    assert contents(tmp_path / "folder", but) == contents(tmp_path / "from-tars", but)
    assert contents(tmp_path / "folder", but) == contents(tmp_path / "from-kaggle", but)


def test_killed_anywhere_it_ends_with_the_same_bytes_and_redoes_nothing(cluster, dataset, release, tmp_path):
    uri = tmp_path / "nih"
    kept: dict[Path, int] = {}
    for point in ("2", "manifest", "cleanup"):
        kill_at(cluster, point, release=release, uri=uri)
        assert (uri / "manifest.json").exists() == (point == "cleanup")
        for path, when in kept.items():
            assert path.stat().st_mtime_ns == when
        kept |= {p: p.stat().st_mtime_ns for p in uri.rglob("*.parquet.json")}
        assert len(kept) >= 2
    result = run(release, uri)
    assert result["unchanged"]
    for path, when in kept.items():
        assert path.stat().st_mtime_ns == when
    assert contents(uri) == contents(dataset[0])


def test_archives_killed_between_passes_end_with_the_same_bytes(cluster, dataset, release, tmp_path):
    write_archives(tmp_path / "tars", release)
    uri = tmp_path / "nih"
    kill_at(cluster, "1", release=tmp_path / "tars", uri=uri)
    kill_at(cluster, "4", release=tmp_path / "tars", uri=uri)
    indexes = {path: path.stat().st_mtime_ns for path in uri.rglob("index.parquet")}
    assert len(indexes) == 3
    split_of = {
        name: split
        for split in nih.SPLITS
        for name in Manifest.load(str(dataset[0])).rows(split)["image_id"].to_pylist()
    }
    for path in indexes:
        staged = sorted(pq.read_table(path).to_pylist(), key=lambda row: (row["run"], row["offset"]))
        for _, run_rows in itertools.groupby(staged, key=lambda row: row["run"]):
            splits = [nih.SPLITS.index(split_of[row["image_id"]]) for row in run_rows]
            assert splits == sorted(splits)
            assert len(set(splits)) == 3
    kill_at(cluster, "manifest", release=tmp_path / "tars", uri=uri)
    assert {path: path.stat().st_mtime_ns for path in indexes} == indexes
    run(tmp_path / "tars", uri)
    assert contents(uri, ("manifest.json",)) == contents(dataset[0], ("manifest.json",))


def test_a_killed_run_with_other_settings_is_refused(cluster, release, tmp_path):
    kill_at(cluster, "1", release=release, uri=tmp_path / "nih")
    with pytest.raises(DataError, match=r"data\.split_seed 0, now 1"):
        run(release, tmp_path / "nih", split_seed=1)


def odd_files(release: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Odd images to put into a release, and the reason of those that are left out."""
    names = sorted(path.name for path in (release / "images").iterdir())
    whole = (release / "images" / names[0]).read_bytes()
    pixels = noise(7, 64)
    files = {
        names[0]: whole[:-200],
        names[4]: png(pixels.astype(np.uint16) * 257),
        names[8]: png(pixels, "RGBA"),
        names[12]: png(pixels, "P"),
        names[16]: bomb(),
        names[20]: b"<html>",
        "99999999_000.png": png(pixels),
    }
    reasons = {
        names[0]: "truncated PNG",
        names[16]: "100000 x 100000 pixels, more than the 67108864 that are decoded",
        names[20]: "neither PNG nor JPEG",
        "99999999_000.png": "no label row",
    }
    return files, reasons


@pytest.mark.parametrize(("kind", "encoding"), [("folder", "pixels"), ("folder", "png"), ("archives", "pixels")])
def test_odd_images_have_their_outcome(cluster, release, tmp_path, kind, encoding):
    files, reasons = odd_files(release)
    source = copy_with(release, tmp_path / "odd", {f"images/{name}": data for name, data in files.items()})
    labels = (source / "Data_Entry_2017.csv").read_text()
    (source / "Data_Entry_2017.csv").write_text(labels + "88888888_000.png,Mass,0,88888888,50,M,PA,1,1,1,1\n")
    (source / "images" / "88888888_000.png").write_bytes(png(noise(8, 64)))
    with (source / "test_list.txt").open("a") as listed:
        listed.write("\n77777777_000.png")
    reasons["88888888_000.png"] = "in neither list"
    if kind == "archives":
        write_archives(tmp_path / "tars", source)
        source = tmp_path / "tars"
    result = run(source, tmp_path / "nih", size=64, encoding=encoding)
    manifest = Manifest.load(str(tmp_path / "nih"))
    assert {entry["image_id"]: entry["reason"] for entry in manifest.quarantine} == reasons
    assert manifest.all_quarantined().num_rows == result["quarantined"] == 5
    assert result["missing_images"] == 1
    assert sum(split["images"] for split in result["splits"].values()) == NUM_IMAGES - 3
    stored = {}
    for split in nih.SPLITS:
        assert set(manifest.row_groups(split)["rows"].to_pylist()[:-1]) <= {4}
        table = ShardReader.from_manifest(manifest, split).read(np.arange(manifest.splits[split].num_row_groups))
        stored |= dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    for name in [name for name in files if name not in reasons]:
        assert stored[name] == (files[name] if encoding == "png" else noise(7, 64).tobytes())


def test_unreadable_images_found_before_a_kill_are_remembered(cluster, release, tmp_path):
    files, _ = odd_files(release)
    source = copy_with(release, tmp_path / "odd", {f"images/{name}": data for name, data in files.items()})
    run(source, tmp_path / "whole")
    kill_at(cluster, "manifest", release=source, uri=tmp_path / "nih")
    noted = json.loads((tmp_path / "nih" / ".staging" / "unreadable.json").read_text())
    assert len(noted) == 3
    run(source, tmp_path / "nih")
    assert contents(tmp_path / "nih") == contents(tmp_path / "whole")


def test_a_lost_shard_of_a_dataset_with_unreadable_images_is_made_again_alone(cluster, release, tmp_path):
    files, _ = odd_files(release)
    source = copy_with(release, tmp_path / "odd", {f"images/{name}": data for name, data in files.items()})
    uri = tmp_path / "nih"
    run(source, uri)
    first = contents(uri)
    kept = {p: p.stat().st_mtime_ns for p in uri.rglob("part-*.parquet")}
    lost = kept.popitem()[0]
    lost.unlink()
    kill_at(cluster, "1", release=source, uri=uri)
    assert not (uri / "manifest.json").exists()
    run(source, uri)
    assert contents(uri) == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_equal_copies_are_kept_once_and_different_ones_named(cluster, release, tmp_path):
    name = "00000001_000.png"
    same = (release / "images" / name).read_bytes()
    source = copy_with(release, tmp_path / "copies", {f"images_002/images/{name}": same})
    result = run(source, tmp_path / "nih", size=64)
    assert result["duplicate_images"] == 1
    assert sum(split["images"] for split in result["splits"].values()) == NUM_IMAGES
    (source / "images_002" / "images" / name).write_bytes(png(noise(99, 64)))
    with pytest.raises(DataError, match=rf"{name}: found two different.*images/{name} and images_002/images/{name}"):
        run(source, tmp_path / "nih2", size=64)


def test_copies_over_archives(cluster, release, tmp_path):
    name = "00000001_000.png"
    write_archives(tmp_path / "tars", release)
    write_tar(tmp_path / "tars" / "images_009.tar.gz", [(f"images/{name}", (release / "images" / name).read_bytes())])
    assert run(tmp_path / "tars", tmp_path / "nih", size=64)["duplicate_images"] == 1
    write_tar(tmp_path / "tars" / "images_009.tar.gz", [(f"images/{name}", png(noise(99, 64)))])
    with pytest.raises(DataError, match=rf"{name}: found two different.*images_001.tar.gz and images_009.tar.gz"):
        run(tmp_path / "tars", tmp_path / "nih2", size=64)
    write_tar(tmp_path / "tars" / "images_009.tar.gz", [(f"images/{name}", (release / "images" / name).read_bytes())])
    assert run(tmp_path / "tars", tmp_path / "nih2", size=64)["duplicate_images"] == 1
    assert contents(tmp_path / "nih2") == contents(tmp_path / "nih")


def test_one_cut_archive_costs_only_itself(cluster, release, tmp_path):
    write_archives(tmp_path / "tars", release)
    uri = tmp_path / "nih"
    kill_at(cluster, "manifest", release=tmp_path / "tars", uri=uri, size=64)
    kept = {path: path.stat().st_mtime_ns for path in uri.rglob("index.parquet")}
    archive = tmp_path / "tars" / "images_002.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-3000])
    with pytest.raises(DataError, match=r"images_002\.tar\.gz: found a broken archive"):
        run(tmp_path / "tars", uri, size=64)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    archive.write_bytes(whole)
    kill_at(cluster, "manifest", release=tmp_path / "tars", uri=uri, size=64)
    again = {path for path, when in kept.items() if path.stat().st_mtime_ns != when}
    assert {json.loads(pq.read_schema(path).metadata[b"key"])[1] for path in again} == {"images_002.tar.gz"}
    run(tmp_path / "tars", uri, size=64)
    assert not (uri / ".staging").exists()


def special(name: str, kind: bytes = tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (special("../escape.png"), "leaves the folder"),
        (special("images/../../escape.png"), "leaves the folder"),
        (special("/etc/escape.png"), "leaves the folder"),
        (special("images/link.png", tarfile.SYMTYPE, linkname="/etc/passwd"), "a link or device"),
        (special("images/hard.png", tarfile.LNKTYPE, linkname="images/x.png"), "a link or device"),
    ],
)
def test_hostile_members_stop_it_with_nothing_written(cluster, release, tmp_path, member, words):
    write_archives(tmp_path / "tars", release, parts=1)
    write_tar(tmp_path / "tars" / "images_002.tar.gz", [("images/a.png", b"x")], member)
    with pytest.raises(DataError, match=rf"images_002.tar.gz: member .*{words}"):
        run(tmp_path / "tars", tmp_path / "out" / "nih", size=64)
    assert {
        path.relative_to(tmp_path / "out" / "nih").parts[0]
        for path in (tmp_path / "out").rglob("*.*")
        if path.is_file()
    } <= {".staging"}
    assert list(tmp_path.rglob("escape.png")) == []


def test_absurd_member_and_broken_archive(cluster, release, tmp_path):
    write_archives(tmp_path / "tars", release, parts=1)
    big = io.BytesIO()
    with tarfile.open(fileobj=big, mode="w") as tar:
        tar.addfile(special("images/big.png", size=0))
    data = bytearray(big.getvalue())
    data[:512] = special("images/big.png", size=1 << 30).tobuf()[:512]
    (tmp_path / "tars" / "images_002.tar").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"images_002\.tar: member 'images/big\.png': found 1073741824 bytes"):
        run(tmp_path / "tars", tmp_path / "nih", size=64)
    (tmp_path / "tars" / "images_002.tar").unlink()
    archive = tmp_path / "tars" / "images_001.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"images_001\.tar\.gz: found a broken archive"):
        run(tmp_path / "tars", tmp_path / "nih", size=64)


def test_the_official_release_as_it_lies(tmp_path):
    """NIH's folder: twelve archives in images/, the tables and papers beside them, a download under way."""
    names = [f"images_{number:03d}.tar.gz" for number in range(1, 11)] + ["images_11.tar.gz", "images_12.tgz"]
    others = (
        "README_CHESTXRAY.pdf",
        "BBox_List_2017.csv",
        "images/batch_download_zips.py",
        "images/images_013.tar.gz.part",
    )
    for path in (*(f"images/{name}" for name in names), *others, "images/.images_001.tar.gz.aria2"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    found = find_images(str(tmp_path))
    assert [path for path, _ in found.archives] == [f"images/{name}" for name in sorted(names)]
    assert found.images == {}


def test_releases_without_images_labels_or_matches_say_so(cluster, release, tmp_path):
    lists = {
        name: (release / name).read_bytes() for name in ("Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt")
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"found no label file, expected one Data_Entry_2017"):
        run(empty, tmp_path / "nih")
    for name, data in lists.items():
        (empty / name).write_bytes(data)
    with pytest.raises(DataError, match=r"found no images, expected images/\*\.png"):
        run(empty, tmp_path / "nih")
    (empty / "other.png").write_bytes(png(noise(1, 16)))
    with pytest.raises(DataError, match="none of them in labels and official lists"):
        run(empty, tmp_path / "nih")
    (empty / "images_001.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="expected one kind"):
        run(empty, tmp_path / "nih")
    (empty / "Data_Entry_2017_v2020.csv").write_bytes(lists["Data_Entry_2017.csv"])
    with pytest.raises(DataError, match=r"2 label files.*data\.labels"):
        run(empty, tmp_path / "nih")
    assert not (tmp_path / "nih").exists() or contents(tmp_path / "nih") == {}


def test_a_full_disk_is_known_before(cluster, release, tmp_path, monkeypatch):
    monkeypatch.setattr("cxr_dist.storage.free_bytes", lambda uri: 1000)
    with pytest.raises(InputError, match="MiB free on its disk"):
        run(release, tmp_path / "nih")


def test_in_place_reads_the_files_where_they_lie(cluster, release, tmp_path):
    result = run(release, tmp_path / "nih", in_place=True)
    manifest = Manifest.load(str(tmp_path / "nih"))
    assert manifest.row_group == 1
    assert manifest.encoding == "png"
    assert manifest.root == str(release)
    assert sum(split["images"] for split in result["splits"].values()) == NUM_IMAGES
    assert {path.suffix for path in (tmp_path / "nih").iterdir()} == {".json", ".parquet"}
    reader = ShardReader.from_manifest(manifest, "test")
    rows = manifest.rows("test")
    table = reader.read([5, 0, 3])
    names = [rows["image_id"][i].as_py() for i in (5, 0, 3)]
    assert table["image_id"].to_pylist() == names
    assert table["image"].to_pylist() == [(release / "images" / name).read_bytes() for name in names]
    assert (nih.findings_matrix(table) == nih.findings_matrix(rows)[[5, 0, 3]]).all()


@pytest.mark.parametrize("cut", [False, True])
def test_the_advice_mends_an_in_place_dataset(cluster, release, tmp_path, cut):
    source, uri = copy_with(release, tmp_path / "release", {}), tmp_path / "nih"
    run(source, uri, in_place=True)
    image = source / "images" / Manifest.load(str(uri)).rows("train")["image_id"][0].as_py()
    whole = image.read_bytes()
    image.unlink()
    if cut:
        image.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=rf"{image.name}: found .*put the file back, or delete .*manifest\.json"):
        read_all(uri)
    with pytest.raises(DataError, match=r"delete its manifest\.json to take them in"):
        run(source, uri, in_place=True)
    (uri / "manifest.json").unlink()
    run(source, uri, in_place=True)
    assert len(read_all(uri)) == NUM_IMAGES - (not cut)
    image.write_bytes(whole)
    (uri / "manifest.json").unlink()
    run(source, uri, in_place=True)
    assert read_all(uri)[image.name] == whole


def test_more_images_are_taken_in_once_the_manifest_is_deleted(cluster, dataset, release, tmp_path):
    lost = release / "images" / "00000009_001.png"
    source = copy_with(release, tmp_path / "release", {})
    (source / "images" / lost.name).unlink()
    uri = tmp_path / "nih"
    assert run(source, uri)["missing_images"] == 1
    (source / "images" / lost.name).write_bytes(lost.read_bytes())
    with pytest.raises(DataError, match=r"found a dataset of 89 release files, and now 90.*delete its manifest\.json"):
        run(source, uri)
    (uri / "manifest.json").unlink()
    run(source, uri)
    assert contents(uri) == contents(dataset[0])


def test_placement_is_the_same_in_place_and_in_shards(cluster, dataset, release, tmp_path):
    run(release, tmp_path / "nih", in_place=True)
    for split in nih.SPLITS:
        first, second = (Manifest.load(str(uri)).rows(split) for uri in (dataset[0], tmp_path / "nih"))
        assert first.equals(second)


def test_nih8_counts_what_it_cleans_away(cluster, release, tmp_path):
    result = run(release, tmp_path / "nih", label_set="nih8", size=64)
    assert result["cleaned_images"] == 36
    assert sum(split["images"] for split in result["splits"].values()) == NUM_IMAGES - 36
    assert Manifest.load(str(tmp_path / "nih")).findings == nih.NIH8


def test_labels_only_on_the_whole_release(real_data):
    config = Config(
        data=DataConfig(
            label_set="nih8",
            labels=str(real_data / "Data_Entry_2017_v2020.csv.gz"),
            train_val_list=str(real_data / "train_val_list.txt"),
            test_list=str(real_data / "test_list.txt"),
        )
    )
    result = labels_only(config)
    assert (result["train_val"]["images"], result["test"]["images"]) == (80_097, 21_801)
    assert result["patients_shared"] == 0
    assert result["train"]["images"] + result["validation"]["images"] == 80_097


def test_real_images(cluster, real_data, tmp_path):
    changes = {
        "labels": str(real_data / "Data_Entry_2017_v2020.csv.gz"),
        "train_val_list": str(real_data / "train_val_list.txt"),
        "test_list": str(real_data / "test_list.txt"),
    }
    result = run(real_data / "nih_sample", tmp_path / "nih", shard_mb=2, row_group=8, **changes)
    assert sum(split["images"] for split in result["splits"].values()) == 177
    assert result["splits"]["test"]["images"] == 44
    assert result["quarantined"] == 0
