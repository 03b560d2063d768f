"""Reads of a dataset in a real S3 server, through a proxy that counts them and stalls, cuts or refuses some. No Ray."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cxr_dist import storage
from cxr_dist.config import DataConfig
from cxr_dist.data import nih, ranges, record
from cxr_dist.data.assemble import ShardInfo, ShardSpec, build_shard
from cxr_dist.data.hedge import Pool
from cxr_dist.data.images import to_grey
from cxr_dist.data.manifest import Manifest, Shard
from cxr_dist.data.manifest import Split as ManifestSplit
from cxr_dist.data.plan import EMPTY, Plan, Split
from cxr_dist.data.ranges import counters
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import DataError, RunError
from tests.faultproxy import Fault, FaultProxy, Seen, fault_proxy, once
from tests.releases import write_release
from tests.unit.test_manifest import sources_of

ROOT = Path(__file__).resolve().parents[2]
SIZE, ROW_GROUP, SHARD_ROWS = 64, 8, 160
NUM_TRAIN, NUM_VALIDATION = 560, 84


@pytest.fixture(scope="module")
def uri(s3_env, tmp_path_factory) -> str:
    """A dataset in S3 of 560 train rows in 4 shards and 84 validation rows, as ingest would write it."""
    release = tmp_path_factory.mktemp("release")
    files = write_release(release, num_patients=NUM_TRAIN + NUM_VALIDATION, per_patient=1, side=16)
    labels = nih.read_labels((release / "Data_Entry_2017.csv").read_bytes(), "labels")
    uri = "s3://cxr/reads"
    spec = ShardSpec(uri=uri, release=str(release), encoding="pixels", size=SIZE, row_group=ROW_GROUP)
    rows = {
        "train": labels.slice(0, NUM_TRAIN),
        "validation": labels.slice(NUM_TRAIN, NUM_VALIDATION),
        "test": labels.slice(0, 0),
    }
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
        split: ManifestSplit(
            shards=tuple(Shard(path=s.path, bytes=s.bytes, sha256=s.sha256, rows=s.rows) for s in shards[split]),
            num_rows=table.num_rows,
            num_row_groups=groups[split].num_rows,
            patients=table.num_rows,
            positives=nih.positives(table, "nih14"),
        )
        for split, table in rows.items()
    }
    Manifest(
        label_set="nih14",
        findings=nih.FINDINGS,
        encoding="pixels",
        size=SIZE,
        pixels_version="v",
        row_group=ROW_GROUP,
        in_place=False,
        seed=0,
        validation_fraction=0.2,
        splits=splits,
        audit={},
        sources={},
        settings={},
        counts={},
        quarantine=(),
    ).save(uri, rows, groups)
    return uri


@pytest.fixture
def proxy(uri, s3_env, monkeypatch) -> Iterator[FaultProxy]:
    """The proxy, and storage that goes through it; nothing is open yet."""
    with fault_proxy(s3_env["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.forget_filesystems()
        ranges._opened.cache_clear()
        yield proxy
    monkeypatch.undo()
    storage.forget_filesystems()
    ranges._opened.cache_clear()


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Reads are asked for again after a tenth of a second, however slow the machine, long before pyarrow loses its own patience (3 s)."""
    pool = Pool(least_s=0.1, unknown_s=0.1, multiple=0, on_hedge=ranges._count_hedge)
    monkeypatch.setattr(ranges, "shared_pool", lambda on_hedge: pool)


def plan_of(manifest: Manifest, global_batch: int) -> Plan:
    splits = {
        name: Split(num_rows=manifest.splits[name].num_rows, row_group=ROW_GROUP) for name in ("train", "validation")
    }
    return Plan(**splits, seed=0, epochs=2, global_batch=global_batch)


def read_epoch(uri: str, global_batch: int = 16, world_size: int = 1, config: DataConfig | None = None) -> list[str]:
    """One epoch's training and validation steps, each rank with readers of its own: the ids of all images."""
    manifest = Manifest.load(uri)
    plan = plan_of(manifest, global_batch)
    ids = []
    for rank in range(world_size):
        for kind in ("train", "validation"):
            reader = ShardReader.from_manifest(manifest, kind, config)
            steps = [plan.step(index) for index in range(plan.steps_per_epoch)]
            shares = [step.of_rank(rank, world_size) for step in steps if step.kind == kind]
            runs = [share[share != EMPTY] for share in shares if (share != EMPTY).any()]
            for table in reader.stream(runs):
                ids += table["image_id"].to_pylist()
    return ids


def of_shards(request: Seen) -> bool:
    return "/part-" in request.path


