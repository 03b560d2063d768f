"""Prediction on a real local Ray: a row for every image, the same scores as the evaluation, whatever is killed."""

import dataclasses
import functools
import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient
from PIL import Image

from cxr_dist import storage
from cxr_dist.config import Config, DataConfig
from cxr_dist.data.images import to_grey_many
from cxr_dist.data.ingest import ingest
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.rows import RowDecoder
from cxr_dist.data.suspects import decode_isolated
from cxr_dist.errors import ConfigError, DataError, RunError
from cxr_dist.evaluate.inference import score_split
from cxr_dist.evaluate.scores import ScoreTable
from cxr_dist.predict import run as prediction
from cxr_dist.predict.model import find_model, pack
from cxr_dist.predict.run import predict
from tests.ingesting import ROOT, config_of
from tests.predicting import NAMES, SIDE, SIZE, kill_after, make_model, write_images
from tests.releases import bomb, noise, png, write_release

POISON = b"poison"
NUM_IMAGES = 45
PARTS = [f"part-{number:05d}.parquet" for number in range(6)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("runs") / "first")


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg")
    return out.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 images: of several sizes, modes and kinds, and four that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, NUM_IMAGES - 9)
    others = {
        "c/large.png": png(noise(50, 200)),
        "c/wide.png": png(noise(51, 64)[:20]),
        "c/colour.png": png(noise(52, SIDE), "RGB"),
        "c/alpha.png": png(noise(53, SIDE), "RGBA"),
        "c/photo.JPG": jpeg(noise(54, SIDE)),
        "bad/bomb.png": bomb(),
        "bad/cut.png": png(noise(55, SIDE))[:-20],
        "bad/empty.png": b"",
        "bad/text.png": b"not an image",
    }
    for name, data in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


BAD = {
    "bad/bomb.png": "100000 x 100000 pixels, more than the 67108864 that are decoded",
    "bad/cut.png": "truncated PNG",
    "bad/empty.png": "empty file",
    "bad/text.png": "neither PNG nor JPEG",
}


@pytest.fixture(scope="module")
def whole(cluster, model, images, tmp_path_factory) -> tuple[Path, dict]:
    """An undisturbed prediction in six parts of eight."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, predict(Config(), model=model, images=str(images), out=str(out), part_images=8)


@dataclass(frozen=True)
class InProcess:
    """The pipeline without Ray: decoded and scored here, one part after another."""

    decode: Any
    tasks: list[int]
    score: Any
    arguments: tuple

    @classmethod
    def of(cls, decode: Any, tasks: Any, score: Any, arguments: tuple, **_: Any) -> "InProcess":
        EXECUTIONS.append(list(tasks))
        return cls(decode, list(tasks), score, arguments)

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        actor = self.score(*self.arguments)
        for task in self.tasks:
            for table in self.decode({"item": [task]}):
                yield actor(table)


EXECUTIONS: list[list[int]] = []


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Predictions are made in this process; the tasks of each execution."""
    monkeypatch.setattr(prediction, "pipeline", InProcess.of)
    EXECUTIONS.clear()
    return EXECUTIONS


def rows_of(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_every_image_has_one_row_and_a_score_or_a_reason(whole, images):
    out, result = whole
    rows = rows_of(out)
    on_disk = sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))
    assert len(on_disk) == NUM_IMAGES
    assert rows["image_id"].to_pylist() == on_disk
    assert rows["uri"].to_pylist() == [f"{images}/{name}" for name in on_disk]
    assert [path.name for path in sorted(out.glob("part-*"))] == PARTS
    reasons = {row["image_id"]: row["reason"] for row in rows.to_pylist() if row["status"] == "unreadable"}
    assert reasons == BAD
    for name in NAMES:
        scored = {row["image_id"]: row[f"prob_{name}"] for row in rows.to_pylist()}
        assert {image for image, value in scored.items() if value is None} == set(BAD)
        values = [value for value in scored.values() if value is not None]
        assert len(set(values)) == len(values)  # no two images are alike
        flags = [row[f"flag_{name}"] for row in rows.to_pylist()]
        assert flags == [None if value is None else value >= 0.5 for value in scored.values()]
    assert (result["images"], result["readable"], result["unreadable"]) == (NUM_IMAGES, NUM_IMAGES - 4, 4)
    assert result["unreadable_first"] == BAD
    assert result["parts"] == {"written": 6, "found": 0, "damaged": {}}
    assert result["scored"] == NUM_IMAGES
    done = json.loads((out / "done.json").read_bytes())
    assert (done["images"], done["readable"], done["unreadable"]) == (NUM_IMAGES, NUM_IMAGES - 4, 4)
    assert [part["path"] for part in done["parts"]] == PARTS


