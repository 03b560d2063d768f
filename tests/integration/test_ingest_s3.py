"""Ingest from and to a real S3 server: the bytes of a local one, a kill that is made good, and no object left behind."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import ray

from cxr_dist import storage
from cxr_dist.bench import vast
from cxr_dist.data import sidetables
from cxr_dist.data.ingest import ingest
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import DataError, InputError
from tests.faultproxy import FaultProxy, fault_proxy
from tests.ingesting import ROOT, config_of, kill_at
from tests.policy import documented, held_to, needs, refused, with_ingest
from tests.releases import write_archives, write_release

CHANGES = {"size": 128}


@pytest.fixture(scope="module")
def proxy(s3_env: dict[str, str]) -> Iterator[FaultProxy]:
    """What stands before the S3 server, for this process and Ray's workers."""
    with fault_proxy(s3_env["AWS_ENDPOINT_URL"]) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


@pytest.fixture(scope="module")
def cluster(s3_env: dict[str, str], proxy: FaultProxy) -> Iterator[str]:
    """Ray whose workers have the S3 server's settings."""
    storage.forget_filesystems()
    env = {**s3_env, "AWS_ENDPOINT_URL": proxy.url, "PYTHONPATH": str(ROOT)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    storage.forget_filesystems()


def upload(folder: Path, uri: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.upload_atomic(path, storage.join(uri, str(path.relative_to(folder))))
    return uri


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release on disk: files/ and archives/."""
    folder = tmp_path_factory.mktemp("release")
    write_release(folder / "files", num_patients=20)
    write_archives(folder / "archives", folder / "files")
    return folder


@pytest.fixture(scope="module")
def release(cluster: str, folder: Path) -> str:
    """The same under a prefix."""
    return upload(folder, "s3://cxr/release")


@pytest.fixture(scope="module")
def expected(cluster: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a local ingest of the files writes, by path."""
    uri = tmp_path_factory.mktemp("dataset") / "nih"
    ingest(config_of(folder / "files", uri, **CHANGES))
    return contents(str(uri))


def contents(uri: str) -> dict[str, bytes]:
    """Every file of a dataset but manifest (it names the release) and sidecars."""
    return {
        path: storage.read_bytes(storage.join(uri, path))
        for path, _ in storage.list_files(uri)
        if not path.endswith(".json")
    }


def raw_keys(prefix: str) -> list[str]:
    """Every key in the bucket, of empty folder objects too."""
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="cxr", Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@pytest.mark.parametrize("kind", ["files", "archives"])
def test_a_release_in_s3_becomes_the_same_shards(release, expected, kind):
    uri = f"s3://cxr/from-{kind}"
    result = ingest(config_of(f"{release}/{kind}", uri, **CHANGES))
    assert contents(uri) == expected
    assert [key for key in raw_keys(f"from-{kind}/") if ".staging" in key] == []
    assert ingest(config_of(f"{release}/{kind}", uri, **CHANGES))["unchanged"]
    assert Manifest.load(uri).hash == result["manifest_sha256"]


def test_ingest_needs_no_more_of_the_store_than_the_security_page_says(release, expected, proxy):
    policy = with_ingest(documented(ROOT / "docs" / "security.md", {"BUCKET": "cxr"}), "cxr")
    before = len(proxy.seen)
    proxy.rule = held_to(policy)
    try:
        ingest(config_of(f"{release}/archives", "s3://cxr/dataset/policed", **CHANGES))
        with pytest.raises(InputError, match="access was refused"):
            ingest(config_of(f"{release}/files", "s3://cxr/elsewhere", **CHANGES))
    finally:
        proxy.rule = lambda request: None
    assert contents("s3://cxr/dataset/policed") == expected
    outside = [request for request in refused(proxy.seen[before:]) if "elsewhere" not in request.path]
    assert outside == []
    asked = {action for request in proxy.seen[before:] for action, _, _ in needs(request)}
    assert asked >= {"s3:GetObject", "s3:ListBucket", "s3:PutObject", "s3:DeleteObject"}


def test_in_place_reads_the_objects_where_they_lie(release, folder):
    ingest(config_of(f"{release}/files", "s3://cxr/in-place", in_place=True))
    assert raw_keys("in-place/.staging") == []
    manifest = Manifest.load("s3://cxr/in-place")
    assert manifest.root == f"{release}/files"
    names = manifest.rows("test")["image_id"].to_pylist()
    table = ShardReader.from_manifest(manifest, "test").read(np.arange(len(names)))
    assert table["image_id"].to_pylist() == names
    assert table["image"].to_pylist() == [(folder / "files" / "images" / name).read_bytes() for name in names]


def test_a_large_side_table_is_read_from_s3_in_parts(cluster, monkeypatch):
    manifest = vast.write_manifest("s3://cxr/vast", 3000)
    kept = {name: manifest.rows(name) for name in manifest.splits}
    monkeypatch.setattr(sidetables, "KEPT_BYTES", 0)
    sidetables.opened.cache_clear()
    assert {name: manifest.rows(name) for name in manifest.splits} == kept
    batches = list(manifest.row_batches("test", ["image_id"]))
    assert [name for batch in batches for name in batch["image_id"].to_pylist()] == kept["test"]["image_id"].to_pylist()
    storage.put_atomic("s3://cxr/vast/rows.parquet", storage.read_bytes("s3://cxr/vast/rows.parquet") + b"x")
    sidetables.opened.cache_clear()
    with pytest.raises(DataError, match=r"rows\.parquet: found a SHA-256 that is not the manifest's"):
        manifest.rows("test")
    storage.delete("s3://cxr/vast/rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: found no file, expected the manifest's table"):
        manifest.rows("test")


@pytest.mark.parametrize("kind", ["files", "archives"])
def test_killed_on_s3_it_ends_with_the_same_bytes(cluster, release, expected, kind):
    uri = f"s3://cxr/killed-{kind}"
    changes = {"release": f"{release}/{kind}", "uri": uri, **CHANGES}
    kill_at(cluster, "1", **changes)
    assert not storage.exists(f"{uri}/manifest.json")
    kill_at(cluster, "cleanup", **changes)
    assert raw_keys(f"killed-{kind}/.staging") != []
    assert ingest(config_of(**changes))["unchanged"]
    assert contents(uri) == expected
    assert [key for key in raw_keys(f"killed-{kind}/") if ".staging" in key] == []


def test_a_half_uploaded_archive_is_named_and_mended_by_a_whole_one(release, folder, expected, tmp_path):
    source, uri = "s3://cxr/half", "s3://cxr/from-half"
    upload(shutil.copytree(folder / "archives", tmp_path / "archives"), source)
    whole = storage.read_bytes(f"{source}/images_002.tar.gz")
    storage.put_atomic(f"{source}/images_002.tar.gz", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"s3://cxr/half/images_002\.tar\.gz: found a broken archive"):
        ingest(config_of(source, uri, **CHANGES))
    storage.put_atomic(f"{source}/images_002.tar.gz", whole)
    ingest(config_of(source, uri, **CHANGES))
    assert contents(uri) == expected


def test_an_object_that_vanishes_meanwhile_is_named(cluster, folder, monkeypatch):
    source = upload(folder / "files", "s3://cxr/vanishing")
    put = storage.put_atomic

    def vanish(uri: str, data: bytes) -> None:
        put(uri, data)
        storage.delete(f"{source}/images/00000005_001.png")

    monkeypatch.setattr(storage, "put_atomic", vanish)
    with pytest.raises(DataError, match=r"s3://cxr/vanishing/images/00000005_001\.png: the image vanished"):
        ingest(config_of(source, "s3://cxr/from-vanishing", **CHANGES))


def test_a_missing_bucket_is_one_sentence(release):
    for source, uri in (("s3://nobucket/release", "s3://cxr/x"), (f"{release}/files", "s3://nobucket/x")):
        with pytest.raises(InputError) as raised:
            ingest(config_of(source, uri, **CHANGES))
        message = str(raised.value)
        assert "s3://nobucket" in message
        assert "the bucket does not exist; make it, or check the name" in message
        assert "\n" not in message
    assert raw_keys("x/") == []


def test_a_deleted_folder_leaves_no_raw_key(cluster):
    for name in ("a/1", "a/2", "b/c/d/3", "e"):
        storage.put_atomic(f"s3://cxr/tree/keep/gone/{name}", b"1")
    storage.put_atomic("s3://cxr/tree/keep/x", b"1")
    storage.delete("s3://cxr/tree/keep/gone/b/c/d/3")
    storage.delete_dir("s3://cxr/tree/keep/gone")
    storage.delete_dir("s3://cxr/tree/keep/gone")
    assert [key for key in raw_keys("tree/") if not key.endswith("keep/")] == ["tree/keep/x"]
    assert not storage.exists("s3://cxr/tree/keep/gone")
    assert storage.list_files("s3://cxr/tree") == [("keep/x", 1)]
