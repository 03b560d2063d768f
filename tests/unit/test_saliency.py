"""Which images are shown, their pixels by name, and what lies in a report's folder: with and without a fault."""

import dataclasses
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.config import Config, DataConfig, EvaluateConfig
from cxr_dist.data.boxes import Box
from cxr_dist.data.images import to_grey
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.picked import picked_images
from cxr_dist.errors import DataError
from cxr_dist.evaluate import saliency
from cxr_dist.evaluate.overlay import OVERLAY, THUMBNAIL, overlay, thumbnail
from cxr_dist.evaluate.saliency import add_saliency, pick
from cxr_dist.evaluate.scores import ScoreTable
from tests.predicting import NAMES, make_model
from tests.unit.test_manifest import make_dataset

SIZE = 64


def table(ids: list[str], patients: list[int], probabilities: list, labels: list, **changes) -> ScoreTable:
    return ScoreTable(
        **{
            "image_ids": np.array(ids),
            "patient_ids": np.array(patients, np.int64),
            "split": "test",
            "findings": NAMES,
            "probabilities_NK": np.array(probabilities, np.float64).reshape(len(ids), -1),
            "logits_NK": None,
            "labels_NK": np.array(labels, np.bool_).reshape(len(ids), -1),
        }
        | changes
    )


ONE = {"findings": ("Mass",)}


def test_the_surest_of_each_kind_one_a_patient() -> None:
    ids = ["a", "b", "c", "d", "e", "f", "g"]
    scores = table(ids, [1, 1, 2, 3, 4, 5, 6], [0.9, 0.8, 0.8, 0.5, 0.95, 0.1, 0.4], [1, 1, 1, 1, 0, 1, 1], **ONE)
    picks = pick(scores, {"Mass": 0.5}, 2)
    assert [(one.kind, one.image_id, one.probability, one.label) for one in picks] == [
        ("true positive", "a", 0.9, True),  # b is the same patient's
        ("true positive", "c", 0.8, True),
        ("false positive", "e", 0.95, False),
        ("false negative", "f", 0.1, True),
        ("false negative", "g", 0.4, True),
    ]
    assert [one.image_id for one in pick(scores, {"Mass": 0.5}, 9) if one.kind == "true positive"] == ["a", "c", "d"]
    assert pick(scores, {"Mass": 0.5}, 0) == []
    order = np.random.default_rng(0).permutation(7)
    shuffled = table(
        [ids[row] for row in order],
        scores.patient_ids[order].tolist(),
        scores.probabilities_NK[order].tolist(),
        scores.labels_NK[order].tolist(),
        **ONE,
    )
    assert pick(shuffled, {"Mass": 0.5}, 2) == picks


def test_equal_scores_come_by_image_id() -> None:
    scores = table(["c", "a", "b"], [1, 2, 3], [0.7, 0.7, 0.7], [1, 1, 1], **ONE)
    assert [one.image_id for one in pick(scores, {"Mass": 0.5}, 3)] == ["a", "b", "c"]
    assert [one.kind for one in pick(scores, {"Mass": 0.8}, 3)] == ["false negative"] * 3


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> tuple[Manifest, dict[str, bytes]]:
    monkeypatch.setattr("tests.unit.test_manifest.SIZE", SIZE)
    return make_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["pixels", "png"])
def test_images_are_read_by_name(tmp_path, monkeypatch, encoding) -> None:
    monkeypatch.setattr("cxr_dist.data.picked.ROWS", 2)
    manifest, files = make_dataset(tmp_path, encoding)
    wanted = ["00000014_000.png", "00000002_000.png", "00000013_000.png", "00000002_000.png"]
    parts = list(picked_images(manifest, "train", wanted))
    assert [list(part) for part in parts] == [["00000002_000.png", "00000013_000.png"], ["00000014_000.png"]]
    for part in parts:
        for image_id, pixels in part.items():
            np.testing.assert_array_equal(pixels, to_grey(files[image_id], manifest.size))
    with pytest.raises(DataError, match=r"found no image 00000015_000\.png in the train split"):
        list(picked_images(manifest, "train", ["00000001_000.png", "00000015_000.png"]))


