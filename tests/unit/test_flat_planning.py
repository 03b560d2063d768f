"""What planning holds does not grow with the images: no Python object for any, some bytes for a row group. No Ray.

Objects and bytes are counted, not seconds.
"""

import gc
import itertools
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist.bench import driver, vast
from cxr_dist.data import sidetables
from cxr_dist.data.decode import StreamSpec
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.nih import FINDINGS, findings_matrix
from cxr_dist.data.plan import Plan, Split
from cxr_dist.data.shards import ShardReader
from cxr_dist.errors import InputError, RunError
from cxr_dist.train import progress
from cxr_dist.train.progress import planned_samples
from cxr_dist.train.run import check_samples

FEW, MANY = 8_000, 400_000
ROW_GROUP = 8
SHARD_MB = 2048
"""So large that there are a handful: what has one object a shard does not hide what has one an image."""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Manifest]:
    folder = tmp_path_factory.mktemp("vast")
    return {
        count: vast.write_manifest(str(folder / str(count)), count, shard_mb=SHARD_MB, row_group=ROW_GROUP)
        for count in (FEW, MANY)
    }


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Side tables as those of large datasets are read: never whole in memory."""
    monkeypatch.setattr(sidetables, "KEPT_BYTES", 0)
    sidetables.opened.cache_clear()
    yield
    sidetables.opened.cache_clear()


def objects_of(make: Callable[[], Any]) -> int:
    """Python objects that there are more of while the result lives."""
    gc.collect()
    before = sys.getallocatedblocks()
    result = make()
    gc.collect()
    after = sys.getallocatedblocks()
    del result
    return after - before


def peak_of(work: Callable[[], Any]) -> int:
    """Highest number of bytes that Python and numpy had allocated during the work, above those before; Arrow's own apart."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def plan_of(manifest: Manifest, ranks: int = 1, share: int = 64) -> Plan:
    splits = [Split(num_rows=manifest.splits[name].num_rows, row_group=ROW_GROUP) for name in ("train", "validation")]
    return Plan(train=splits[0], validation=splits[1], seed=0, epochs=3, global_batch=share * ranks)


def test_the_written_manifest_is_what_it_says(datasets: dict[int, Manifest]) -> None:
    manifest = Manifest.load(datasets[FEW].uri)
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {
        "train": 6080, "validation": 320, "test": 1600,
    }  # fmt: skip
    seen, patients = set(), []
    for name, split in manifest.splits.items():
        rows = manifest.rows(name)
        seen |= set(rows["image_id"].to_pylist())
        patients.append(set(rows["patient_id"].to_pylist()))
        assert len(patients[-1]) == split.patients
        counted = dict(zip(FINDINGS, findings_matrix(rows).sum(axis=0).tolist(), strict=True))
        assert counted == split.positives
        assert all(
            int(i[:8]) == p for i, p in zip(rows["image_id"].to_pylist(), rows["patient_id"].to_pylist(), strict=True)
        )
        groups = manifest.row_groups(name)
        assert sum(groups["rows"].to_pylist()) == split.num_rows
        assert (groups["offset"].to_numpy()[1:] == np.cumsum(groups["bytes"].to_numpy())[:-1] + 4).all()
    assert len(seen) == FEW
    assert not any(a & b for a, b in itertools.combinations(patients, 2))


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vast.storage, "free_bytes", lambda uri: 10**9)
    with pytest.raises(InputError, match=r"found 1\.0 GB free, expected 8\.0 for the tables of 100000000 images"):
        vast.write_manifest(str(tmp_path / "x"), 10**8)
    assert not (tmp_path / "x").exists()


def test_no_python_object_stands_for_an_image(datasets: dict[int, Manifest], on_disk: None) -> None:
    def held(count: int) -> int:
        manifest = Manifest.load(datasets[count].uri)
        return objects_of(lambda: [ShardReader.from_manifest(manifest, split) for split in manifest.splits])

    held(FEW)  # what is imported and cached at the first time
    assert abs(held(MANY) - held(FEW)) < 200
    assert objects_of(lambda: Manifest.load(datasets[MANY].uri)) < 2000


def test_a_reader_has_two_bytes_a_row_group_at_most(datasets: dict[int, Manifest], on_disk: None) -> None:
    manifest = Manifest.load(datasets[MANY].uri)
    reader = ShardReader.from_manifest(manifest, "train")
    assert isinstance(reader, ShardReader)
    groups = manifest.splits["train"].num_row_groups
    assert driver.places_bytes(reader) <= 2 * groups
    table, everything = manifest.row_groups("train"), np.arange(groups)
    ranges = reader.ranges
    for column, name in ((ranges.offset, "offset"), (ranges.length, "bytes"), (reader.num_rows, "rows")):
        assert (column[everything] == table[name].to_numpy()).all()
    assert ranges.paths.take(pa.array(ranges.file_index[everything])).to_pylist() == table["path"].to_pylist()


def test_no_reader_asks_for_a_whole_table(datasets: dict[int, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(self: Manifest, split: str) -> None:
        raise AssertionError(f"{split} as one table")

    monkeypatch.setattr(Manifest, "row_groups", whole)
    monkeypatch.setattr(Manifest, "rows", whole)
    manifest = datasets[FEW]
    assert driver.places_bytes(ShardReader.from_manifest(manifest, "train")) > 0
    job: Any = SimpleNamespace(plan=plan_of(manifest))
    with pytest.raises(RunError, match=r"images trained on: found SHA-256 0, expected [0-9a-f]{64} by the plan"):
        check_samples(job, manifest, {"epochs": 1, "samples_sha256": "0"})


def test_a_step_and_a_task_are_planned_without_a_table(datasets: dict[int, Manifest]) -> None:
    def work(manifest: Manifest, ranks: int) -> Callable[[], None]:
        plan = plan_of(manifest, ranks)
        spec = StreamSpec(
            plan=plan, train=None, validation=None, world_size=ranks, start=0, steps_per_task=4, size=224,  # type: ignore[arg-type]
            encoding="pixels", findings=(0,), views=0, augment=True, token="",
        )  # fmt: skip

        def steps() -> None:
            for index in range(0, plan.num_steps, max(1, plan.num_steps // 20)):
                plan.share(index, ranks - 1, ranks)
            for number in range(0, spec.num_tasks, max(1, spec.num_tasks // 20)):
                spec.task(number)

        return steps

    for ranks in (1, 64):
        few, many = (peak_of(work(datasets[count], ranks)) for count in (FEW, MANY))
        assert many < few + 4096
    # a share costs the same at any number of ranks: 8 row groups of 64 images
    assert peak_of(work(datasets[MANY], 64)) < peak_of(work(datasets[MANY], 1)) + 4096


def test_the_final_account_takes_the_images_a_few_at_a_time(
    datasets: dict[int, Manifest], on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidetables, "BATCH_ROWS", 4096)
    monkeypatch.setattr(progress, "TOGETHER", 512)
    manifest = Manifest.load(datasets[MANY].uri)
    plan = plan_of(manifest)

    def account(rows: int) -> int:
        def names() -> Iterator[str]:
            batches = manifest.row_batches("train", ["image_id"])
            found = itertools.chain.from_iterable(batch["image_id"].to_pylist() for batch in batches)
            return itertools.islice(found, rows)

        return peak_of(lambda: planned_samples(plan, names(), 1))

    few, many = account(20_000), account(100_000)
    assert many < 1.1 * few
    assert many < 200 * 2 * 4096  # the names of a batch and of a part, not the split's