def test_pixels_come_as_they_are(uri, proxy, tmp_path):
    manifest = Manifest.load(uri)
    table = ShardReader.from_manifest(manifest, "train").read([69, 3])
    ids = manifest.rows("train")["image_id"].to_pylist()
    assert table["image_id"].to_pylist() == ids[552:560] + ids[24:32]
    files = write_release(tmp_path, num_patients=NUM_TRAIN, per_patient=1, side=16)
    assert table["image"].to_pylist() == [
        to_grey(files[name], SIZE).tobytes() for name in table["image_id"].to_pylist()
    ]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("global_batch", [16, 512])
def test_an_epoch_reads_hardly_more_than_its_rows(uri, proxy, global_batch, world_size):
    """Counted at the server's door: every byte of every answer to whoever reads shards."""
    Manifest.load(uri)
    before = counters()
    ids = read_epoch(uri, global_batch, world_size)
    read = counters() - before
    seen = [request for request in proxy.seen if of_shards(request)]
    assert len(ids) == len(set(ids)) == NUM_TRAIN // global_batch * global_batch + NUM_VALIDATION
    on_the_wire = sum(request.body_bytes for request in seen)
    assert on_the_wire == read.bytes_read
    assert on_the_wire <= 1.05 * len(ids) * SIZE * SIZE
    assert len(seen) == read.requests
    gets = [request for request in seen if request.method == "GET"]
    assert all(request.range for request in gets)
    # what touches comes together: a rank's validation rows of a step, and by chance row groups of a training step
    assert len(gets) <= len(ids) / ROW_GROUP + 1
    assert read.hedged == 0


@pytest.mark.parametrize("after_bytes", [None, 1000], ids=["before the answer", "in the middle of it"])
def test_a_stalled_read_is_asked_for_again_and_stops_nobody(uri, proxy, hasty, after_bytes):
    reader = ShardReader.from_manifest(Manifest.load(uri), "train")
    runs = [[4 * n, 4 * n + 1] for n in range(17)]
    expected = [table["image_id"].to_pylist() for table in reader.stream(runs)]
    start = int(reader.ranges.offset[20])
    release = threading.Event()

    def is_stalled(request: Seen) -> bool:
        return request.range is not None and request.range[0] == start and "part-00001" in request.path

    first = len(proxy.seen)
    proxy.rule = once(is_stalled, Fault(until=release, after_bytes=after_bytes))
    before = counters()
    stream = reader.stream(runs)
    assert [next(stream)["image_id"].to_pylist() for _ in runs] == expected
    # all of it was read, the stalled run too, while the first request for it still hangs
    stalled, again = [request for request in proxy.seen[first:] if is_stalled(request)][:2]
    assert not stalled.done.is_set()
    assert stalled.body_bytes == (after_bytes or 0)
    assert again.connection != stalled.connection
    assert (counters() - before).hedged >= 1
    opened = counters()
    ranges._opened(reader.ranges.uri(1), 1)  # by the second filesystem, which has connections of its own
    assert counters() == opened
    release.set()
    assert stalled.done.wait(60)
    assert reader.read([20])["image_id"].to_pylist() == reader.read([20, 21])["image_id"].to_pylist()[:8]


def test_a_read_that_no_connection_answers_is_an_error(uri, proxy, hasty):
    reader = ShardReader.from_manifest(Manifest.load(uri), "train", DataConfig(read_timeout_s=1))
    reader.read([0])
    release = threading.Event()
    proxy.rule = lambda request: Fault(until=release) if "part-00001" in request.path else None
    with pytest.raises(RunError, match=r"s3://cxr/reads/train/part-00001\.parquet: storage gave no answer for 1 s"):
        reader.read([0, 20])
    asked = proxy.wait_for(lambda request: "part-00001" in request.path)
    proxy.wait_for(lambda request: "part-00001" in request.path and request.connection != asked.connection)
    assert reader.read([40]).num_rows == ROW_GROUP
    release.set()


READ_ONE = (
    "import sys; from tests.integration.test_reads import *\n"
    "reader = ShardReader.from_manifest(Manifest.load(sys.argv[1]), 'train', DataConfig(read_timeout_s=1))\n"
    "try:\n    reader.read([20])\nexcept RunError:\n    print('given up'); sys.exit(3)"
)


@pytest.mark.parametrize("trickle", [False, True], ids=["silent", "trickling"])
def test_a_read_that_hangs_keeps_no_process_alive(uri, proxy, trickle):
    """pyarrow alone would wait for it when the process ends: more than a minute, or for ever while bytes trickle in."""
    release = threading.Event()
    fault = Fault(trickle=release) if trickle else Fault(until=release)
    proxy.rule = lambda request: fault if "part-00001" in request.path and request.range else None
    command = [sys.executable, "-c", READ_ONE, uri]
    child = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (child.returncode, child.stdout) == (3, "given up\n"), child.stderr
    assert child.stderr == ""
    assert not all(request.done.is_set() for request in proxy.seen)
    release.set()