def png_of(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


def test_an_overlay_leaves_what_has_no_heat_and_frames_the_box() -> None:
    image = np.full((SIZE, SIZE), 100, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    plain = png_of(overlay(image, heat))
    assert plain.shape == (OVERLAY, OVERLAY, 3)
    assert (plain[OVERLAY // 2 :] == 100).all()
    assert plain[OVERLAY // 8, OVERLAY // 8].tolist() != [100] * 3
    boxed = png_of(overlay(image, heat, [Box(image_id="a", finding="Mass", left=0.5, top=0.5, right=0.75, bottom=1)]))
    framed = (boxed != plain).any(axis=2)
    rows, columns = np.flatnonzero(framed.any(axis=1)), np.flatnonzero(framed.any(axis=0))
    assert (rows[0], rows[-1]) == pytest.approx((OVERLAY / 2, OVERLAY - 1), abs=1)
    assert (columns[0], columns[-1]) == pytest.approx((OVERLAY / 2, OVERLAY * 3 / 4), abs=1)
    assert not framed[OVERLAY * 3 // 4, OVERLAY * 5 // 8]  # a frame, not a plate
    assert png_of(thumbnail(image)).shape == (THUMBNAIL, THUMBNAIL)


@dataclasses.dataclass(frozen=True)
class Run:
    config: Config
    checkpoint: str
    scores: ScoreTable
    validation: ScoreTable
    boxes: Path

    def add(self, folder: Path, **evaluate) -> list[saliency.Picture]:
        config = dataclasses.replace(self.config, evaluate=EvaluateConfig(**{"saliency": 1, **evaluate}))
        return add_saliency(folder, config, self.checkpoint, self.scores, self.validation)


@pytest.fixture
def run(dataset, tmp_path) -> Run:
    """Five test images of five patients, a checkpoint of random weights, and boxes, of which four are of images and findings judged."""
    manifest, _ = dataset
    ids = manifest.rows("test")["image_id"].to_pylist()
    probabilities = np.tile(np.array([0.9, 0.8, 0.7, 0.2, 0.1])[:, None], (1, 3))
    labels = np.tile(np.array([1, 0, 1, 0, 1])[:, None], (1, 3))
    scores = table(ids, list(range(5)), probabilities.tolist(), labels.tolist())
    validation = table(
        [f"v{row}" for row in range(4)],
        [90, 91, 92, 93],
        [[0.9] * 3, [0.6] * 3, [0.5] * 3, [0.1] * 3],
        [[1] * 3, [1] * 3, [0] * 3, [0] * 3],
        split="validation",
    )
    boxes = tmp_path / "boxes.csv"
    rows = [
        f"{ids[0]},Effusion,0,0,1024,1024",
        f"{ids[0]},Effusion,0,0,512,512",
        f"{ids[3]},Effusion,1000,1000,4,4",
        f"{ids[2]},Cardiomegaly,0,0,9,9",
        "99999999_000.png,Mass,0,0,9,9",
        f"{ids[2]},Mass,0,0,1024,1024",
    ]
    boxes.write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + "\n".join(rows) + "\n")
    config = Config(data=DataConfig(uri=manifest.uri))
    return Run(config, make_model(tmp_path / "run"), scores, validation, boxes)


def test_what_a_report_s_folder_gets(run, tmp_path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    pictures = run.add(folder, boxes=str(run.boxes))
    ids = run.scores.image_ids.tolist()
    expected = [("true positive", ids[0]), ("false positive", ids[1]), ("false negative", ids[4])]
    assert [(one["finding"], one["kind"], one["image_id"]) for one in pictures] == [
        (finding, *one) for finding in NAMES for one in expected
    ]
    found = json.loads((folder / "saliency.json").read_text())
    assert (found["error"], found["split"], found["thresholds"]) == (None, "test", dict.fromkeys(NAMES, 0.6))
    files = {str(path.relative_to(folder)) for path in (folder / "saliency").rglob("*.png")}
    assert files == {one["overlay"] for one in found["images"] if one["overlay"]}
    for one, picture in zip(found["images"], pictures, strict=True):
        assert {**one, "overlay": None} == {**{k: v for k, v in picture.items() if "png" not in k}, "overlay": None}
        assert png_of(picture["thumbnail_png"]).shape == (THUMBNAIL, THUMBNAIL)
        assert (one["overlay"] is None) == (picture["overlay_png"] is None)
        if one["overlay"]:
            assert (folder / one["overlay"]).read_bytes() == picture["overlay_png"]
    assert f"saliency/Effusion/true_positive_1_{Path(ids[0]).stem}.png" in files
    assert {one["finding"] for one in found["images"] if one["overlay"] is None} == {
        "Mass",
        "Hernia",
    }  # as weights fell

    located = json.loads((folder / "localisation.json").read_text())
    assert (located["n_boxes"], located["n_used"]) == (6, 4)
    assert (located["n_other_images"], located["n_other_findings"]) == (1, 1)
    assert located["map"] == [2, 2]
    mass, effusion, hernia = (located["findings"][name] for name in ("Mass", "Effusion", "Hernia"))
    assert (effusion["n_boxes"], effusion["n_images"], effusion["pointing"]["n"]) == (3, 2, 2)
    assert effusion["pointing"]["hits"] == 1  # anywhere is in the whole image, nothing in the other's corner
    assert effusion["pointing"]["reachable"] == 0.5
    assert (mass["n_boxes"], mass["pointing"]["hits"]) == (1, 0)  # a map of zeros points nowhere
    assert hernia["pointing"] is None


def test_an_earlier_report_s_pictures_are_gone(run, tmp_path) -> None:
    folder = tmp_path / "report"
    assert run.add(folder, boxes=str(run.boxes))
    assert run.add(folder, saliency=0) == []
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_boxes_are_judged_without_pictures(run, tmp_path) -> None:
    assert run.add(tmp_path / "report", saliency=0, boxes=str(run.boxes)) == []
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"saliency.json", "localisation.json"}


def test_boxes_of_other_images_alone_give_no_figures(run, tmp_path) -> None:
    boxes = tmp_path / "others.csv"
    boxes.write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n99999999_000.png,Mass,0,0,9,9\n")
    run.add(tmp_path / "report", saliency=0, boxes=str(boxes))
    located = json.loads((tmp_path / "report" / "localisation.json").read_text())
    assert (located["n_used"], located["n_other_images"], located["map"]) == (0, 1, None)
    assert {one["reason"] for one in located["findings"].values()} == {"no boxes in the images judged"}


def test_without_validation_the_threshold_is_a_half(run, tmp_path) -> None:
    config = dataclasses.replace(run.config, evaluate=EvaluateConfig(saliency=1))
    add_saliency(tmp_path / "report", config, run.checkpoint, run.scores, None)
    found = json.loads((tmp_path / "report" / "saliency.json").read_text())
    assert set(found["thresholds"].values()) == {0.5}


@pytest.mark.parametrize("fault", ["checkpoint", "dataset", "memory"])
def test_a_fault_costs_the_pictures_and_not_the_report(run, tmp_path, monkeypatch, caplog, fault) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "auroc.csv").write_text("the report")
    if fault == "checkpoint":
        run = dataclasses.replace(run, checkpoint=str(tmp_path / "nowhere"))
    elif fault == "dataset":
        (tmp_path / "data" / "test" / "part-00000.parquet").unlink()
    else:

        def fail(*_: object) -> None:
            raise MemoryError("s3://key:secret@bucket/run")

        monkeypatch.setattr(saliency, "cams", fail)
    with caplog.at_level(logging.WARNING):
        assert run.add(folder, boxes=str(run.boxes)) == []
    assert "no saliency in this report" in caplog.text
    found = json.loads((folder / "saliency.json").read_text())
    assert found["error"]
    assert found["images"] == []
    assert "secret" not in found["error"] + caplog.text
    assert (folder / "auroc.csv").read_text() == "the report"


def test_a_stop_is_not_swallowed(run, tmp_path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(saliency, "cams", stop)
    with pytest.raises(SystemExit):
        run.add(tmp_path / "report")


def test_a_picture_is_the_same_whatever_is_asked_beside(run, tmp_path) -> None:
    alone = {(one["finding"], one["image_id"]): one["overlay_png"] for one in run.add(tmp_path / "a")}
    more = {(one["finding"], one["image_id"]): one["overlay_png"] for one in run.add(tmp_path / "b", saliency=2)}
    assert len(more) > len(alone)
    assert alone.items() <= more.items()
