"""NIH's box file as it is shipped, and every way in which a row of it may be wrong."""

from collections import Counter
from pathlib import Path

import pytest

from cxr_dist.config import EvaluateConfig
from cxr_dist.data.boxes import Box, given_boxes, read_boxes
from cxr_dist.data.synth import write_release
from cxr_dist.errors import DataError

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
GOOD = "00000001_000.png,Mass,256,128.5,512,64\n"


def test_the_header_as_shipped_and_parts_of_the_side() -> None:
    data = (HEADER + GOOD + "00000001_000.png,Infiltrate,0,0,1024,1024,,,\n\n").encode()
    assert read_boxes(data, "boxes") == (
        Box(image_id="00000001_000.png", finding="Mass", left=0.25, top=128.5 / 1024, right=0.75, bottom=192.5 / 1024),
        Box(image_id="00000001_000.png", finding="Infiltration", left=0, top=0, right=1, bottom=1),
    )
    [box, _] = read_boxes(data, "boxes", side=2048)
    assert (box.left, box.right) == (0.125, 0.375)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("00000001_000.png,Mas,1,1,1,1", r"boxes: row 3, column Finding Label: found 'Mas', expected .* such as Mass"),
        ("00000001_000.png,No Finding,1,1,1,1", "row 3, column Finding Label: found 'No Finding'"),
        ("00000001_000.png,Mass,left,1,1,1", "row 3, column x: found 'left', expected a number of pixels"),
        ("00000001_000.png,Mass,1,nan,1,1", "row 3, column y: found 'nan'"),
        ("00000001_000.png,Mass,1,1,1_0,1", "row 3, column w: found '1_0'"),
        ("00000001_000.png,Mass,1,1,1,", "row 3, column h: found ''"),
        ("00000001_000.png,Mass,-1,1,1,1", "row 3, column x: found '-1'"),
        ("00000001_000.png,Mass,1,1,0,1", "row 3, column w: found 0 pixels"),
        ("00000001_000.png,Mass,1000,1,25,1", "row 3, columns x and w: found a box that ends at 1025, expected 1024"),
        ("00000001_000.png,Mass,1,1000,1,25", "row 3, columns y and h: found a box that ends at 1025"),
        ("a/b.png,Mass,1,1,1,1", "row 3, column Image Index: found 'a/b.png'"),
        (",Mass,1,1,1,1", "row 3, column Image Index: found no image name"),
        ("00000001_000.png,Mass,1,1,1", "row 3: found 5 columns, expected 6"),
        ("00000001_000.png,Mass,1,1,1,1,,7,", "row 3: found 9 columns, expected 6"),
        (GOOD.strip(), "row 3: found the box of row 2 again"),
        ('"00000001_000.png,Mass,1,1,1,1', "no CSV"),
    ],
)
def test_a_bad_row_is_named(row: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_boxes((HEADER + GOOD + row + "\n").encode(), "boxes")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty file"),
        (HEADER, "a header and no rows"),
        ("Image Index,Finding Labels,Follow-up #\n" + GOOD, "row 1: found columns 'image index,finding labels"),
        (HEADER.replace("\n", "more\n") + GOOD, "row 1: found columns"),
    ],
)
def test_another_file_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_boxes(text.encode(), "boxes")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert given_boxes(EvaluateConfig()) == ()
    with pytest.raises(DataError, match=r"evaluate\.boxes .*nothing\.csv: found no file"):
        given_boxes(EvaluateConfig(boxes=str(tmp_path / "nothing.csv")))


def test_a_drawn_release_s_boxes_are_read(tmp_path: Path) -> None:
    counts = write_release(tmp_path / "release", num_patients=4, seed=0, prevalence=0.5, size=64, processes=1)
    boxes = given_boxes(EvaluateConfig(boxes=str(tmp_path / "release" / "BBox_List_2017.csv"), box_side=64))
    assert len(boxes) == counts["boxes"] > 10


def test_the_real_file(real_data: Path) -> None:
    boxes = given_boxes(EvaluateConfig(boxes=str(real_data / "BBox_List_2017.csv.gz")))
    assert Counter(box.finding for box in boxes) == {
        "Atelectasis": 180,
        "Cardiomegaly": 146,
        "Effusion": 153,
        "Infiltration": 123,
        "Mass": 85,
        "Nodule": 79,
        "Pneumonia": 120,
        "Pneumothorax": 98,
    }
    listed = set((real_data / "test_list.txt").read_text().split())
    assert {box.image_id for box in boxes} <= listed
    assert len({box.image_id for box in boxes}) == 880
    assert boxes[0] == Box(
        image_id="00013118_008.png",
        finding="Atelectasis",
        left=225.084745762712 / 1024,
        top=547.019216763771 / 1024,
        right=(225.084745762712 + 86.7796610169491) / 1024,
        bottom=(547.019216763771 + 79.1864406779661) / 1024,
    )