@pytest.mark.parametrize("after_bytes", [None, 1000])
def test_a_cut_connection_costs_nothing_but_time(uri, proxy, after_bytes):
    reader = ShardReader.from_manifest(Manifest.load(uri), "train")
    expected = reader.read([20])
    cut = Fault(cut=True, after_bytes=after_bytes)
    proxy.rule = once(lambda request: request.range is not None and of_shards(request), cut)
    assert reader.read([20]).equals(expected)


def test_a_server_that_asks_to_slow_down_is_asked_again(uri, proxy):
    reader = ShardReader.from_manifest(Manifest.load(uri), "train")
    refused = threading.Semaphore(4)

    def rule(request: Seen) -> Fault | None:
        return Fault(status=503, code="SlowDown") if refused.acquire(blocking=False) else None

    proxy.rule = rule
    assert reader.read([20]).num_rows == ROW_GROUP
    assert [request.status for request in proxy.seen if of_shards(request)].count(503) == 4


def test_the_second_epoch_reads_nothing_from_storage(uri, proxy, tmp_path):
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    manifest = Manifest.load(uri)
    first = read_epoch(uri, config=config)
    stored = [request for request in proxy.seen if of_shards(request)]
    assert sum(request.body_bytes for request in stored) == sum(
        sum(manifest.row_groups(split)["bytes"].to_pylist()) for split in ("train", "validation")
    )
    ranges._opened.cache_clear()
    before, at = counters(), len(proxy.seen)
    assert read_epoch(uri, config=config) == first
    assert [request for request in proxy.seen[at:] if of_shards(request)] == []
    read = counters() - before
    assert (read.bytes_read, read.requests, read.cache_misses) == (0, 0, 0)
    assert read.cache_hits == (NUM_TRAIN + NUM_VALIDATION + ROW_GROUP - 1) // ROW_GROUP


READ_ALL = (
    "import sys; from tests.integration.test_reads import *\n"
    "ids = read_epoch(sys.argv[1], config=DataConfig(cache_dir=sys.argv[2]))\n"
    "read = counters(); print(len(set(ids)), read.cache_hits + read.cache_misses, read.bytes_read)"
)


def test_the_processes_of_a_node_share_the_cache(uri, proxy, tmp_path):
    """Two fill it at the same time, one of them is killed; a third finds everything there."""
    command = [sys.executable, "-c", READ_ALL, uri, str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    whole = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    proxy.wait_for(lambda request: of_shards(request) and request.range is not None)
    killed.kill()
    killed.wait()
    groups = (NUM_TRAIN + NUM_VALIDATION + ROW_GROUP - 1) // ROW_GROUP
    assert whole.communicate(timeout=120)[0].split()[:2] == [str(NUM_TRAIN + NUM_VALIDATION), str(groups)]
    third = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert third.stdout.split() == [str(NUM_TRAIN + NUM_VALIDATION), str(groups), "0"], third.stderr


def test_a_shard_that_was_replaced_is_named(uri, proxy):
    manifest = Manifest.load(uri)
    shard = storage.join(uri, manifest.splits["train"].shards[1].path)
    whole = storage.read_bytes(shard)
    cut = int(ShardReader.from_manifest(manifest, "train").ranges.offset[25]) + 1000  # in the middle of a row group
    noise = np.random.default_rng(0).bytes(len(whole))
    changes = {
        "found 100 bytes, the manifest says": whole[:100],
        f"found {cut} bytes, the manifest says": whole[:cut],
        r"found a broken shard \(.*\); the file was changed or cut, delete": noise,
        "found no file, expected a shard; ingest again": None,
    }
    reader = ShardReader.from_manifest(manifest, "train")
    try:
        for opened in (False, True):  # before the shard was opened by this process, and after
            for words, content in changes.items():
                ranges._opened.cache_clear()
                if opened:
                    storage.put_atomic(shard, whole)
                    assert reader.read([25]).num_rows == ROW_GROUP
                if content is None:
                    storage.delete(shard)
                else:
                    storage.put_atomic(shard, content)
                with pytest.raises(DataError, match=rf"part-00001\.parquet: {words}"):
                    reader.read([0, 25])
                assert reader.read([0]).num_rows == ROW_GROUP
    finally:
        storage.put_atomic(shard, whole)
    assert reader.read([0, 25]).num_rows == 2 * ROW_GROUP
