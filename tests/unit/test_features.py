"""Kept features: keys, sets that are not what they should be, what is worth keeping, and where it stays."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cxr_dist import storage
from cxr_dist.config import Config, ModelConfig, TrainConfig
from cxr_dist.data.features import FeatureSet, finished_shards, key_of, locate, num_shards, set_aside, shard_groups, use
from cxr_dist.data.plan import EMPTY, Split
from cxr_dist.data.resident import HostRows
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.model.features import DeviceRows, from_bytes, to_bytes
from cxr_dist.train.cache import look, prepare_features
from cxr_dist.train.feed import choose
from cxr_dist.train.job import TrainJob, training_views
from cxr_dist.train.survey import Rates, Work, decide, fits, settled, survey
from tests.training import make_initial, make_job, with_features

GB = 10**9


@pytest.fixture(scope="module")
def initial() -> bytes:
    return make_initial()


@pytest.fixture
def job(tmp_path: Path, initial: bytes, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    """51 training and 18 validation images; shards of 16 images, so that there are several."""
    monkeypatch.setattr("cxr_dist.data.features.SHARD_IMAGES", 16)
    return with_features(make_job(tmp_path / "run", initial, views=1, features_type="fp32"))


def sets_of(job: TrainJob) -> dict[tuple[str, int], FeatureSet]:
    assert job.features is not None
    return job.features


def wanted(job: TrainJob) -> Any:
    return look(job, survey(job, measure=False))


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_stored_bytes_are_the_features_in_channels_last_order(kind: str) -> None:
    features = torch.randn(3, 5, 2, 4).to(memory_format=torch.channels_last)
    stored = to_bytes(features, kind)
    assert stored.dtype == np.uint8
    assert stored.shape == (3, 2 * 4 * 5 * (4 if kind == "fp32" else 2))
    back = from_bytes(stored, (2, 4, 5), kind)
    assert back.is_contiguous(memory_format=torch.channels_last)
    kept = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    assert torch.equal(back, features.to(kept))
    first = torch.from_numpy(stored[1].copy()).view(kept)[:5]
    assert torch.equal(first, features[1, :, 0, 0].to(kept))


def test_a_value_that_the_type_cannot_hold_names_its_image() -> None:
    features = torch.zeros(4, 2, 1, 1)
    features[2, 1] = 70_000.0
    with pytest.raises(ValueError, match="2"):
        to_bytes(features, "fp16")
    assert np.isfinite(from_bytes(to_bytes(features, "bf16"), (1, 1, 2), "bf16").float().numpy()).all()


def test_shards_hold_whole_row_groups_and_every_row_once(job: TrainJob) -> None:
    found = sets_of(job)["train", 1]
    assert [shard.rows for shard in found.shards] == [16, 16, 16, 3]
    tables = [found.read_shard(number) for number in range(4)]
    assert [name for table in tables for name in table["image_id"].to_pylist()] == [
        f"train{row:04d}.png" for row in range(51)
    ]
    assert shard_groups(job.plan.train, 3).tolist() == [12, EMPTY, EMPTY, EMPTY]
    assert num_shards(Split(num_rows=48, row_group=4)) == 3


def test_reader_gives_the_row_groups_that_are_asked_for(job: TrainJob) -> None:
    found = sets_of(job)["train", 1]
    table = found.reader().read(np.array([12, 0, 5]))
    expected = [row for group in (12, 0, 5) for row in range(group * 4, min(51, group * 4 + 4))]
    assert table["image_id"].to_pylist() == [f"train{row:04d}.png" for row in expected]
    whole = pa.concat_tables([found.read_shard(number) for number in range(4)])
    assert table["image"].to_pylist() == whole["image"].take(pa.array(expected)).to_pylist()


def test_a_run_leaves_a_sign_of_use_and_turns_from_a_set_that_is_set_aside_at_that_moment(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, signs, built = Path(sets_of(job)["train", 1].folder), [], []

    def meets_a_removal(where: str, by: str) -> bool:
        if where == str(folder):
            set_aside(where, "it was not used for long")
        signs.append(Path(where).name)
        return use(where, by)

    def build(job: TrainJob, places: Any, found: Any) -> Any:
        built.append(sorted(Path(place.folder).name for place in places.values()))
        return {}

    monkeypatch.setattr("cxr_dist.train.cache.begin_to_use", meets_a_removal)
    monkeypatch.setattr("cxr_dist.train.cache.build", build)
    prepare_features(job, use=True)
    validation = Path(sets_of(job)["validation", 0].folder).name
    assert built == [sorted([validation, f"{folder.name}.1"])]
    assert signs == [validation, folder.name, validation, f"{folder.name}.1"]
    assert json.loads((folder.parent / validation / "used.json").read_text())["run"] == job.folder
    assert wanted(job)["validation", 0].whole == sets_of(job)["validation", 0]


def test_features_that_may_only_be_read_are_used_without_a_sign(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(uri: str, data: bytes) -> None:
        raise InputError("access was refused")

    monkeypatch.setattr(storage, "put_atomic", refused)
    assert use(sets_of(job)["train", 1].folder, "run")


def test_the_same_key_finds_the_set_and_every_input_changes_the_key(job: TrainJob) -> None:
    places = wanted(job)
    assert {name: place.whole for name, place in places.items()} == sets_of(job)
    inputs = places["train", 1].inputs
    assert {"manifest_sha256", "pixels_version", "weights_sha256", "boundary", "normalization", "seed", "view"} <= set(
        inputs
    )
    assert {"augmentation", "type", "precision", "form", "chunk", "device", "tf32", "torch", "size"} <= set(inputs)
    keys = {key_of({**inputs, name: "other"}) for name in inputs}
    assert len(keys | {key_of(inputs)}) == len(inputs) + 1
    assert not {"seed", "augmentation"} & set(places["validation", 0].inputs)


def test_views_of_another_seed_are_other_features_but_plain_images_are_shared(job: TrainJob) -> None:
    other = dataclasses.replace(job, plan=dataclasses.replace(job.plan, seed=1))
    places = wanted(other)
    assert places["train", 1].whole is None
    assert places["validation", 0].whole == sets_of(job)["validation", 0]


def change_index(found: FeatureSet, **changes: Any) -> None:
    path = Path(found.folder, "features.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found: change_index(found, inputs={**found.inputs, "view": 7}), "found features of another view"),
        (lambda found: change_index(found, num_rows=50), "found 51 rows, expected 51|found .* rows"),
        (lambda found: change_index(found, format=99), "found format 99, expected 1"),
        (lambda found: Path(found.folder, "features.json").write_text("{"), "found no index of features"),
        (lambda found: Path(found.folder, "00001.parquet").unlink(), "00001.parquet: found no file"),
        (lambda found: Path(found.folder, "00002.parquet").write_bytes(b"x"), "00002.parquet: found 1 bytes, expected"),
    ],
)
def test_a_set_that_is_not_what_it_should_be_is_set_aside_and_made_again_beside(
    job: TrainJob, spoil: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = sets_of(job)["train", 1]
    spoil(found)
    with pytest.raises(DataError, match=reason):
        FeatureSet.load(found.folder, found.inputs, job.plan.train)
    folder, whole = locate(str(Path(found.folder).parent), found.inputs, job.plan.train)
    assert whole is None
    assert folder == found.folder + ".1"
    assert "features are not used and made again beside it" in caplog.text
    again = sets_of(with_features(dataclasses.replace(job, features=None)))["train", 1]
    assert again.folder == folder
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in found.shards]
    assert Path(found.folder, "00000.parquet").exists()


def test_changed_bytes_of_the_right_length_are_found_when_they_are_read(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sets_of(job)["train", 1]
    path = Path(found.folder, "00001.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert locate(str(Path(found.folder).parent), found.inputs, job.plan.train)[1] is not None
    with pytest.raises(DataError, match=r"00001\.parquet: found another SHA-256 than the index has"):
        found.read_shard(1)
    with pytest.raises(DataError, match=r"00001\.parquet"):
        found.reader().read(np.arange(4, 8))


def test_a_build_that_was_cut_off_computes_only_what_is_missing(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sets_of(job)["train", 1]
    Path(found.folder, "features.json").unlink()
    Path(found.folder, "00002.parquet.json").unlink()  # died between the shard and its sidecar
    Path(found.folder, "00003.parquet").unlink()
    Path(found.folder, "00003.parquet.json").unlink()
    assert sorted(finished_shards(found.folder, found.key, job.plan.train)) == [0, 1]
    before = {number: Path(found.folder, f"0000{number}.parquet").stat().st_mtime_ns for number in (0, 1)}
    again = sets_of(with_features(dataclasses.replace(job, features=None)))["train", 1]
    assert again == found
    assert before == {number: Path(found.folder, f"0000{number}.parquet").stat().st_mtime_ns for number in (0, 1)}


def test_what_cannot_be_written_leaves_no_whole_set(tmp_path: Path, initial: bytes) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        with_features(make_job(tmp_path / "run", initial, views=1, features_uri=str(blocked)))


def test_rows_in_memory_are_the_rows_asked_for(job: TrainJob) -> None:
    found = sets_of(job)["train", 1]
    matrices = [
        np.stack([np.frombuffer(row, np.uint8) for row in found.read_shard(n)["image"].to_pylist()]) for n in range(4)
    ]
    rows = Split(num_rows=51, row_group=4).rows(np.array([12, 3, EMPTY, 4]))
    expected = np.where(rows[:, None] >= 0, np.concatenate(matrices)[rows], 0)
    for store in (HostRows(found), DeviceRows(found, torch.device("cpu"))):
        for matrix in matrices:
            store.add(matrix)
        assert np.array_equal(np.asarray(store.take(rows)), expected)


WORK = Work(epochs=10, train=1000, validation=200, missing=1200, wanted=1200)
RATES = Rates(prefix=0.08, tail=0.01, score=0.004)


def test_keeping_features_is_decided_by_what_both_ways_cost() -> None:
    found = decide(WORK, RATES)
    # without: 10 * (1000 * 0.09 + 200 * 0.084) = 1068; with: 10 * (10 + 0.8) + 1200 * 0.08 + 10 = 214
    assert found.use
    assert found.why.startswith("5.0 times faster: 1068 s without and 214 s with")
    assert not decide(dataclasses.replace(WORK, epochs=1), RATES).use
    assert not decide(dataclasses.replace(WORK, missing=12_000), RATES).use
    assert decide(dataclasses.replace(WORK, epochs=1, missing=0), RATES).use
    assert not decide(WORK, dataclasses.replace(RATES, prefix=0.0005)).use


def test_features_that_do_not_fit_the_disk_are_not_kept() -> None:
    found = decide(WORK, RATES, free_bytes=10 * GB, needed_bytes=10 * GB)
    assert (found.use, found.why) == (
        False,
        "features would take 10.0 GB, more than is free there; set train.features_uri",
    )
    assert decide(WORK, RATES, free_bytes=10 * GB, needed_bytes=9 * GB).use
    assert fits(None, 10**18)


@pytest.mark.parametrize(
    ("train", "model", "use", "why"),
    [
        ({"features": "off", "views": 1}, {}, False, "train.features is off"),
        ({"features": "on", "views": 1}, {}, True, "train.features is on"),
        ({"features": "auto"}, {}, False, "every epoch shows fresh views"),
        ({"features": "auto", "views": 1}, {"trainable": "all"}, False, "no part of the network is frozen"),
    ],
)
def test_configs_that_decide_by_themselves(train: dict[str, Any], model: dict[str, Any], use: bool, why: str) -> None:
    found = settled(Config(train=TrainConfig(**train), model=ModelConfig(**model)))
    assert found is not None
    assert found.use is use
    assert why in found.why


def test_rates_decide_where_the_config_does_not() -> None:
    assert settled(Config(train=TrainConfig(features="auto", views=1))) is None
    assert settled(Config(train=TrainConfig(features="auto", augment=False))) is None


@pytest.mark.parametrize(
    ("changes", "model"), [({"views": 0}, {}), ({"views": 1}, {"trainable": "all"})], ids=["fresh views", "all"]
)
def test_features_that_cannot_be_are_refused_before_anything_is_computed(
    tmp_path: Path, initial: bytes, changes: dict[str, Any], model: dict[str, Any]
) -> None:
    job = make_job(tmp_path / "run", initial, features="on", model=model, **changes)
    with pytest.raises(ConfigError, match=r"^train.features: found on, but .*; set it to auto or off$"):
        prepare_features(job)


def test_views_of_a_run() -> None:
    assert list(training_views(TrainConfig(views=3))) == [1, 2, 3]
    assert list(training_views(TrainConfig(views=0, augment=False))) == [0]
    assert list(training_views(TrainConfig(views=3, augment=False))) == [0]


@pytest.mark.parametrize(
    ("asked", "device", "store", "level"),
    [
        ("auto", 100, 100, "device"),
        ("auto", 16, 100, "store"),
        ("auto", 0, 100, "store"),
        ("auto", 0, 14, "stream"),
        ("auto", 17, 0, "device"),
        ("device", 16, 100, "store"),
        ("store", 100, 100, "store"),
        ("store", 100, 10, "stream"),
        ("stream", 100, 100, "stream"),
    ],
)
def test_ten_gigabytes_stay_where_they_fit(asked: str, device: int, store: int, level: str) -> None:
    found, why = choose(asked, 10 * GB, device_bytes=device * GB, store_bytes=store * GB)
    assert found == level
    assert why.startswith("10.0 GB of features ")
    assert (f"{asked} was asked for" in why) is (asked not in ("auto", level))


def test_set_aside_says_why(tmp_path: Path) -> None:
    set_aside(str(tmp_path / "set"), "a reason")
    assert json.loads(storage.read_bytes(str(tmp_path / "set" / "set_aside.json"))) == {"reason": "a reason"}
