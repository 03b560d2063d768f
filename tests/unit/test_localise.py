"""The pointing game and boxes against boxes, on maps and boxes worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from cxr_dist.config import EvaluateConfig
from cxr_dist.data.boxes import Box, given_boxes
from cxr_dist.evaluate.localise import GRID, IOBB, IOU, computed_boxes, localise, point, wilson
from tests.conftest import ROOT


def box(image_id: str, left: float, top: float, right: float, bottom: float, finding: str = "Mass") -> Box:
    return Box(image_id=image_id, finding=finding, left=left, top=top, right=right, bottom=bottom)


def spot(row: int, column: int, side: int = 7) -> np.ndarray:
    """A map of one cell."""
    heat = np.zeros((side, side), np.float32)
    heat[row, column] = 1
    return heat


def block(left: float, top: float, right: float, bottom: float, value: float = 1.0) -> np.ndarray:
    """A map at the grid's own side, so that the computed box is the block."""
    heat = np.zeros((GRID, GRID), np.float32)
    rows, columns = slice(int(top * GRID), int(bottom * GRID)), slice(int(left * GRID), int(right * GRID))
    heat[rows, columns] = value
    return heat


def test_a_map_points_at_the_centre_of_its_greatest_cell() -> None:
    assert point(spot(0, 6)) == (6.5 / 7, 0.5 / 7)
    assert point(np.ones((2, 4), np.float32)) == (0.125, 0.25)  # of equal ones the first
    assert point(np.zeros((7, 7), np.float32)) is None


def test_computed_boxes_are_around_the_regions_of_each_cut_once() -> None:
    heat = np.maximum(block(0, 0, 0.25, 0.5), block(0.5, 0.5, 1, 1, 0.5))
    heat = np.maximum(heat, block(0.25, 0.5, 0.375, 0.625, 0.3))  # touches both others at a corner or an edge
    expected = {(0, 0, 0.25, 0.5), (0.5, 0.5, 1, 1), (0.25, 0.5, 0.375, 0.625)}
    assert {tuple(row) for row in computed_boxes(heat)} == expected
    assert len(computed_boxes(heat)) == 3  # the first is above both cuts
    nested = np.maximum(block(0, 0, 1, 1, 0.25), block(0, 0, 0.5, 0.5, 0.75))
    assert {tuple(row) for row in computed_boxes(nested)} == {(0, 0, 1, 1), (0, 0, 0.5, 0.5)}
    assert computed_boxes(block(0, 0, 1, 1, 60 / 256)).shape == (0, 4)  # below the lower cut, 60 / 255