def test_a_finished_prediction_is_left_as_it_is(whole, model, images):
    out, first = whole
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    again = predict(Config(), model=model, images=str(images), out=str(out))
    assert again["parts"] == {"written": 0, "found": 6, "damaged": {}}
    assert (again["scored"], again["images_per_s"]) == (0, None)
    assert {name: again[name] for name in ("images", "readable", "unreadable", "unreadable_first")} == {
        name: first[name] for name in ("images", "readable", "unreadable", "unreadable_first")
    }
    assert {path: path.stat().st_mtime_ns for path in out.glob("part-*")} == before


def test_a_killed_prediction_goes_on_and_ends_with_the_same_bytes(cluster, whole, model, images, tmp_path):
    out = tmp_path / "out"
    kill_after(cluster, 2, model, images, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 2 <= len(kept) < 6
    assert not (out / "done.json").exists()
    damaged = min(kept)  # what a part in flight can never be, but a disk can make of it
    damaged.write_bytes(damaged.read_bytes()[:-40])
    del kept[damaged]
    result = predict(Config(), model=model, images=str(images), out=str(out))
    assert result["parts"]["written"] == 6 - len(kept)
    assert list(result["parts"]["damaged"]) == [damaged.name]
    assert "cannot be read" in result["parts"]["damaged"][damaged.name]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(whole[0])


def test_another_model_and_other_images_are_refused(whole, model, images, tmp_path):
    out, _ = whole
    before = contents(out)
    other = make_model(tmp_path / "second", seed=1)
    with pytest.raises(DataError, match=r"found predictions of the model first/000000010@.*, now second/000000010@"):
        predict(Config(), model=other, images=str(images), out=str(out))
    with pytest.raises(DataError, match=r"threshold of Effusion 0\.5, now 0\.25"):
        predict(Config(), model=model, images=str(images), out=str(out), thresholds="0.25")
    new = images / "a" / "new.png"
    new.write_bytes(png(noise(60, SIDE)))
    gone = (images / "b" / "0001.png").rename(images / "b" / "0001")
    try:
        with pytest.raises(
            DataError, match=r"found 1 new \(a/new\.png\), 1 gone \(b/0001\.png\), expected the 45 images"
        ):
            predict(Config(), model=model, images=str(images), out=str(out))
    finally:
        new.unlink()
        gone.rename(images / "b" / "0001.png")
    stray = out / "part-00006.parquet"
    stray.write_bytes((out / PARTS[0]).read_bytes())
    try:
        with pytest.raises(DataError, match=r"found part-00006\.parquet, expected parts up to part-00005\.parquet"):
            predict(Config(), model=model, images=str(images), out=str(out))
    finally:
        stray.unlink()
    assert contents(out) == before


def segfault_if_poisoned(encoded: list[bytes], size: int) -> np.ndarray:
    if any(data.endswith(POISON) for data in encoded):
        signal.raise_signal(signal.SIGSEGV)
    return to_grey_many(encoded, size)


def isolated_segfault(encoded: bytes, size: int) -> np.ndarray | str:
    program = f"import os; os.kill(os.getpid(), {signal.SIGSEGV:d})"
    return decode_isolated(encoded, size, program) if encoded.endswith(POISON) else decode_isolated(encoded, size)


BROKEN = {"00000002_001.png": "neither PNG nor JPEG"}


@pytest.fixture(scope="module")
def dataset(cluster, tmp_path_factory) -> tuple[Path, Config]:
    """A release of 60 images and its dataset, which one of them is left out of."""
    folder = tmp_path_factory.mktemp("dataset")
    write_release(folder / "nih", num_patients=20, side=SIDE)
    (folder / "nih" / "images" / "00000002_001.png").write_bytes(b"not an image")
    config = config_of(folder / "nih", folder / "uri", size=SIZE)
    ingest(config)
    return folder, dataclasses.replace(config, data=DataConfig(uri=str(folder / "uri"), size=SIZE))


@pytest.fixture(scope="module")
def judged(dataset, tmp_path_factory) -> tuple[str, ScoreTable]:
    """A model and the evaluation's scores of the dataset's test split by it."""
    _, config = dataset
    folder = tmp_path_factory.mktemp("judged") / "run"
    model = make_model(folder, manifest_sha256=Manifest.load(config.data.uri).hash)
    return model, score_split(config, model, "test")[0]


PROBABILITIES = [f"prob_{finding}" for finding in NAMES]


def assert_scored_as_judged(rows: dict[str, dict], table: ScoreTable) -> None:
    """Bit for bit: the pixels and the chunks are the same, whichever images come together."""
    assert len(table) == 15
    for name, probabilities in zip(table.image_ids.tolist(), table.probabilities_NK, strict=True):
        assert [rows[name][column] for column in PROBABILITIES] == np.float32(probabilities).tolist()


def test_an_image_that_kills_its_decoder_has_a_reason_and_the_others_their_scores(dataset, judged, tmp_path):
    """With a registered model, that only its registry has, and two images in different packs of a part that kill the
    process which decodes them."""
    folder, config = dataset
    model, table = judged
    raw = Path(shutil.copytree(folder / "nih" / "images", tmp_path / "images"))
    killers = ["00000003\n.png", "00000006_002.png.png"]
    for name in killers:
        (raw / name).write_bytes(png(noise(70, SIDE)) + POISON)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    client.create_registered_model("cxr")
    pack(model, str(tmp_path / "packed"))
    client.create_model_version("cxr", str(tmp_path / "packed"))
    client.set_registered_model_alias("cxr", "champion", "1")
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=uri))
    poisoned = functools.partial(RowDecoder, decode=segfault_if_poisoned, isolated=isolated_segfault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "RowDecoder", poisoned)
        result = predict(
            config, model="models:/cxr@champion", images=str(raw), out=str(tmp_path / "out"), part_images=50
        )
    killed = dict.fromkeys(killers, f"decoder killed by signal {signal.SIGSEGV:d}")
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out").to_pylist()}
    assert {name: row["reason"] for name, row in rows.items() if row["reason"]} == {**BROKEN, **killed}
    assert result["unreadable_first"] == {**BROKEN, **killed}
    assert list(rows) == sorted(path.name for path in raw.iterdir())
    assert len(rows) == 62
    assert_scored_as_judged(rows, table)
    assert result["model"]["version"].startswith("cxr/1@")
    # where every node can read it, unlike the folder that it was fetched to
    staged = tmp_path / "out" / "_work" / f"model-{result['model']['sha256'][:12]}"
    with find_model(str(staged), uri) as copied:
        assert copied.sha256 == result["model"]["sha256"]
    assert {row["model_version"] for row in rows.values()} == {result["model"]["version"]}


