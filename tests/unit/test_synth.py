"""The synthetic release: the same bytes for the same arguments, NIH's formats, and findings that are really drawn."""

import csv
import gzip
import hashlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_dist.data.nih import FINDINGS, read_labels, read_list
from cxr_dist.data.synth import write_release
from cxr_dist.data.synth_film import render_with_boxes
from cxr_dist.data.synth_findings import DRAW
from cxr_dist.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("Consolidation", "Effusion", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax")
ARGUMENTS = {"num_patients": 9, "seed": 3, "prevalence": 0.5, "size": 64, "processes": 1}


def render(*arguments: object, **options: object) -> np.ndarray:
    """The pixels alone."""
    return render_with_boxes(*arguments, **options)[0]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "nih"
    write_release(folder, **ARGUMENTS)
    return folder


def test_findings_are_nihs_fourteen() -> None:
    assert set(DRAW) == set(FINDINGS)


def test_render_is_a_full_grey_image_of_the_asked_size() -> None:
    pixels = render(0, ["Mass"], "AP", "F", 60)
    assert pixels.shape == (1024, 1024)
    assert pixels.dtype == np.uint8
    assert pixels.min() < 20
    assert pixels.max() > 200
    assert render(0, [], "PA", "M", 60, size=100).shape == (100, 100)


def test_render_depends_on_its_arguments_alone() -> None:
    first = render(5, ["Edema"], "PA", "M", 40, 128)
    np.testing.assert_array_equal(first, render(5, ["Edema"], "PA", "M", 40, 128))
    for other in (
        render(6, ["Edema"], "PA", "M", 40, 128),
        render(5, [], "PA", "M", 40, 128),
        render(5, ["Edema"], "AP", "M", 40, 128),
        render(5, ["Edema"], "PA", "F", 40, 128),
        render(5, ["Edema"], "PA", "M", 40, 128, anatomy_seed=8),
        render(5, ["Edema"], "PA", "M", 40, 128, contrast=0.5),
    ):
        assert (first != other).mean() > 0.1


def test_a_generator_gives_a_new_image_each_time() -> None:
    rng = np.random.default_rng(0)
    assert (render(rng, [], "PA", "M", 40, 64) != render(rng, [], "PA", "M", 40, 64)).any()


@pytest.mark.parametrize("finding", LOCAL)
def test_a_local_finding_changes_its_boxes_and_nothing_else(finding: str) -> None:
    for seed in range(3):
        healthy = render(seed, [], "PA", "M", 50, 256).astype(int)
        pixels, boxes = render_with_boxes(seed, [finding], "PA", "M", 50, 256)
        inside = np.zeros((256, 256), bool)
        near = np.zeros((256, 256), bool)
        for box in boxes:
            left, top, right, bottom = (round(v) for v in (box.x, box.y, box.x + box.width, box.y + box.height))
            inside[top:bottom, left:right] = True
            near[max(0, top - 8) : bottom + 8, max(0, left - 8) : right + 8] = True
        change = np.abs(pixels - healthy)
        assert {box.finding for box in boxes} == {finding}
        assert change[inside].mean() > 5
        assert (change[~near] > 8).mean() < (0.05 if finding == "Pneumothorax" else 0.002)


@pytest.mark.parametrize("finding", sorted(set(FINDINGS) - set(LOCAL)))
def test_a_wide_finding_changes_the_chest(finding: str) -> None:
    healthy = render(1, [], "PA", "M", 50, 256).astype(int)
    pixels, boxes = render_with_boxes(1, [finding], "PA", "M", 50, 256)
    assert (np.abs(pixels - healthy) > 12).mean() > 0.01
    assert boxes


def test_findings_do_not_move_each_other() -> None:
    alone = render_with_boxes(2, ["Mass"], "PA", "M", 50, 64)[1]
    both = render_with_boxes(2, ["Atelectasis", "Mass"], "PA", "M", 50, 64)[1]
    assert [box for box in both if box.finding == "Mass"] == alone


def test_effusion_whitens_and_pneumothorax_darkens() -> None:
    for finding, sign in (("Effusion", 1), ("Pneumothorax", -1)):
        pixels, (box,) = render_with_boxes(4, [finding], "PA", "M", 50, 256)
        change = pixels.astype(int) - render(4, [], "PA", "M", 50, 256)
        region = change[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)]
        assert sign * region[np.abs(region) > 20].mean() > 0