def test_the_pointing_game_by_hand() -> None:
    maps = {
        ("a", "Mass"): spot(0, 0),  # points at (1/14, 1/14): in its second box
        ("b", "Mass"): spot(3, 3),  # at (1/2, 1/2): outside
        ("c", "Mass"): np.zeros((7, 7), np.float32),  # nowhere
        ("d", "Mass"): spot(3, 3),
    }
    boxes = [
        box("a", 0.5, 0.5, 0.6, 0.6),
        box("a", 0, 0, 1 / 7, 1 / 7),
        box("b", 0.51, 0.5, 0.55, 0.55),  # no cell's centre lies in it
        box("c", 0, 0, 1, 1),
        box("d", 0.4, 0.4, 0.6, 0.6),
    ]
    found = localise(maps, boxes, {"a": 1, "b": 2, "c": 3, "d": 4}, ["Mass", "Hernia"])
    mass = found["Mass"]
    assert (mass["n_boxes"], mass["n_images"], mass["n_patients"]) == (5, 4, 4)
    game = mass["pointing"]
    assert (game["hits"], game["n"], game["value"]) == (2, 4, 0.5)
    assert game["chance"] == pytest.approx((2 + 0 + 49 + 1) / 49 / 4)
    assert game["centre"] == 0.75  # a: the corner of its first box
    assert game["reachable"] == 0.75
    interval = binomtest(2, 4).proportion_ci(method="wilson")
    assert (game["lower"], game["upper"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found["Hernia"] == {
        "n_boxes": 0,
        "n_images": 0,
        "n_patients": 0,
        "pointing": None,
        "iou": None,
        "iobb": None,
        "reason": "no boxes in the images judged",
    }
    json.dumps(found, allow_nan=False)


def test_boxes_against_boxes_by_hand() -> None:
    # a: the computed box is the left half, the drawn one the upper left quarter: IoU 1/2, IoBB 1/2
    # b: computed the upper left quarter, drawn the left half (IoU 1/2, IoBB 1) and the right half (0, 0)
    maps = {("a", "Mass"): block(0, 0, 0.5, 1), ("b", "Mass"): block(0, 0, 0.5, 0.5)}
    boxes = [box("a", 0, 0, 0.5, 0.5), box("b", 0, 0, 0.5, 1), box("b", 0.5, 0, 1, 1)]
    mass = localise(maps, boxes, {"a": 1, "b": 2}, ["Mass"])["Mass"]
    assert list(mass["iou"]) == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"] == [f"{cut:g}" for cut in IOU]
    assert list(mass["iobb"]) == ["0.1", "0.25", "0.5", "0.75", "0.9"] == [f"{cut:g}" for cut in IOBB]
    assert {cut: one["hits"] for cut, one in mass["iou"].items()} == {
        **dict.fromkeys(("0.1", "0.2", "0.3", "0.4"), 2),
        **dict.fromkeys(("0.5", "0.6", "0.7"), 0),  # above T, not at it
    }
    assert [one["hits"] for one in mass["iobb"].values()] == [2, 2, 1, 1, 1]
    assert all(one["n"] == 3 for one in [*mass["iou"].values(), *mass["iobb"].values()])
    assert mass["iou"]["0.4"]["value"] == 2 / 3
    assert mass["iou"]["0.4"]["false_positives"] == 0
    assert mass["iou"]["0.5"]["false_positives"] == 1  # two boxes for nothing, in two images
    assert mass["iobb"]["0.5"]["false_positives"] == 0.5
    # two boxes of one patient and one of another: 9 / 5 trials
    assert (mass["iou"]["0.4"]["lower"], mass["iou"]["0.4"]["upper"]) == wilson(2, 3, 9 / 5)


def test_the_order_of_boxes_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    maps, boxes = {}, []
    for number in range(30):
        for finding in ("Mass", "Nodule"):
            maps[str(number), finding] = rng.random((7, 7), np.float32)
            left, top = rng.random(2) * 0.5
            boxes.append(box(str(number), left, top, left + 0.3, top + 0.4, finding))
    patients = {str(number): number // 3 for number in range(30)}
    found = localise(maps, boxes, patients, ["Mass", "Nodule"])
    assert localise(maps, [boxes[row] for row in rng.permutation(60)], patients, ["Mass", "Nodule"]) == found
    assert found["Mass"]["n_patients"] == 10
    assert found["Mass"]["iou"]["0.1"]["hits"] >= found["Mass"]["iou"]["0.7"]["hits"]


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 5), (79, 98), (1, 1)])
def test_the_interval_of_independent_trials_is_wilson_s(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(hits, n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_boxes_of_one_patient_are_one_trial() -> None:
    maps = {(str(number), "Mass"): spot(3, 3) for number in range(8)}
    boxes = [box(str(number), 0.4, 0.4, 0.6, 0.6) for number in range(8)]
    apart = localise(maps, boxes, {str(number): number for number in range(8)}, ["Mass"])["Mass"]["pointing"]
    together = localise(maps, boxes, {str(number): 1 for number in range(8)}, ["Mass"])["Mass"]["pointing"]
    assert apart["value"] == together["value"] == 1
    assert (apart["lower"], apart["upper"]) == wilson(8, 8, 8)
    assert (together["lower"], together["upper"]) == wilson(8, 8, 1)
    assert together["lower"] < apart["lower"] < 1


def test_what_maps_of_random_numbers_reach_on_the_real_boxes(real_data: Path) -> None:
    """The table in docs/saliency.md: what a figure has to be held against."""
    boxes = given_boxes(EvaluateConfig(boxes=str(real_data / "BBox_List_2017.csv.gz")))
    rng = np.random.default_rng(0)
    maps = {(one.image_id, one.finding): rng.random((7, 7), np.float32) for one in boxes}
    maps = {key: heat / heat.max() for key, heat in maps.items()}
    patients = {one.image_id: int(one.image_id[:8]) for one in boxes}
    found = localise(maps, boxes, patients, sorted({one.finding for one in boxes}))
    rows = {
        finding: [
            *(round(one["pointing"][name], 3) for name in ("chance", "centre", "reachable", "value")),
            *(round(one["iou"][cut]["value"], 3) for cut in ("0.1", "0.5")),
            round(one["iobb"]["0.1"]["value"], 3),
        ]
        for finding, one in found.items()
    }
    lines = (ROOT / "docs" / "saliency.md").read_text().splitlines()
    for finding, row in rows.items():
        assert f"| {finding} | {found[finding]['n_boxes']} | {' | '.join(f'{value:.3f}' for value in row)} |" in lines