def test_raw_images_have_the_scores_of_the_evaluation(dataset, judged, tmp_path, without_ray):
    """Decoded as they are outside of tests, in parts of another size than the evaluation's tasks."""
    folder, config = dataset
    model, table = judged
    predict(config, model=model, images=str(folder / "nih" / "images"), out=str(tmp_path), part_images=13)
    assert_scored_as_judged({row["image_id"]: row for row in rows_of(tmp_path).to_pylist()}, table)


def test_a_dataset_is_predicted_split_by_split_from_its_shards(dataset, judged, tmp_path, without_ray, monkeypatch):
    _, config = dataset
    model, table = judged
    manifest = Manifest.load(config.data.uri)
    monkeypatch.setattr(prediction, "WAVE", 1)
    result = predict(config, model=model, images=config.data.uri, split="all", out=str(tmp_path), part_images=17)
    rows = rows_of(tmp_path).to_pylist()
    counts = {part: manifest.splits[part].num_rows for part in ("train", "validation", "test")}
    # 17 images are four row groups of 4; the parts of a split are of that split alone, one in each execution
    assert without_ray == [[part] for count in counts.values() for part in range(-(-count // 16))]
    placed = [name for part in counts for name in manifest.rows(part)["image_id"].to_pylist()]
    assert [row["image_id"] for row in rows] == placed
    assert (len(set(placed)), result["images"], result["unreadable"], result["left_out_by_ingest"]) == (59, 59, 0, 1)
    for row in rows:
        assert row["uri"].startswith(f"{config.data.uri}/")
        assert Path(row["uri"]).is_file()
    by_name = {row["image_id"]: row for row in rows}
    assert_scored_as_judged(by_name, table)
    with pytest.raises(DataError, match="found predictions of split all, now test; "):
        predict(config, model=model, images=config.data.uri, split="test", out=str(tmp_path))
    with pytest.raises(ConfigError, match="--split: found none, expected one of train, validation, test, all"):
        predict(config, model=model, images=config.data.uri, out=str(tmp_path))


def test_images_of_an_object_store_are_predicted_into_it(s3_env, whole, model, images, without_ray):
    """With names that only quoting gets through, and nothing in the file."""
    for path in [*images.glob("bad/*"), *images.glob("c/*")]:
        storage.put_atomic(f"s3://cxr/predict/in/{path.relative_to(images)}", path.read_bytes())
    storage.put_atomic("s3://cxr/predict/in/c/line\nend %41.png", png(noise(52, SIDE)))
    out = "s3://cxr/predict/out"
    result = predict(Config(), model=model, images="s3://cxr/predict/in", out=out, part_images=4)
    assert (result["images"], result["unreadable_first"], result["parts"]["written"]) == (10, BAD, 3)
    parts = [storage.read_bytes(f"{out}/{name}") for name in PARTS[:3]]
    rows = {row["image_id"]: row for data in parts for row in pq.read_table(io.BytesIO(data)).to_pylist()}
    assert rows["c/large.png"]["uri"] == "s3://cxr/predict/in/c/large.png"
    for row in rows_of(whole[0]).to_pylist():
        if row["image_id"] in rows:
            assert {**row, "uri": ""} == {**rows[row["image_id"]], "uri": ""}
    colour, quoted = rows["c/colour.png"], rows["c/line\nend %41.png"]
    assert [quoted[column] for column in PROBABILITIES] == [colour[column] for column in PROBABILITIES]
    storage.delete(f"{out}/{PARTS[1]}")
    again = predict(Config(), model=model, images="s3://cxr/predict/in", out=out)
    assert again["parts"] == {"written": 1, "found": 2, "damaged": {}}
    assert [storage.read_bytes(f"{out}/{name}") for name in PARTS[:3]] == parts


def test_a_file_that_goes_while_images_are_scored_ends_the_job_in_a_sentence(cluster, model, tmp_path, monkeypatch):
    write_images(tmp_path / "images", 3)
    opened = prediction.open_source

    def open_and_lose(*arguments: Any, **options: Any) -> Any:
        source = opened(*arguments, **options)
        (tmp_path / "images" / "b" / "0001.png").unlink()
        return source

    monkeypatch.setattr(prediction, "open_source", open_and_lose)
    with pytest.raises(DataError) as raised:
        predict(Config(), model=model, images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    where = tmp_path / "images" / "b" / "0001.png"
    assert str(raised.value).startswith(
        f"{where}: found no file, expected an image; the folder changed since it was listed"
    )
    assert "\n" not in str(raised.value)


def test_a_score_that_is_no_number_ends_the_job_in_a_sentence(cluster, tmp_path):
    """From an actor, out of which Ray Data gives its errors as text alone."""
    write_images(tmp_path / "images", 2)
    model = make_model(tmp_path / "run", tail_bias=float("nan"))
    with pytest.raises(RunError, match=r"^a/0000\.png: found a score that is no number; [^\n]*$"):
        predict(Config(), model=model, images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    assert list((tmp_path / "out").glob("part-*")) == []


def test_a_part_that_is_lost_while_others_are_scored_is_an_error(whole, model, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(prediction._Work, "score", lambda self, missing, num_scorers: None)
    with pytest.raises(
        RunError, match=r"found 0 whole parts of 6 after scoring, without part-00000\.parquet \(not there\)"
    ):
        predict(Config(), model=model, images=str(images), out=str(out), part_images=8)
    assert not (out / "done.json").exists()