def test_a_release_reads_as_nihs(release: Path) -> None:
    data = (release / "Data_Entry_2017.csv").read_bytes()
    assert data.split(b"\n", 1)[0] == (
        b"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        b"OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    rows = list(csv.reader(io.StringIO(data.decode())))[1:]
    assert {len(row) for row in rows} == {11}
    table = read_labels(data, "Data_Entry_2017.csv")
    names = table.column("image_id").to_pylist()
    assert names == sorted(path.name for path in (release / "images").iterdir())
    for name, row in zip(names, rows, strict=True):
        assert name == f"{int(row[3]):08d}_{int(row[2]):03d}.png"
        assert row[5] in "MF"
        assert row[6] in ("PA", "AP")
    with Image.open(release / "images" / names[0]) as image:
        assert (image.mode, image.size, image.format) == ("L", (64, 64), "PNG")


def test_real_header_is_the_same(real_data: Path, release: Path) -> None:
    for ours, theirs in (
        ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv.gz"),
        ("BBox_List_2017.csv", "BBox_List_2017.csv.gz"),
    ):
        with gzip.open(real_data / theirs, "rb") as file:
            header = file.readline().strip()
        assert (release / ours).read_bytes().split(b"\n", 1)[0].strip() == header


def test_lists_hold_every_image_once_and_no_patient_twice(release: Path) -> None:
    lists = {}
    for name in ("train_val_list.txt", "test_list.txt"):
        data = (release / name).read_bytes()
        assert not data.endswith(b"\n")
        lists[name] = read_list(data, name)
    train_val, test = lists.values()
    assert sorted(train_val + test) == sorted(path.name for path in (release / "images").iterdir())
    assert not {name[:8] for name in train_val} & {name[:8] for name in test}
    assert len({name[:8] for name in test}) == 2


def test_boxes_lie_in_images_that_show_the_finding(release: Path) -> None:
    labels = {
        row["Image Index"]: row["Finding Labels"].replace("Infiltration", "Infiltrate").split("|")
        for row in csv.DictReader((release / "Data_Entry_2017.csv").open())
    }
    lines = (release / "BBox_List_2017.csv").read_text().splitlines()
    assert lines[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    assert len(lines) > 20
    for line in lines[1:]:
        name, finding, *numbers = line.split(",")
        x, y, width, height = map(float, numbers)
        assert finding in labels[name]
        assert 0 <= x < x + width <= 64
        assert 0 <= y < y + height <= 64


def test_same_arguments_give_the_same_bytes_over_any_number_of_processes(tmp_path: Path, release: Path) -> None:
    write_release(tmp_path / "again", **ARGUMENTS | {"num_patients": 16, "processes": 2})
    write_release(tmp_path / "alone", **ARGUMENTS | {"num_patients": 16, "processes": 1})
    assert _digests(tmp_path / "again") == _digests(tmp_path / "alone")
    first = _digests(release)
    assert {name: _digests(tmp_path / "again")[name] for name in first if name.endswith(".png")} == {
        name: digest for name, digest in first.items() if name.endswith(".png")
    }


def test_a_complete_release_is_kept_and_a_broken_one_finished(tmp_path: Path, release: Path) -> None:
    folder = tmp_path / "nih"
    counts = write_release(folder, **ARGUMENTS)
    assert counts.pop("already_there") is False
    (folder / "images" / "00000001_000.png").write_bytes(b"kept as it is")
    assert write_release(folder, **ARGUMENTS) == {**counts, "already_there": True}
    assert (folder / "images" / "00000001_000.png").read_bytes() == b"kept as it is"
    (folder / "synth.json").rename(folder / "synth.unfinished.json")
    assert write_release(folder, **ARGUMENTS) == {**counts, "already_there": False}
    assert _digests(folder) == _digests(release)


def test_a_directory_in_use_is_refused(tmp_path: Path, release: Path) -> None:
    with pytest.raises(DataError, match="another seed"):
        write_release(release, **ARGUMENTS | {"seed": 4})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="no synthetic release"):
        write_release(tmp_path, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_only_the_asked_findings_are_drawn(tmp_path: Path) -> None:
    counts = write_release(
        tmp_path / "nih", num_patients=12, seed=0, findings=("Mass", "Hernia"), prevalence={"Mass": 0.5}, size=16
    )
    rows = list(csv.DictReader((tmp_path / "nih" / "Data_Entry_2017.csv").open()))
    labels = [row["Finding Labels"] for row in rows]
    assert set(labels) == {"Mass", "No Finding"}
    assert counts["positives"] == {"Hernia": 0, "Mass": labels.count("Mass")}
    assert counts["images"] == len(rows) == counts["train_val"] + counts["test"]


@pytest.mark.parametrize(
    "wrong",
    [{"findings": ["Masss"]}, {"view": "LL"}, {"sex": "X"}, {"contrast": 0}, {"size": 8}],
)
def test_impossible_arguments_of_a_drawing_are_refused(wrong: dict) -> None:
    good = {"findings": [], "view": "PA", "sex": "M", "age": 50, "size": 32, "contrast": 1.0}
    render(0, **good)
    with pytest.raises(ConfigError, match=str(next(iter(wrong)))):
        render(0, **good | wrong)


def test_impossible_arguments_of_a_release_are_refused(tmp_path: Path) -> None:
    for wrong in ({"num_patients": 1}, {"prevalence": 1.5}, {"findings": ("Cough",)}, {"contrast": 2.0}):
        with pytest.raises(ConfigError):
            write_release(tmp_path / "nih", **ARGUMENTS | wrong)
        assert not (tmp_path / "nih").exists()


def test_job_prints_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("synth_job", ROOT / "jobs" / "synth.py")
    assert spec
    assert spec.loader
    synth_job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synth_job)
    flags = ["--out", str(tmp_path / "nih"), "--patients", "2", "--size", "32", "--findings", "nih8"]
    assert synth_job.main(flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["patients"] == 2
    assert len(result["positives"]) == 8
    assert synth_job.main([*flags, "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err
