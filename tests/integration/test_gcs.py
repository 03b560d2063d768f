"""gs:// as every other URI: storage's contract, leases, checkpoints, housekeeping and faults, on a real server's answers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient

from cxr_dist import preflight, storage
from cxr_dist.cli import run_job
from cxr_dist.config import Config, DataConfig, TrainConfig
from cxr_dist.data.ranges import NO_SUCH_RANGE, ByteRanges
from cxr_dist.data.synth import write_release
from cxr_dist.errors import ConfigError, InputError
from cxr_dist.train.checkpoint import Checkpoints
from cxr_dist.train.lease import Lease
from jobs import gc
from tests.conftest import ROOT
from tests.faultproxy import Fault, FaultProxy, Seen, fault_proxy, once
from tests.gcs import GoogleStore, google_store

GS = "gs://cxr"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleStore]:
    with google_store(tmp_path_factory.mktemp("google")) as found:
        yield found


@pytest.fixture
def store(server: GoogleStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleStore]:
    """The server, and this process's environment set to it."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    storage.forget_filesystems()
    yield server
    storage.forget_filesystems()


@pytest.fixture
def proxy(store: GoogleStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server. (Not for open files: pyarrow holds the GIL while their first answer comes.)"""
    with fault_proxy(store.url) as found:
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", found.url)
        storage.forget_filesystems()
        yield found
        storage.forget_filesystems()


def test_what_is_put_is_read_whole_and_in_ranges(store: GoogleStore) -> None:
    for name, data in (("x.bin", b"0123456789"), ("a dir/labels #1.csv.gz", b"plain"), ("empty", b"")):
        uri = f"{GS}/round/{name}"
        storage.put_atomic(uri, data)
        assert storage.read_bytes(uri) == data
        assert storage.size(uri) == len(data)
        with storage.open_stream(uri) as stream:
            assert stream.read() == data
    uri = f"{GS}/round/x.bin"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 100) == b"89"
    assert storage.open_input(uri, 1).read_at(2, 1) == b"12"
    assert storage.open_input(uri).get_stream(4, 3).read_buffer(3).to_pybytes() == b"456"
    storage.put_atomic(uri, b"another, longer")
    assert storage.read_bytes(uri) == b"another, longer"
    assert storage.modified_ns(uri) > 0
    assert storage.exists(f"{GS}/round")
    assert not storage.exists(f"{GS}/roun")


def test_a_large_file_is_uploaded_in_parts(store: GoogleStore, tmp_path: Path) -> None:
    data = bytes(range(256)) * (20 << 12) + b"end"
    (tmp_path / "large").write_bytes(data)
    storage.upload_atomic(tmp_path / "large", f"{GS}/large")
    assert storage.read_bytes(f"{GS}/large") == data
    assert storage.read_range(f"{GS}/large", len(data) - 5, 5) == data[-5:]


def test_a_range_past_the_end_is_told_by_its_status(store: GoogleStore) -> None:
    storage.put_atomic(f"{GS}/short", b"0123456789")
    with pytest.raises(ValueError, match="OUT_OF_RANGE") as raised:
        storage.open_input(f"{GS}/short").get_stream(20, 4).read_buffer(4)
    assert any(mark in str(raised.value) for mark in NO_SUCH_RANGE)


def test_a_file_that_is_read_whole_is_fetched_once_and_a_range_alone(store: GoogleStore) -> None:
    storage.put_atomic(f"{GS}/pieces/whole.png", b"0123456789")
    storage.put_atomic(f"{GS}/pieces/shard.parquet", b"0123456789" * 10)
    ranges = ByteRanges(
        root=f"{GS}/pieces",
        paths=pa.array(["whole.png", "shard.parquet"]),
        file_bytes=np.array([10, 100]),
        file_sha256=None,
        file_index=np.array([0, 1, 1], np.int32),
        offset=np.array([0, 20, 50]),
        length=np.array([10, 3, 4]),
        missing="expected a file",
        mend="ingest again",
    )
    read = {}
    for run in ([0], [1], [2]):
        before = len(store.requests())
        [(_, [piece])] = ranges.stream([run])
        fetched = [line for line in store.requests()[before:] if "alt=media" in line]
        read[run[0]] = (bytes(piece), len(fetched))
    assert read[0] == (b"0123456789", 1)
    assert read[1] == (b"012", 2)  # one of them of the whole object, begun when it was opened, and not read
    assert read[2] == (b"0123", 1)


def test_listing_knows_folders_though_no_object_stands_for_them(store: GoogleStore) -> None:
    for name in ("b/2", "b/c/3", "a", "d/e/f"):
        storage.put_atomic(f"{GS}/tree/{name}", name.encode())
    assert storage.list_files(f"{GS}/tree") == [("a", 1), ("b/2", 3), ("b/c/3", 5), ("d/e/f", 5)]
    assert storage.list_files(f"{GS}/tree", recursive=False) == [("a", 1)]
    assert storage.list_folders(f"{GS}/tree") == ["b", "d"]
    assert storage.list_folders(f"{GS}/none") == []
    assert storage.list_files(f"{GS}/none") == []
    assert all(time > 1e9 for *_, time in storage.scan(f"{GS}/tree"))


def test_deleting_leaves_nothing_and_is_done_once(store: GoogleStore) -> None:
    for name in ("a/1", "a/2", "b/c/3"):
        storage.put_atomic(f"{GS}/going/x/{name}", b"1")
    storage.put_atomic(f"{GS}/going/y", b"1")
    storage.put_atomic(f"{GS}/going/x/made-by-hand/", b"")  # as Google's console makes folders
    storage.delete(f"{GS}/going/x/a/1")
    storage.delete(f"{GS}/going/x/a/1")
    assert not storage.delete_empty(f"{GS}/going/x")
    assert store.names("going/x/a") == ["going/x/a/2"]
    storage.delete_dir(f"{GS}/going/x")
    storage.delete_dir(f"{GS}/going/x")
    assert store.names("going/") == ["going/y"]
    assert storage.delete_empty(f"{GS}/going/x")


def test_what_is_missing_is_said(store: GoogleStore) -> None:
    for operation in (storage.read_bytes, storage.size, storage.open_input, storage.open_stream):
        with pytest.raises(FileNotFoundError):
            operation(f"{GS}/none")
        with pytest.raises(InputError, match=r"gs://nobucket.*: the bucket does not exist; make it"):
            operation("gs://nobucket/none")
    for uri in ("gs://nobucket", "gs://nobucket/x"):
        with pytest.raises(InputError, match="the bucket does not exist"):
            storage.exists(uri)
        with pytest.raises(InputError, match="the bucket does not exist"):
            storage.list_files(uri)
    with pytest.raises(InputError, match="the bucket does not exist"):
        storage.put_atomic("gs://nobucket/x", b"1")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json", r"access was refused.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "http://127.0.0.1:9", r"the object store does not answer"),
    ],
)
def test_what_a_person_must_mend_is_one_sentence(
    store: GoogleStore, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "GOOGLE_RETRY_S", 1)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage.forget_filesystems()
    runs = Config(train=TrainConfig(storage_path=f"{GS}/runs"))
    data = Config(data=DataConfig(uri=f"{GS}/nothing"))
    for check, config in ((preflight.check_storage, runs), (preflight.check_dataset, data)):
        with pytest.raises(InputError, match=sentence) as raised:
            check(config)
        assert "\n" not in str(raised.value)
        assert "AWS" not in str(raised.value)


def test_preflight_finds_a_store_that_can_be_written_and_a_prefix_that_is_empty(store: GoogleStore) -> None:
    preflight.check_storage(Config(train=TrainConfig(storage_path=f"{GS}/fresh/runs")))
    assert store.names("fresh") == []
    with pytest.raises(InputError, match=r"found nothing under gs://cxr/nothing; run jobs/ingest\.py"):
        preflight.check_dataset(Config(data=DataConfig(uri=f"{GS}/nothing")))


def looks_at_bucket(request: Seen) -> bool:
    return request.path.split("?")[0].rstrip("/") == "/storage/v1/b/cxr"


def test_the_right_to_look_at_the_bucket_is_not_needed(proxy: FaultProxy) -> None:
    proxy.rule = lambda request: Fault(status=403) if looks_at_bucket(request) else None
    assert not storage.exists(f"{GS}/none")
    assert storage.list_files(f"{GS}/none") == []
    assert any(map(looks_at_bucket, proxy.seen))
    proxy.rule = lambda request: Fault(status=403)
    with pytest.raises(InputError, match=r"gs://cxr/none: access was refused"):
        storage.exists(f"{GS}/none")


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [
        pytest.param(lambda r: r.method == "POST", Fault(status=503), id="no upload begun"),
        pytest.param(lambda r: r.method == "PUT", Fault(status=429), id="asked to go slower"),
        pytest.param(lambda r: r.method == "PUT", Fault(after_bytes=0, cut=True), id="done, its answer cut"),
        pytest.param(lambda r: r.method == "PUT", Fault(cut=True), id="cut before it is done"),
    ],
)
@pytest.mark.parametrize("size", [100, 5 << 20])
def test_what_is_written_is_whole_though_a_request_fails(proxy: FaultProxy, wanted, fault: Fault, size: int) -> None:
    data, uri, met = bytes(range(256)) * (size // 256) + b"end", f"{GS}/faults/{size}", []

    def noted(request: Seen) -> bool:
        if wanted(request):
            met.append(request)
        return wanted(request)

    proxy.rule = once(noted, fault)
    storage.put_atomic(uri, data)
    assert met
    proxy.rule = lambda request: None
    with storage.open_stream(uri) as stream:
        assert stream.read() == data


def test_a_write_that_never_ends_leaves_the_old_object(
    proxy: FaultProxy, store: GoogleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_atomic(f"{GS}/old", b"old")
    monkeypatch.setattr(storage, "GOOGLE_RETRY_S", 1)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage.forget_filesystems()
    proxy.rule = lambda request: Fault(status=503) if request.method == "PUT" else None
    with pytest.raises(InputError, match="gs://cxr/old"):
        storage.put_atomic(f"{GS}/old", b"new" * (1 << 20))
    proxy.rule = lambda request: None
    assert storage.size(f"{GS}/old") == 3


def test_one_driver_at_a_time_owns_a_run(store: GoogleStore) -> None:
    folder = f"{GS}/owned/run"
    with Lease.take(folder, owner="ann", beat_s=0.2) as first:
        assert first.held()
        with pytest.raises(ConfigError, match="this run is being written by ann"):
            Lease.take(folder, owner="ben", stale_s=20)
    second = Lease.take(folder, owner="ben")
    assert second.number == first.number + 1
    assert not first.held()
    checkpoints = Checkpoints(folder, owner=second.number)
    for index in (10, 20, 30):
        checkpoints.save({"journal": [index]}, index=index, epoch=0, score=None, finished=index == 30, scores=b"s")
    found = Checkpoints(folder)
    assert [found.load(entry)["journal"] for entry in found.entries()] == [[20], [30]]


def test_housekeeping_finds_runs_and_removes_them_whole(
    store: GoogleStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, uri = f"{GS}/kept/runs", f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    client.set_terminated(run_id, "FINISHED")
    content = {"format": 1, "run_id": run_id, "manifest_sha256": "m", "config": {"model.weights": "imagenet"}}
    storage.put_atomic(f"{runs}/old/run.json", json.dumps(content).encode())
    with Lease.take(f"{runs}/old", owner="ann"):
        Checkpoints(f"{runs}/old", owner=1).save({"journal": []}, index=1, epoch=0, score=None, finished=True)

    def job(*flags: str) -> dict[str, Any]:
        argv = ["--train.storage_path", runs, "--tracking.uri", uri, "--older-than", "0", *flags]
        with pytest.raises(SystemExit) as left:
            run_job(gc.main, description="", extra=gc.add_flags, argv=argv)
        assert left.value.code == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert [(item["kind"], item["name"], item["goes"]) for item in job()["items"]] == [("run", "old", True)]
    assert job("--remove")["stayed"] == {}
    assert store.names("kept/") == []


@pytest.mark.long
def test_the_whole_job_out_of_and_into_google_storage(
    store: GoogleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_release(tmp_path / "nih", num_patients=40, seed=0, size=128)
    for path in sorted((tmp_path / "nih").rglob("*")):
        if path.is_file():
            storage.upload_atomic(path, f"{GS}/release/{path.relative_to(tmp_path / 'nih')}")

    def job(name: str, *flags: str) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    small = ["--config", str(ROOT / "jobs/configs/nih14.yaml"), "--data.size", "64"]
    made = {}
    for where in (GS, str(tmp_path)):
        made[where] = job("ingest", *small, "--data.release", f"{GS}/release", "--data.uri", f"{where}/dataset")
    bytes_of = {
        where: {
            path: storage.read_bytes(f"{where}/dataset/{path}") for path, _ in storage.list_files(f"{where}/dataset")
        }
        for where in made
    }
    assert bytes_of[GS] == bytes_of[str(tmp_path)]
    train = [
        *(*small, "--model.weights", "random", "--model.bn_group", "8", "--model.prefix_chunk", "8"),
        *("--train.use_gpu", "no", "--train.num_workers", "1", "--train.cpus_per_worker", "0.5"),
        *("--train.global_batch", "16", "--train.epochs", "2", "--train.views", "1", "--train.features_type", "fp32"),
        *("--train.features", "on", "--evaluate.bootstrap", "20", "--evaluate.saliency", "0"),
        *("--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--tracking.log_model", "false", "--run.name", "small"),
    ]
    results = {
        where: job("train", *train, "--data.uri", f"{where}/dataset", "--train.storage_path", f"{where}/runs")
        for where in made
    }
    for key in ("samples_sha256", "weights_sha256", "best_val_auroc", "test_auroc"):
        assert results[GS][key] == results[str(tmp_path)][key]
    predicted = job(
        *("predict", "--model", f"{GS}/runs/small", "--images", f"{GS}/release/images", "--out", f"{GS}/predictions"),
        *("--train.use_gpu", "no"),
    )
    assert predicted["images"] == len(storage.list_files(f"{GS}/release/images"))
